"""inspect and relabel as a stranger uses them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import called, make_tokenizer, scored_rows, write_jsonl
from rap_lightning.commands.inspect import inspect, visible
from rap_lightning.commands.relabel import relabel
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences import relabel_export as written
from rap_lightning.preferences.goals import AttributeGoal, OverallGoal
from rap_lightning.preferences.scales import QuantileScale, RewardScale


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = scored_rows(40)
    rows[3]["chosen"][-1]["content"] = ""
    rows[5]["score_rejected"] = rows[5]["score_chosen"]
    rows[8]["rejected"][-1]["content"] = "one " * 400
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_inspect_says_what_would_be_trained_on(
    rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    args = ["inspect", "--source", str(rows_file), "--tokenizer", str(tmp_path / "tokenizer"), "--max_length", "256"]
    assert called(*args, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)["splits"]
    assert (report["rows_read"], report["rows_kept"], report["relabelled_pairs"]) == (40, 38, 76)
    figures = report["figures"]
    assert sum(count for _, _, count in figures["rewards"]) == 76
    assert figures["tokens"]["pairs_measured"] == 38
    assert figures["tokens"]["share_over_max_length"] == pytest.approx(1 / 38, abs=1e-4)
    assert figures["tokens"]["rejected"]["max"] > 400
    assert report["truncated"] == {
        "end of the rejected response cut": {"count": 1, "first": "rows.jsonl line 9, column rejected"}
    }
    assert called(*args) == 0
    shown = capsys.readouterr().out
    for part in ("38 pairs kept", "dropped 1: an empty response", "pair 1", "chosen-goal, goal", "Overall score:"):
        assert part in shown
    first = scored_rows(1)[0]
    assert f"   | {first['rejected'][-1]['content']}" in shown


def test_inspect_counts_the_same_from_columns_and_from_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored_rows(200)
    lines = write_jsonl(tmp_path / "rows.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    figures = []
    for path in (lines, tmp_path / "rows.parquet"):
        assert inspect(str(path), json=True) == 0
        (report,) = json.loads(capsys.readouterr().out)["splits"]
        figures.append({k: v for k, v in report.items() if k != "source"})
    assert figures[0] == figures[1]


def test_inspect_ends_with_one_where_fit_would_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = scored_rows(5)
    rows[2]["score_chosen"] = "high"
    bad = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert called("inspect", "--source", str(bad)) == 1
    assert "bad.jsonl line 3, column score_chosen, found 'high'" in capsys.readouterr().out
    assert called("inspect", "--source", str(tmp_path / "nowhere.jsonl")) == 1
    assert "no such file or folder" in capsys.readouterr().err
    wide = write_jsonl(tmp_path / "wide.jsonl", [row | {"score_chosen": 90.0} for row in scored_rows(3)])
    assert called("inspect", "--source", str(wide), "--json") == 1
    assert "score outside the declared scale" in capsys.readouterr().out


def test_inspect_fits_a_scale_and_states_attributes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row | {"scores_chosen": {"clear": 4, "kind": 5}, "scores_rejected": {"clear": 2, "kind": 5}}
        for row in scored_rows(20)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    goal = AttributeGoal(["kind", "clear"], QuantileScale(), attribute_scale=RewardScale(1, 5))
    assert inspect(str(path), goal=goal) == 0
    shown = capsys.readouterr().out
    assert "scale fitted: QuantileScale" in shown
    assert "Kind: 5.\n   Clear: 2.\n   Overall score:" in shown


def test_the_text_commands_start_without_torch(rows_file: Path) -> None:
    code = (
        "import sys; from rap_lightning.cli import main as cli\n"
        f"try: cli.main(['inspect', '--source', {str(rows_file)!r}, '--json'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules, 'slow to start'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_what_a_terminal_would_obey_is_shown_as_escapes() -> None:
    assert visible("a\x1b[31m\u202e\u200b\r\nb é 日本") == "a\\x1b[31m\\u202e\\u200b\\r\nb é 日本"


def test_relabel_goes_on_with_the_shards_that_are_missing(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rap_lightning.commands.relabel.SHARD", 5)
    from rap_lightning.preferences import readers

    monkeypatch.setattr(readers, "ROWS", 4)
    relabel(str(rows_file), str(tmp_path / "whole"))
    calls = 0
    real = written.ShardedFolder.write

    def interrupted(self: Any, name: str, *what: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(self, name, *what)

    monkeypatch.setattr(written.ShardedFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        relabel(str(rows_file), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists(), "all or nothing"
    assert len(list((tmp_path / ".out.partial").glob("*.parquet"))) == 2
    again: list[str] = []
    monkeypatch.setattr(written.ShardedFolder, "write", lambda s, n, *w: (again.append(n), real(s, n, *w))[0])
    relabel(str(rows_file), str(tmp_path / "out"))
    assert "train-00000.parquet" not in again
    assert "train-00001.parquet" not in again
    assert again
    one, other = (datasets.load_dataset(str(tmp_path / n), split="train").to_list() for n in ("whole", "out"))
    assert one == other
    assert len(one) == 76
    with pytest.raises(ConfigError, match="not empty"):
        relabel(str(rows_file), str(tmp_path / "out"))


def test_other_settings_begin_an_unfinished_folder_anew(rows_file: Path, tmp_path: Path) -> None:
    folder = written.ShardedFolder(tmp_path / "out", "one key")
    folder.open()
    (folder.partial / "train-00000.parquet").write_bytes(b"of other settings")
    relabel(str(rows_file), str(tmp_path / "out"), relabel="chosen")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert set(rows["origin"]) == {"chosen-goal"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "38 pairs kept" in card
    assert str(tmp_path) not in card, "no folders of this machine in a card"


def test_a_kill_while_the_folder_is_closed_repeats_nothing(
    rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if Path(target).name == "out":
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        relabel(str(rows_file), str(tmp_path / "out"))
    monkeypatch.setattr(Path, "rename", real)
    relabel(str(rows_file), str(tmp_path / "out"))
    assert len(datasets.load_dataset(str(tmp_path / "out"), split="train")) == 76


def test_relabel_stops_at_a_fault_and_leaves_nothing(tmp_path: Path) -> None:
    rows = scored_rows(5)
    rows[2]["score_chosen"] = "high"
    with pytest.raises(DataError, match="line 3"):
        relabel(str(write_jsonl(tmp_path / "bad.jsonl", rows)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_relabel_puts_the_goal_before_the_user_where_there_is_no_system_role(rows_file: Path, tmp_path: Path) -> None:
    make_tokenizer("gemma").save_pretrained(tmp_path / "tokenizer")
    relabel(str(rows_file), str(tmp_path / "out"), tokenizer=str(tmp_path / "tokenizer"))
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    for row in rows:
        assert row["prompt"][0]["role"] == "user"
        assert row["prompt"][0]["content"].startswith(OverallGoal().text(float(row["goal"])) + "\n\n")


def test_ctrl_c_ends_relabel_at_once_and_it_goes_on_later(tmp_path: Path) -> None:
    rows = scored_rows(60_000)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-m", "rap_lightning.cli.main", "relabel", "--source", str(source)]
    # a shell's background job ignores SIGINT, and its children inherit that
    fresh = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    run = subprocess.Popen([*command, "--output", str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, **fresh)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").is_dir() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["inspect", "--source", "x", "--selection", "BestVsWorsst"], "Did you mean BestVsWorst?"),
        (["inspect", "--source", "x", "--goal=OverallGaol"], "Did you mean OverallGoal?"),
        (["fit", "--model.loss", "DPOO"], "Did you mean DPO?"),
        (["fit", "--model.reference", "Frosen"], "Did you mean Frozen?"),
        (["fit", "--data.goal.scale", "Quantile"], "Did you mean QuantileScale?"),
    ],
)
def test_a_misspelt_class_is_answered_with_those_that_exist(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(*args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "or give the import path of one of your own" in error


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--max_length", "512"], "--max_length has no effect without --tokenizer"),
        (["--examples", "1", "--json"], "--examples has no effect with --json"),
        (["--selection", "BestVsWorst", "--selection.max_pairs", "2"], "max_pairs"),
    ],
)
def test_options_of_inspect_without_effect_are_refused(
    args: list[str], said: str, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called("inspect", "--source", str(rows_file), *args) == 2
    assert said in capsys.readouterr().err
