"""What a run leaves beside its metrics."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

import rap_lightning
from rap_lightning import provenance
from rap_lightning.callbacks.facts import run_facts, seed
from rap_lightning.callbacks.folders import run_folder
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.models.saved import FACTS


class RunRecord(pl.Callback):
    """Writes what a run comes from, and what it was fed, into its folder.

    - ``run.json``: where the run comes from (versions of all packages, the commit of the folder it was started in and
      whether files differ from it, seeds, machine), the command, a line that repeats it, the highest memory of rank
      zero's process and device, and what a model card says;
    - ``data_report.json``: rows read, kept, dropped, repaired and truncated, with reasons;
    - ``goal.json``: the goal template, with the numbers its scale was fitted to.

    Checkpoints carry what a model card says, so that ``export`` needs nothing else.
    """

    def __init__(self) -> None:
        self._origin: dict[str, Any] = {}

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the report of the data that are about to be trained on, and where the run comes from."""
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule):
            reports = [report.as_dict() for parts in data.reports.values() for report in parts]
            _write(folder / "data_report.json", reports)
            if data.goal is not None:
                _write(folder / "goal.json", data.goal.record())
        self._origin = _origin(trainer, folder)
        self._write_run(trainer, pl_module, finished=None)

    @rank_zero_only
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures the run ended with."""
        self._write_run(trainer, pl_module, finished=_now())

    def _write_run(self, trainer: pl.Trainer, module: pl.LightningModule, finished: str | None) -> None:
        run = {**self._origin, "finished": finished, "facts": run_facts(trainer, module)}
        run["peak_memory"] = peak_memory()
        _write(run_folder(trainer) / "run.json", run)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the checkpoint say what the model card will."""
        checkpoint[FACTS] = run_facts(trainer, pl_module)


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
    """A shell line that does the same again; only the command line leaves a config to do it from."""
    config = folder.resolve() / "config.yaml"
    if not config.is_file():
        return None
    shown = os.path.relpath(config, here) if config.is_relative_to(here) else str(config)
    return f"cd {shlex.quote(str(here))} && {_launcher()}rap-lightning fit --config {shlex.quote(shown)}"


def _launcher() -> str:
    """What torchrun was started with, where it started this process: the command alone would wait for other ranks."""
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
    """Bytes that this process and its device held at their highest; what the system doesn't tell is left out."""
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
    """The file is there when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
