"""ModelCheckpoint for long runs: a checkpoint that can't be written doesn't end the run or replace an earlier one.

:meth:`Checkpoints._save_checkpoint` is what every save goes through. Around it, ``_save_topk_checkpoint`` and
``_save_last_checkpoint`` continue training where it failed; ``on_train_end`` and ``on_exception`` try harder.

Lightning has no public hooks between "a checkpoint is due" and "it is written", so these protected methods of
ModelCheckpoint are overridden, and ``_last_global_step_saved`` and ``_last_checkpoint_saved`` are reset after a
failure. Last checked with Lightning 2.6.6.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from rap_lightning.callbacks.checkpoint_io import AtomicCheckpointIO
from rap_lightning.distributed.consistency import require_shared_folder
from rap_lightning.errors import NotFinite, NotSaved
from rap_lightning.models.checkpoint.integrity import mark_incomplete, write_index_checksum
from rap_lightning.models.digests import not_finite
from rap_lightning.module import PreferenceModule
from rap_lightning.strategies import writes_shards

ROOM = 64_000_000
"""Bytes that should be left on a disk beyond a checkpoint."""


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, made for days on rented machines.

    A checkpoint that can't be written (a full disk) costs the run nothing: it warns and trains on, earlier checkpoints
    stay, and the next one is tried. The last one of a run is then written to another disk, and only where none has room
    does the run fail. Weights that are not finite are not written. When a run is interrupted it prints, after saving,
    the checkpoint to resume from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._to_remove: list[str] = []
        self._saved_step = self._failed_step = 0  # the last ones
        self._bytes = 0  # of the last checkpoint

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that hosts which write one folder together see the same folder."""
        super().setup(trainer, pl_module, stage)
        saves = stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if saves and trainer.num_nodes > 1 and writes_shards(trainer.strategy):
            require_shared_folder(Path(str(self.dirpath)))

    # -- when a run ends ------------------------------------------------------------------------------------------

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save if configured and possible, then print the newest checkpoint."""
        if self.save_on_exception and trainer.global_step and not trainer.sanity_checking:
            if why := self._not_worth_saving(trainer, pl_module, exception):
                rank_zero_warn(f"no checkpoint of this step: {why}.")
            elif self._saved_step != trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                try:
                    self._save_or_rescue(trainer)
                except (NotFinite, NotSaved) as problem:
                    rank_zero_warn(str(problem))
        self._print_newest(trainer, exception)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Try once more to write what could not be written before; now it must succeed."""
        super().on_train_end(trainer, pl_module)
        if self._failed_step:
            self._save_or_rescue(trainer)

    @staticmethod
    def _not_worth_saving(trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> str:
        if not getattr(exception, "saves", True):
            return "its weights are not finite"
        if isinstance(module, PreferenceModule) and module.updating:
            return "the weights were being updated"
        if trainer.world_size > 1 and not getattr(exception, "on_all_ranks", False):
            return f"one rank's error ends the run, and saving takes all {trainer.world_size}"
        return ""

    def _save_or_rescue(self, trainer: pl.Trainer) -> None:
        """Write the last checkpoint of a run, on another disk where its own has no room.

        Raises:
            NotSaved: no disk has room.
        """
        path = self.format_checkpoint_name(_metrics(trainer))
        try:
            self._save_checkpoint(trainer, path)
            ModelCheckpoint._save_last_checkpoint(self, trainer, _metrics(trainer))
            return
        except NotSaved as error:
            problem = error
        places = [Path(place) for place in (trainer.default_root_dir, Path.cwd(), tempfile.gettempdir())]
        wanted = [str(place / "rap-lightning-rescued" / f"{os.getpid()}-{Path(path).name}") for place in places]
        room = [path for path in wanted if trainer.is_global_zero and not self._shortage(trainer, path)]
        for path in trainer.strategy.broadcast(room):
            try:
                self._save_checkpoint(trainer, path)
            except NotSaved:
                continue
            rank_zero_warn(f"{problem} The last checkpoint is {path} instead: give that as --ckpt_path.")
            return
        raise problem

    @rank_zero_only
    def _print_newest(self, trainer: pl.Trainer, exception: BaseException) -> None:
        folder = Path(self.dirpath) if self.dirpath else None
        saved = [path for path in folder.glob("*.ckpt") if not path.is_symlink()] if folder else []
        if saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime)
            print(f"to resume, run the same command with: --ckpt_path {newest}", flush=True)
        elif isinstance(exception, KeyboardInterrupt | SystemExit) and not trainer.global_step:
            print("there is no checkpoint to resume from: no optimizer step was finished", flush=True)

    # -- during training ------------------------------------------------------------------------------------------

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._continue_training(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._failed_step == trainer.global_step:
            return  # "last" stays at the checkpoint before
        with self._continue_training(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)
        # what "last" pointed to is removed only now that it points elsewhere
        paths, self._to_remove = self._to_remove, []
        for path in paths:
            super()._remove_checkpoint(trainer, path)

    def _should_skip_saving_checkpoint(self, trainer: pl.Trainer) -> bool:
        """Try a step once: ModelCheckpoint asks several times at one step."""
        return self._failed_step == trainer.global_step or super()._should_skip_saving_checkpoint(trainer)

    @contextmanager
    def _continue_training(self, trainer: pl.Trainer) -> Iterator[None]:
        """Where writing fails, restore the record of what is saved, warn, and continue."""
        record = self.state_dict() | {"best_k_models": dict(self.best_k_models)}
        try:
            yield
        except NotSaved as problem:
            self.load_state_dict(record)
            self._failed_step = trainer.global_step
            newest = self._last_checkpoint_saved or "none yet"
            rank_zero_warn(
                f"{problem} Training continues. The newest checkpoint is {newest}; the next is tried as usual."
            )

    # -- writing --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write a checkpoint.

        Raises:
            NotFinite: the weights are not; on all ranks.
            NotSaved: there is no room, or writing failed; on all ranks.
        """
        self._refuse_non_finite(trainer, filepath)
        if shortage := trainer.strategy.broadcast(self._shortage(trainer, filepath)):
            raise NotSaved(shortage)
        path, io = Path(filepath), trainer.strategy.checkpoint_io
        if trainer.is_global_zero and path.is_dir():
            mark_incomplete(path)
        collecting: AbstractContextManager[list[NotSaved]] = nullcontext([])
        if isinstance(io, AtomicCheckpointIO):
            collecting = io.collecting_failures()
        before = self._last_global_step_saved, self._last_checkpoint_saved
        with collecting as problems:
            super()._save_checkpoint(trainer, filepath)
        if problem := trainer.strategy.broadcast(str(problems[0]) if problems else ""):
            self._last_global_step_saved, self._last_checkpoint_saved = before
            raise NotSaved(problem)
        if trainer.is_global_zero:
            if path.is_dir():
                write_index_checksum(path)
            files = path.rglob("*") if path.is_dir() else [path]
            self._bytes = sum(file.stat().st_size for file in files if file.is_file())
        self._saved_step, self._failed_step = trainer.global_step, 0

    @staticmethod
    def _refuse_non_finite(trainer: pl.Trainer, filepath: str) -> None:
        module = trainer.lightning_module
        if not isinstance(module, PreferenceModule) or module.policy is None:
            return
        broken = not_finite(module.policy, trained=True)
        if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
            error = NotFinite(
                f"checkpoint {filepath} is not written: weights are not finite: {', '.join(broken[:3])} "
                f"({len(broken)} parameters)."
            )
            error.saves, error.on_all_ranks = False, True
            raise error

    def _shortage(self, trainer: pl.Trainer, filepath: str) -> str:
        """Return why a checkpoint would not fit, as far as rank zero can tell before writing; "" where it would."""
        folder = next((p for p in (Path(filepath).parent, *Path(filepath).parents) if p.is_dir()), None)
        if not trainer.is_global_zero or folder is None:
            return ""
        needed = self._bytes or _expected_bytes(trainer)
        free = shutil.disk_usage(folder).free
        if free >= needed + min(ROOM, needed):
            return ""
        return (
            f"checkpoint {filepath} was not written: it takes about {needed / 1e6:,.0f} MB, and {folder} has "
            f"{free / 1e6:,.0f} MB left (room for as much again is kept, at most {ROOM / 1e6:,.0f} MB). Make room "
            "there, or write elsewhere with --checkpoint.dirpath."
        )

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        link = self.last_model_path
        if self.save_last == "link" and link and os.path.realpath(link) == os.path.realpath(filepath):
            self._to_remove.append(filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link atomically: Lightning removes it first, and a kill in between leaves none."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            if os.path.isdir(linkpath) and not os.path.islink(linkpath):
                shutil.rmtree(linkpath)
            partial = f"{linkpath}.partial"
            try:
                if os.path.lexists(partial):
                    os.remove(partial)
                os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), partial)
                os.replace(partial, linkpath)
            except OSError:  # a file system without links
                ModelCheckpoint._link_checkpoint(trainer, filepath, linkpath)
                return
        trainer.strategy.barrier()


def _metrics(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what a checkpoint's name can hold."""
    counts = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
    return dict(trainer.callback_metrics) | counts


def _expected_bytes(trainer: pl.Trainer) -> int:
    """Return the size of the first checkpoint: weights (without an adapter's base), optimizer and reference."""
    module = trainer.lightning_module
    adapts = isinstance(module, PreferenceModule) and module.policy_config.adapts
    tensors: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad or not adapts]
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if isinstance(module, PreferenceModule):
        tensors += module.reference.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
