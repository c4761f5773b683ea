"""The example package, installed as a user would install it and run through the command line."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, call
from test_fit import logged

SOURCE = ROOT / "examples" / "my_losses"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    copy = shutil.copytree(SOURCE, folder / "source")  # building leaves folders behind
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(copy)], check=True, timeout=120)
    return folder / "site"


@pytest.fixture
def run(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """rap-lightning fit in this process, with the installed package on its path."""
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.chdir(tmp_path)

    def fit(*args: str) -> None:
        assert call(monkeypatch, "fit", *args) == 0, args

    return fit


def test_a_new_loss_is_ten_lines_of_code() -> None:
    tree = ast.parse((SOURCE / "my_losses.py").read_text(encoding="utf-8"))
    (kind,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "FocalDPO"]
    for node in ast.walk(kind):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    assert len(ast.unparse(kind).splitlines()) <= 10


def test_the_installed_loss_and_module_train(
    run: Callable[..., None], installed: Path, tiny: Path, pairs_folder: Path, tmp_path: Path
) -> None:
    common = [
        "--model.policy.path", str(tiny), "--data.source", str(pairs_folder), "--data.max_length", "160",
        "--data.batch_size", "46", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
        "--trainer.log_every_n_steps", "1", "--trainer.default_root_dir",
    ]  # fmt: skip
    run(*common, "a", "--model.loss", "my_losses.FocalDPO", "--model.loss.focus", "1")
    assert Path(sys.modules["my_losses"].__file__ or "").parent == installed
    assert logged(tmp_path / "a")[0]["loss"] == pytest.approx(0.693147 / 2, abs=1e-5)
    run("--model", "my_losses.HighGoalsFirst", *common, "b")
    first = logged(tmp_path / "b")[0]
    assert first["loss/chosen-goal"] == pytest.approx(0.693147, abs=1e-5)
    assert first["loss/rejected-goal"] == pytest.approx(0.693147 / 2, abs=1e-5)


def test_its_docstring_is_the_help(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    run("--model.loss.help", "my_losses.FocalDPO")
    text = capsys.readouterr().out
    assert "DPO that turns to the pairs not yet won" in text
    assert "--model.loss.focus" in text
    assert "γ; 0 is DPO." in text
