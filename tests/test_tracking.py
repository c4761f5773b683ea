"""Trackers beside metrics.csv: the run's folder is always there, each tracker gets what the run is, a resume goes on.

The packages of trackers aren't installed everywhere: what is the same for all is tested with a logger that records its
calls, and each tracker for real where its package is there.
"""

import csv
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger

import kills
from conftest import read_jsonl, run_command
from rap_lightning.callbacks import run_tracking
from rap_lightning.callbacks.trackers import BY_NAME, Continued, require_installed
from rap_lightning.cli import logger_options, trainer_cli
from rap_lightning.errors import ConfigError
from rap_lightning.training.guarded_loggers import guard_loggers, lines_lost

FAST = ("tree", "table", 0, "full")
RECORDER = """
import json, os, sys
from lightning.pytorch.loggers import Logger

class Recorder(Logger):
    \"\"\"Writes each call as a line to the file in RECORDED.\"\"\"

    def __init__(self, api_key: str | None = None, extra: dict | None = None, fails: tuple[str, ...] = ()):
        super().__init__()
        self.fails, self.calls = fails, []

    name, version, started = "recorder", "0", False

    def _note(self, what, *values):
        if what in self.fails:
            raise OSError(28, "No space left on device")
        with open(os.environ["RECORDED"], "a") as file:
            file.write(json.dumps([what, *values], default=str) + "\\n")

    def log_metrics(self, metrics, step=None):
        self._note("log_metrics", metrics, step)

    def log_hyperparams(self, params, *args, **kwargs):
        if not self.started:  # as W&B's begins with the first thing it logs
            self.started = True
            self._note("argv", sys.argv)
        self._note("log_hyperparams", params)

    def save(self):
        self._note("save")

    def finalize(self, status):
        self._note("finalize", status)

    def after_save_checkpoint(self, callback):
        self._note("after_save_checkpoint")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with my_recorder.py in it."""
    (tmp_path / "my_recorder.py").write_text(RECORDER)
    monkeypatch.setenv("RECORDED", str(tmp_path / "recorded.jsonl"))
    return tmp_path


def fit(world: Path, here: Path, *options: str, steps: int = 2) -> Any:
    arguments = kills.arguments(world, Path("runs"), FAST, steps=steps)
    return run_command(*arguments, "--trainer.log_every_n_steps", "1", *options, cwd=here)


def recorded(here: Path, what: str) -> list[Any]:
    lines = read_jsonl(here / "recorded.jsonl")
    return [values for name, *values in lines if name == what]


def steps_of(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["loss"]]


@pytest.mark.parametrize(
    "logger",
    [pytest.param("true", marks=pytest.mark.slow), "false", "my_recorder.Recorder",
     "[{class_path: my_recorder.Recorder}, {class_path: CSVLogger, init_args: {save_dir: runs, name: ''}}]"],
)  # fmt: skip
def test_a_run_has_its_folder_whatever_loggers_are_named(logger: str, world: Path, here: Path) -> None:
    done = fit(world, here, "--trainer.logger", logger)
    assert done.returncode == 0, done.stderr
    first = here / "runs" / "version_0"
    files = {"config.yaml", "run.json", "goal.json", "data_report.json", "metrics.csv", "checkpoints", "hparams.yaml"}
    assert files == {path.name for path in first.iterdir()}
    assert {path.name for path in here.iterdir()} <= {"my_recorder.py", "recorded.jsonl", "runs", "__pycache__"}
    assert steps_of(first) == [1, 2]
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    done = fit(world, here, "--trainer.logger", logger, steps=3)
    assert done.returncode == 0, done.stderr
    assert "last: runs/version_0/checkpoints/epoch=0-step=2.ckpt" in done.stderr
    assert steps_of(here / "runs" / "version_1") == [3]
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    "elsewhere",
    [["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"], ["--checkpoint.dirpath", "saved"]],
)
def test_last_is_found_where_the_options_put_checkpoints(elsewhere: list[str], world: Path, here: Path) -> None:
    for steps in (1, 2):
        done = fit(world, here, *elsewhere, steps=steps)
        assert done.returncode == 0, done.stderr
    assert f"last: {elsewhere[-1]}/" in done.stderr
    folder = here / "logs/lightning_logs/version_1" if "logs" in elsewhere else here / "runs/version_1"
    assert steps_of(folder) == [2]


def test_every_logger_gets_options_data_report_and_goal_scale_and_no_secret(world: Path, here: Path) -> None:
    secret = ["--trainer.logger.api_key", "mykey", "--trainer.logger.extra", '{"a": {"token": "t0p"}, "b": 1}']
    done = fit(world, here, "--trainer.logger", "my_recorder.Recorder", *secret)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = {}
    for (one,) in recorded(here, "log_hyperparams"):
        values |= one
    assert values["data.batch_size"] == 4
    assert values["trainer.max_steps"] == 2
    assert values["model.policy.path"] == str(world / "base")
    report = json.loads((here / "runs/version_0/data_report.json").read_text())
    assert values["data_report.train.pairs_kept"] == report[0]["pairs_kept"] > 0
    assert (values["goal.scale.low"], values["goal.scale.high"]) == (1.0, 10.0)
    metrics = recorded(here, "log_metrics")
    assert [step for line, step in metrics if "loss" in line] == [1, 2]
    written = "".join(p.read_text() for p in (here / "runs/version_0").iterdir() if p.is_file())
    for text in (written, (here / "recorded.jsonl").read_text(), done.stdout + done.stderr):
        assert "mykey" not in text
        assert "t0p" not in text
    config = yaml.safe_load((here / "runs/version_0/config.yaml").read_text())
    assert config["trainer"]["logger"]["init_args"]["api_key"] == "***"
    assert config["trainer"]["logger"]["init_args"]["extra"] == {"a": {"token": "***"}, "b": 1}


def test_a_logger_that_starts_sees_no_key_on_the_command_line(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B and Comet record ``sys.argv``, which no option of theirs masks."""
    given = [
        "rap-lightning",
        "fit",
        "--judge.api_key",
        "k3y",
        "--trainer.logger.api_key=mykey",
        "--x",
        "sk-abcdefgh1234567",
    ]
    monkeypatch.setattr(sys, "argv", given)
    done = fit(world, here, "--trainer.logger", "my_recorder.Recorder", "--trainer.logger.api_key", "mykey")
    assert done.returncode == 0, done.stderr
    seen = recorded(here, "argv")
    assert seen == [[["rap-lightning", "fit", "--judge.api_key", "***", "--trainer.logger.api_key=***", "--x", "***"]]]
    assert sys.argv is given


def test_a_logger_may_have_no_options() -> None:
    logger = Namespace(class_path="lightning.pytorch.loggers.logger.DummyLogger")
    logger_options.take_secrets_from_environment(Namespace(trainer=Namespace(logger=logger)), print)


def test_a_saved_config_takes_keys_from_the_environment_or_again(world: Path, here: Path) -> None:
    assert fit(world, here, "--trainer.logger", "my_recorder.Recorder", "--trainer.logger.api_key", "k").returncode == 0
    config = ["fit", "--config", "runs/version_0/config.yaml", "--trainer.max_steps", "3", "--ckpt_path", "last"]
    done = run_command(*config, cwd=here)
    assert done.returncode == 0, done.stderr
    assert "api_key of Recorder is not in the saved config" in done.stderr
    assert steps_of(here / "runs" / "version_1") == [3]
    path = here / "runs/version_0/config.yaml"
    text = path.read_text()
    assert "extra: null" in text
    path.write_text(text.replace("extra: null", "extra: {token: '***'}"))
    done = run_command(*config, cwd=here)
    assert done.returncode == 2
    assert "trainer.logger.extra.token is *** in the config" in done.stderr
    again = ["--trainer.logger.extra", "{token: t}", "--trainer.max_steps", "4"]
    assert run_command(*config, *again, cwd=here).returncode == 0


@pytest.mark.parametrize(
    "fails",
    ["log_metrics", *(pytest.param(f, marks=pytest.mark.slow) for f in ("save", "finalize", "after_save_checkpoint"))],
)
def test_a_logger_that_fails_ends_no_run(fails: str, world: Path, here: Path) -> None:
    option = json.dumps([fails])
    with pytest.warns(UserWarning, match=r"Recorder can't log: OSError: .*No space left") as warned:
        done = fit(world, here, "--trainer.logger", "my_recorder.Recorder", "--trainer.logger.fails", option, steps=3)
    assert done.returncode == 0, done.stderr
    assert sum("can't log" in str(one.message) for one in warned) == 1
    assert steps_of(here / "runs/version_0") == [1, 2, 3]
    assert (here / "runs/version_0/checkpoints/last.ckpt").is_file()
    run = json.loads((here / "runs/version_0/run.json").read_text())
    assert run.get("log_lines_lost") == ({"Recorder": 3} if fails == "log_metrics" else None)


def test_a_missing_package_and_a_mistyped_tracker_are_said_with_what_to_do(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    (here / "wandb").mkdir()  # as runs of W&B leave behind: no package
    monkeypatch.setattr(
        "rap_lightning.callbacks.trackers.find_spec",
        lambda name: None if name in ("mlflow", "tensorboard", "tensorboardX", "comet_ml") else found(name),
    )
    names = ["mlflow", "tensorboard", "comet"] + ([] if _installed("wandb") else ["wandb"])
    for name in names:
        done = fit(world, here, "--track", name)
        assert done.returncode == 2
        assert f"--track {name} needs the package" in done.stderr
        assert f"pip install 'rap-lightning[{name}]'" in done.stderr
    for given in ("MLFlowLogger", "[{class_path: TensorBoardLogger, init_args: {save_dir: runs}}]"):
        done = fit(world, here, "--trainer.logger", given)
        assert done.returncode == 2
        assert "needs the package" in done.stderr
    done = fit(world, here, "--track", "wndb")
    assert done.returncode == 2
    assert "wandb" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (here / "runs").exists()


def _installed(name: str) -> bool:
    return (spec := importlib.util.find_spec(name)) is not None and spec.origin is not None


def test_a_folder_named_like_a_package_is_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "comet_ml").mkdir()
    monkeypatch.syspath_prepend(str(here))
    if not _installed("comet_ml"):
        with pytest.raises(ConfigError, match="comet_ml, which isn't installed"):
            require_installed(BY_NAME["comet"], "--track comet")


def test_track_is_repeatable_and_adds_to_a_config() -> None:
    args = ["--track", "wandb", "--track=mlflow", "--track", "[comet]", "--track=[comet]", "--data.x", "--track"]
    assert logger_options.make_track_repeatable(args) == [
        "--track+", "wandb", "--track+=mlflow", "--track", "[comet]", "--track=[comet]", "--data.x", "--track"
    ]  # fmt: skip


def test_a_logger_of_ones_own_continues_its_run_and_keeps_its_options() -> None:
    records = [
        {"tracker": "wandb", "id": "first", "project": "p"}, {"tracker": "wandb", "id": "second", "project": "p"},
        {"tracker": "mlflow", "run_id": "run"},
    ]  # fmt: skip
    continued = Continued(records, step=4)
    loggers = [
        Namespace(class_path="lightning.pytorch.loggers.WandbLogger", init_args=Namespace(id=None, project="mine")),
        Namespace(class_path="WandbLogger", init_args=Namespace(id="given", project=None)),
        Namespace(class_path="MLFlowLogger", init_args=Namespace(run_id=None, tracking_uri="http://host")),
        Namespace(class_path="CSVLogger", init_args=Namespace(version=None)),
    ]
    for logger in loggers:
        logger_options.continue_tracked(logger, continued)
    assert [vars(logger.init_args) for logger in loggers] == [
        {"id": "first", "project": "mine"}, {"id": "given", "project": "p"}, {"run_id": "run", "tracking_uri": "http://host"},
        {"version": None},
    ]  # fmt: skip
    assert continued.take(BY_NAME["mlflow"]) == {}, "each is continued once"


@pytest.mark.parametrize("uri", [None, "file:./mlruns", "./mlruns", "/tmp/mlruns"])
def test_the_file_store_of_mlflow_is_refused(uri: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    logger = Namespace(class_path="MLFlowLogger", init_args=Namespace(run_id=None, tracking_uri=uri))
    with pytest.raises(ConfigError, match=r"file store .* can't hold both"):
        logger_options.continue_tracked(logger, Continued())


def test_a_tracked_run_whose_files_are_gone_is_begun_anew(tmp_path: Path) -> None:
    gone = [
        {"tracker": "mlflow", "run_id": "x", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
        {"tracker": "tensorboard", "save_dir": str(tmp_path / "gone"), "name": "tensorboard", "version": ""},
    ]
    assert Continued(gone).take(BY_NAME["mlflow"]) == Continued(gone).take(BY_NAME["tensorboard"]) == {}
    there = [{**gone[1], "save_dir": str(tmp_path)}]
    assert Continued(there, step=4).take(BY_NAME["tensorboard"])["purge_step"] == 5


def test_the_key_of_a_run_is_the_same_in_every_process(world: Path) -> None:
    """The default optimizer is a function, whose text has its address."""

    def other(params: Any) -> Any: ...

    keys = set()
    for _ in range(2):
        same = FunctionType(other.__code__, {}, "adamw")
        options = Namespace(model=Namespace(optimizer=same), data=Namespace(source="x"), seed_everything=1)
        keys.add(trainer_cli.run_key_of(options))
    assert len(keys) == 1


def save_line(logger: CSVLogger, metrics: dict[str, float], step: int) -> None:
    logger.log_metrics(metrics, step=step)
    logger.save()


def test_metrics_csv_keeps_every_line_through_a_full_disk(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    guard_loggers([logger])
    path = tmp_path / "metrics.csv"
    save_line(logger, {"loss": 0.5}, 1)
    whole = path.read_bytes()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 2, before[1]))
    try:
        with pytest.warns(UserWarning, match=r"CSVLogger can't log: .*kept and written"):
            save_line(logger, {"loss": 0.25}, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_line(logger, {"loss": 0.25}, 3)
            assert path.read_bytes() == whole, "no part of a line"
            save_line(logger, {"loss": 0.25, "val/loss": 2.0}, 4)  # the header is written again
        assert path.read_bytes() == whole
        assert lines_lost([logger]) == {"CSVLogger": 3}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    logger.finalize("success")
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert lines_lost([logger]) == {}


def test_every_upload_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        name, takes_folders = "full", True

        def log_folder(self, logger: Any, folder: Path) -> None:
            raise OSError("No space left on device")

    monkeypatch.setattr(run_tracking, "tracker_of", lambda logger: Full())
    trainer: Any = SimpleNamespace(loggers=[object()])
    for folder in ("hf", "hf-merged"):
        with pytest.warns(UserWarning, match=f"{folder} was not sent to full: OSError: No space left on device"):
            run_tracking.log_folder(trainer, tmp_path / folder)


FILLER = """
import os
from lightning.pytorch import Callback

class Filler(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 2:
            with open(os.environ["FILL"], "ab") as file:
                try:
                    while True:
                        os.write(file.fileno(), b"0" * 4096)
                except OSError:
                    pass

def judge(prompt: str, response: str) -> float:
    return float(len(response))
"""


@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0, reason="a small disk takes root to make")
def test_a_disk_at_zero_bytes_ends_no_run_and_the_last_checkpoint_is_rescued(
    world: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "my_filler.py").write_text(FILLER)
    disk = here / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    monkeypatch.setenv("FILL", str(disk / "filler"))
    samples = "{class_path: GoalSamples, init_args: {judge: my_filler.judge, every_n_steps: 1, prompts: 1, goals: [9]}}"
    steering = "{class_path: SteeringTable, init_args: {judge: my_filler.judge, goals: [1, 9], samples: 2}}"
    callbacks = f"[{{class_path: my_filler.Filler}}, {samples}, {steering}]"
    options = ["--trainer.callbacks", callbacks, "--trainer.default_root_dir", str(disk)]
    options += ["--model.generation.max_new_tokens", "4"]
    try:
        with pytest.warns(UserWarning, match="CSVLogger can't log"):
            done = fit(world, here, *options, steps=4)
        assert "Traceback" not in done.stderr
        assert done.returncode == 0, done.stderr[-2000:]
        (rescued,) = here.glob("rap-lightning-rescued/*step=4.ckpt")
        saved = {path.name for path in (disk / "version_0/checkpoints").glob("*.ckpt")}
        assert saved == {"epoch=0-step=2.ckpt", "last.ckpt"}
        assert (disk / "version_0/checkpoints/last.ckpt").resolve().name == "epoch=0-step=2.ckpt"
        for line in (disk / "version_0/samples.jsonl").read_text().splitlines():
            json.loads(line)
        (disk / "filler").unlink()
        more = fit(world, here, *options, "--ckpt_path", str(rescued), "--trainer.callbacks", "[]", steps=5)
        assert more.returncode == 0, more.stderr[-2000:]
        assert steps_of(disk / "version_1") == [5]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# -- each tracker for real ------------------------------------------------------------------------------------------


def test_tensorboard_continues_in_its_folder_without_repeated_steps(world: Path, here: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (2, 3):
        done = fit(world, here, "--track", "tensorboard", steps=steps)
        assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(here / "runs/version_0/tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2, 3]
    assert "data_report/text_summary" in events.Tags()["tensors"]
    assert not (here / "runs/version_1/tensorboard").exists()


def test_mlflow_continues_in_its_database(world: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for steps in (2, 3):
        done = fit(world, here, "--track", "mlflow", steps=steps)
        assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{here}/runs/version_0/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == "rap-lightning"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert [one.step for one in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
    assert run.data.params["trainer.max_steps"] == "2"
    assert run.info.run_name == "runs/version_0"
    assert client.get_metric_history(run.info.run_id, "loss/chosen-goal")
    done = fit(world, here, "--trainer.logger", "MLFlowLogger", "--trainer.default_root_dir", "another")
    assert done.returncode == 2
    assert "file store" in done.stderr


def test_wandb_offline_continues_under_its_id(world: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (2, 3):
        done = fit(world, here, "--track", "wandb", steps=steps)
        assert done.returncode == 0, done.stderr
        wandb.finish()  # as at the end of a process
    ids = [path.name.rpartition("-")[2] for path in here.glob("runs/version_*/wandb/offline-run-*")]
    assert len(ids) == 2
    assert len(set(ids)) == 1
