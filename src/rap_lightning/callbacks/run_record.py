"""Write run.json, data_report.json and goal.json into a run's folder."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

import rap_lightning
from rap_lightning import provenance
from rap_lightning.atomic_write import atomic_file
from rap_lightning.callbacks.run_folder import run_folder, written_or_warned
from rap_lightning.callbacks.run_metadata import run_facts, seed
from rap_lightning.callbacks.run_sessions import SESSIONS, Sessions
from rap_lightning.callbacks.signals import Stopped
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.models.checkpoint.saved_policy import FACTS
from rap_lightning.module import PreferenceModule
from rap_lightning.training.guarded_loggers import lines_lost


class RunRecord(pl.Callback):
    """Writes where a run comes from, and what data it was trained on, into its folder.

    - ``run.json``: the origin (versions of all packages, the commit of the working directory and whether files differ
      from it, seeds, machine), the command, a line that repeats it, the peak memory of rank zero's process and device,
      what a model card says; what it resumed from, and whether it has finished or where it stopped (of a process that
      was killed, the step of its last checkpoint);
    - ``data_report.json``: rows read, kept, dropped, repaired and truncated, with reasons;
    - ``goal.json``: the goal template, with the numbers its scale was fitted to.

    Checkpoints hold what a model card says, so that ``export`` needs nothing else.
    """

    def __init__(self) -> None:
        self._origin: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._stopped: dict[str, Any] | None = None
        self._finished: str | None = None
        self._sessions = Sessions()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset the record of an earlier fit of the same trainer, before a checkpoint is read."""
        if stage == "fit":
            self._origin, self._facts, self._stopped, self._finished = {}, {}, None, None
            self._sessions = Sessions()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Record what this run resumes from."""
        self._sessions.resume(checkpoint, trainer.ckpt_path)

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the data report, the goal and the run's origin."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            reports = [report.as_dict() for parts in data.reports.values() for report in parts]
            _write(folder / "data_report.json", reports)
        if isinstance(pl_module, PreferenceModule) and (goal := pl_module.goal_record()) is not None:
            _write(folder / "goal.json", goal)
        self._origin = _origin(trainer, folder)
        self._sessions.begin(folder, self._origin["started"])
        self._facts = run_facts(trainer, pl_module)
        self._write_run(trainer)

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write and print what the run resumes from: only now every strategy has read its checkpoint."""
        if self._sessions.checkpoint is None:
            return
        self._facts = run_facts(trainer, pl_module)
        self._write_run(trainer)
        before, here = self._sessions.earlier[-1]["folder"] or self._sessions.checkpoint, run_folder(trainer)
        rank_zero_info(
            f"resuming from step {self._sessions.from_step} of {_near(before, Path.cwd())}; this session writes to "
            f"{here}, and `rap-lightning report {here}` shows the run from its beginning"
        )

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._facts = run_facts(trainer, pl_module)
        self._finished = _now()
        self._write_run(trainer)

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write that the run stopped, and at which step."""
        if trainer.state.fn != TrainerFn.FITTING or not self._origin:
            return
        self._stopped = {"at": _now(), "step": trainer.global_step, "by": _named(exception)}
        self._facts["step"] = trainer.global_step  # the other facts need all ranks
        self._write_run(trainer)

    def _write_run(self, trainer: pl.Trainer) -> None:
        ends = {"finished": self._finished, "stopped": self._stopped, "continues": self._sessions.record()}
        if lost := lines_lost(trainer.loggers):
            ends["log_lines_lost"] = lost
        run = {**self._origin, **ends, "facts": self._facts, "peak_memory": peak_memory()}
        path = run_folder(trainer) / "run.json"
        with written_or_warned(path):
            _write(path, run)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put what a model card says, and the sessions so far, into the checkpoint."""
        checkpoint[FACTS] = run_facts(trainer, pl_module)
        checkpoint[SESSIONS] = self._sessions.so_far(checkpoint["global_step"])
        if self._origin and trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            self._facts = checkpoint[FACTS]
            self._write_run(trainer)  # for a process that is killed later


def _named(exception: BaseException) -> str:
    """Return what stopped a run, in a word or two."""
    if isinstance(exception, KeyboardInterrupt):
        return "Ctrl-C"
    if isinstance(exception, Stopped):
        return signal.Signals(int(exception.code) - 128).name  # type: ignore[arg-type]
    return type(exception).__name__


def _near(path: str, here: Path) -> str:
    """Return a path relative to ``here``, if it is below."""
    place = Path(path)
    return str(place.relative_to(here)) if place.is_relative_to(here) else path


def _origin(trainer: pl.Trainer, folder: Path) -> dict[str, Any]:
    here = Path.cwd()
    program = "rap-lightning" if Path(sys.argv[0]).name in ("cli.py", "rap-lightning") else sys.argv[0]
    data = getattr(trainer, "datamodule", None)
    return {
        "started": _now(),
        "command": provenance.command_line([program, *sys.argv[1:]]),
        "repeat": _repeat(here, folder),
        "folder": str(here),
        "git": provenance.git_state(here),
        "rap_lightning_git": provenance.git_state(Path(rap_lightning.__file__).parent),
        "seed": seed(),
        "data_seed": getattr(data, "seed", None),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "threads": torch.get_num_threads(),
        "processes": trainer.world_size,
        "packages": provenance.packages(),
    }


def _repeat(here: Path, folder: Path) -> str | None:
    """Return a shell line that repeats the run; None without a config.yaml, which only the command line writes."""
    config = folder.resolve() / "config.yaml"
    if not config.is_file():
        return None
    line = f"{_launcher()}rap-lightning fit --config {shlex.quote(_near(str(config), here))}"
    return f"cd {shlex.quote(str(here))} && {line}"


def _launcher() -> str:
    """Return the torchrun call that started this process, or "": the command alone would wait for other ranks."""
    if not torch.distributed.is_torchelastic_launched():
        return ""
    nodes, processes = (int(os.environ.get(name, 1)) for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    how = "--standalone"
    if nodes > 1:
        address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        rank = '"${NODE_RANK:?on every node, from 0}"'
        how = f"--node_rank={rank} --master_addr={shlex.quote(address)} --master_port={shlex.quote(port)}"
    return f"torchrun --nnodes={nodes} --nproc_per_node={processes} {how} --no-python "


def peak_memory() -> dict[str, int]:
    """Return the peak memory of this process and its device in bytes, as far as the system reports it."""
    found = {}
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["host_bytes"] = peak if sys.platform == "darwin" else peak * 1024
    if torch.cuda.is_available():
        found["device_bytes"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _write(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
