"""Completion in a real shell: the script is sourced, and Tab is pressed as readline does it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import called, run_command
from rap_lightning.commands import COMMANDS

PRESS = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p rap-lightning | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab")
    path: Path = tmp_path_factory.mktemp("completion") / "rap-lightning"
    path.write_text(run_command("completion", "bash").stdout)
    return path


def pressed(script: Path, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last word."""
    command = ["bash", "--norc", "-c", PRESS, "bash", str(script), "rap-lightning", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=cwd).stdout.split()


def test_bash_completes_commands_options_and_values(script: Path) -> None:
    assert set(pressed(script, "")) == set(COMMANDS)
    assert pressed(script, "rel") == ["relabel"]
    sections = pressed(script, "fit", "--")
    assert {"--config", "--trainer", "--model.policy.path", "--data.source", "--ckpt_path"} <= set(sections)
    assert pressed(script, "fit", "--trainer.max_ste") == ["--trainer.max_steps"]
    assert pressed(script, "fit", "--config", "x.yaml", "--model.loss", "SimP") == ["SimPO"]
    assert pressed(script, "fit", "--model.loss", "SimPO", "--model.loss.gam") == ["--model.loss.gamma"]
    assert "--model.optimizer.lr" in pressed(script, "fit", "--model.optimizer.l")
    assert pressed(script, "predict", "--data.predict.g") == ["--data.predict.goal"]
    assert pressed(script, "inspect", "--ties", "") == ["drop", "chosen", "error"]
    assert pressed(script, "score", "--judge", "Rew") == ["RewardModel"]
    assert pressed(script, "export", "--merge", "") == ["true", "false"]
    assert pressed(script, "evaluate", "--suite", "Alp") == ["AlpacaEval"], "both of evaluate's halves"
    assert pressed(script, "evaluate", "--bin") == ["--bins"]
    assert pressed(script, "plan", "--mf") == ["--mfu"], "plan's own options, and those of fit"
    assert pressed(script, "plan", "--data.lay") == ["--data.layout"]
    assert pressed(script, "plan", "--gpu", "h100-8") == ["h100-80gb"]
    assert pressed(script, "report", "--over") == ["--overwrite"]
    assert pressed(script, "completion", "b") == ["bash"]


def test_bash_completes_files_where_an_option_takes_one(script: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "runs").mkdir()
    for words in (["fit", "--data.source"], ["fit", "-c"], ["inspect", "--source"], ["report"]):
        assert sorted(pressed(script, *words, "", cwd=tmp_path)) == ["pairs.jsonl", "runs"], words
    assert not pressed(script, "fit", "--trainer.max_steps", "", cwd=tmp_path), "a number is no file"


def test_the_script_imports_nothing(script: Path) -> None:
    text = script.read_text()
    assert "python" not in text
    assert len(text) < 300_000, "a shell reads it when it first completes"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_scripts(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")
    assert called("completion", shell) == 0
    shown = capfd.readouterr().out
    for part in ("model.loss.gamma", "SimPO", "max_steps", "evaluate"):
        assert part in shown
    if shutil.which(shell):
        (tmp_path / "script").write_text(shown)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


def test_without_shtab_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert called("completion", "bash") == 2
    assert "pip install 'rap-lightning[completion]'" in capfd.readouterr().err
    assert called("completion", "bsh") == 2
    assert "expected one of bash, zsh, fish; found 'bsh'. Did you mean bash?" in capfd.readouterr().err
