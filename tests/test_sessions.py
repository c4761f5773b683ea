"""A resumed run is recorded as one run: in run.json, in its checkpoints and in the report."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from conftest import build, call, make_trainer
from rap_lightning.callbacks import Checkpoints, RunRecord
from rap_lightning.callbacks.run_sessions import SESSIONS
from rap_lightning.callbacks.signals import Stopped
from rap_lightning.losses import DPO
from rap_lightning.reporting.curves import Curves, joined
from rap_lightning.reporting.read_runs import Run, read_runs
from rap_lightning.reporting.tables import cost_rows, headline, notes


def read(folder: Path) -> Run:
    (run,) = read_runs([str(folder)])
    return run


def record(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def losses(folder: Path) -> dict[int, float]:
    """The loss that each step has in a folder's own metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tiny: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sessions: the first runs to step 5, the second goes on from its step 4, the third from that one's last."""
    root = tmp_path_factory.mktemp("chain")
    content = {
        "model": {"policy": {"path": str(tiny)}, "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}}},
        "data": {"source": str(pairs_folder), "max_length": 160, "batch_size": 4},
        "trainer": {"accelerator": "cpu", "default_root_dir": str(root / "runs"), "log_every_n_steps": 1},
        "checkpoint": {"every_n_train_steps": 2, "save_top_k": -1},
        "export": {"enabled": False},
    }
    config = root / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "fit", "--config", config, "--trainer.max_steps", 5) == 0
        (at_four,) = (root / "runs" / "version_0" / "checkpoints").glob("*step=4.ckpt")
        assert call(patch, "fit", "--config", config, "--trainer.max_steps", 6, "--ckpt_path", at_four) == 0
        own = root / "runs" / "version_1" / "config.yaml"
        assert call(patch, "fit", "--config", own, "--trainer.max_steps", 8, "--ckpt_path", "last") == 0
    return root / "runs"


def test_run_json_and_checkpoint_say_what_a_session_went_on_from(chain: Path) -> None:
    first, second, third = (record(chain / f"version_{i}") for i in range(3))
    assert first["continues"] is None
    assert second["continues"]["step"] == 4
    assert second["continues"]["checkpoint"].endswith("step=4.ckpt")
    told = third["continues"]["sessions"]
    assert [(one["from_step"], one["step"]) for one in told] == [(0, 4), (4, 6)]
    assert [one["folder"] for one in told] == [str(chain / f"version_{i}") for i in range(2)]
    assert [one["started"] for one in told] == [first["started"], second["started"]]
    assert all(0 < one["seconds"] < 600 for one in told)
    last = torch.load(chain / "version_2" / "checkpoints" / "last.ckpt", weights_only=True)[SESSIONS]
    assert last[:2] == told
    assert (last[2]["from_step"], last[2]["step"]) == (6, 8)
    assert (third["facts"]["step"], third["stopped"], third["finished"] is None) == (8, None, False)


def test_the_report_joins_the_curves_of_three_sessions_and_cuts_what_led_to_nothing(chain: Path) -> None:
    run = read(chain / "version_2")
    assert run.curves is not None
    assert run.step == 8
    own = [losses(chain / f"version_{i}") for i in range(3)]
    assert sorted(own[0]) == [1, 2, 3, 4, 5], "the first session ran beyond the checkpoint"
    expected = own[1] | own[2] | {step: loss for step, loss in own[0].items() if step <= 4}
    assert run.curves.values["loss"] == sorted(expected.items())
    assert [step for step, _ in run.curves.values["loss"]] == list(range(1, 9))
    assert run.notes == []
    assert [(one.first, one.end) for one in run.sessions] == [(0, 4), (4, 6)]
    assert run.seconds is not None
    told = sum(one["seconds"] for one in record(chain / "version_2")["continues"]["sessions"])
    assert run.wall_time == ("3 sessions", pytest.approx(told + run.seconds))
    head, rows = cost_rows([run])
    assert dict(zip(head, rows[0], strict=True))["wall time of fit"].endswith(" (3 sessions)")


def test_what_a_session_logged_beyond_the_checkpoint_is_cut_even_where_nothing_took_its_place() -> None:
    first = Curves({"loss": [(1, 0.1), (4, 0.4), (9, 0.9)], "val/loss": [(9, 0.5)]}, {"loss": 3, "lr": 9}, 1, 9)
    second = Curves({"loss": [(4, 0.44), (8, 0.8)]}, {}, 0, 8)
    whole = joined([(first, 4)], second)
    assert whole.values == {"loss": [(1, 0.1), (4, 0.44), (8, 0.8)]}
    assert (whole.not_finite, whole.broken, whole.last_step) == ({"loss": 3}, 1, 8)


def test_runs_that_were_moved_together_are_found_and_a_folder_that_is_gone_is_named(
    chain: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(chain, moved, symlinks=True)
    for folder in moved.iterdir():  # that they are not where they were
        told = record(folder)
        for one in (told["continues"] or {"sessions": []})["sessions"]:
            one["folder"] = str(Path("/nowhere") / Path(one["folder"]).name)
        (folder / "run.json").write_text(json.dumps(told))
    run = read(moved / "version_2")
    assert run.notes == []
    assert [one.folder for one in run.sessions] == [moved / "version_0", moved / "version_1"]
    shutil.rmtree(moved / "version_0")
    run = read(moved / "version_2")
    assert run.curves is not None
    own = losses(chain / "version_1") | losses(chain / "version_2")
    assert run.curves.values["loss"] == sorted(own.items())
    assert min(own) >= 4
    assert run.notes == ["steps 1 to 4 are not shown: its folder /nowhere/version_0 does not exist"]
    assert run.wall_time is not None
    assert run.wall_time[0] == "3 sessions", "the checkpoint remembers how long it took"
    shutil.copytree(moved / "version_1", moved / "version_0")  # another run under the name
    assert read(moved / "version_2").notes[0].endswith("/nowhere/version_0 now holds another run")


def test_a_report_of_a_run_and_of_what_it_went_on_from_says_so(chain: Path) -> None:
    runs = read_runs([str(chain / f"version_{i}") for i in (0, 2)])
    assert "version_2 was resumed from step 4 of version_0: up to there they are one run." in notes(runs)


# --- runs that were stopped, and records of any kind -----------------------------------------------------------------


class Interrupts(pl.Callback):
    """Ctrl-C within a step, or another end."""

    def __init__(self, error: str) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise {"Ctrl-C": KeyboardInterrupt(), "OSError": OSError("gone"), "SIGTERM": Stopped(15)}[self.error]


@pytest.mark.parametrize("by", ["Ctrl-C", "OSError", "SIGTERM"])
def test_a_stopped_run_says_where_and_its_checkpoint_goes_on_from_there(
    by: str, tiny: Path, pairs_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    saver = Checkpoints(save_on_exception=True)
    options = {"logger": CSVLogger(tmp_path, name=""), "callbacks": [RunRecord(), saver, Interrupts(by)]}
    module, data = build(tiny, pairs_folder, loss=DPO(0.5), batch_size=4)
    with pytest.raises((SystemExit, OSError)):
        make_trainer(tmp_path, max_steps=5, enable_checkpointing=True, **options).fit(module, data)
    folder = tmp_path / "version_0"
    told = record(folder)
    assert told["finished"] is None
    assert (told["stopped"]["step"], told["stopped"]["by"], told["facts"]["step"]) == (3, by, 3)
    run = read(folder)
    assert run.notes[0] == f"was interrupted at step 3 by {by}"
    assert run.seconds is not None
    assert "first batch: policy and reference differ" in caplog.text, "Lightning's lines are heard here"
    assert "was raised with message" not in caplog.text
    (saved,) = (folder / "checkpoints").glob("*.ckpt")
    assert f"to resume, run the same command with: --ckpt_path {saved}" in capfd.readouterr().out
    (session,) = torch.load(saved, weights_only=True)[SESSIONS]
    assert (session["step"], session["folder"], session["started"]) == (3, str(folder), told["started"])


def test_a_stopped_run_that_saves_nothing_says_where_too(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    module, data = build(tiny, pairs_folder, loss=DPO(0.5), batch_size=4)
    with pytest.raises(OSError, match="gone"):
        make_trainer(tmp_path, max_steps=5, callbacks=[RunRecord(), Interrupts("OSError")]).fit(module, data)
    told = record(tmp_path / "version_0")
    assert (told["stopped"]["step"], told["facts"]["step"], told["finished"]) == (3, 3, None)


def test_a_killed_run_leaves_the_step_of_its_last_checkpoint(tiny: Path, pairs_folder: Path, tmp_path: Path) -> None:
    class Killed(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                told.append(record(tmp_path / "version_0"))  # as a kill would leave it

    told: list[Any] = []
    saver = Checkpoints(every_n_train_steps=2)
    options = {"logger": CSVLogger(tmp_path, name=""), "callbacks": [RunRecord(), saver, Killed()]}
    module, data = build(tiny, pairs_folder, loss=DPO(0.5), batch_size=4)
    make_trainer(tmp_path, max_steps=4, enable_checkpointing=True, **options).fit(module, data)
    assert (told[0]["facts"]["step"], told[0]["finished"], told[0]["stopped"]) == (2, None, None)
    assert record(tmp_path / "version_0")["facts"]["step"] == 4


def test_a_checkpoint_that_tells_of_no_sessions_leaves_the_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n5,0.5\n")
    unknown = {"folder": None, "started": None, "from_step": 0, "step": 4, "seconds": None}
    times = {"started": "2026-01-01T10:00:00+0000", "finished": "2026-01-01T10:01:00+0000"}
    told = times | {"continues": {"checkpoint": "x.ckpt", "step": 4, "sessions": [unknown]}, "facts": {"step": 5}}
    (tmp_path / "run.json").write_text(json.dumps(told))
    run = read(tmp_path)
    assert run.notes == ["steps 1 to 4 are not shown: the checkpoint doesn't name its folder"]
    assert run.wall_time == ("1 of 2 sessions", 60.0)


@pytest.mark.parametrize(
    "continues", ["x", 3, [], {"sessions": "x"}, {"sessions": [3, None]}, {"sessions": [{"step": "x", "folder": 3}]}]
)
def test_any_record_of_sessions_is_read(continues: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"continues": continues, "stopped": continues}))
    headline([read(tmp_path)])
