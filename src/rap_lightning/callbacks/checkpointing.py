"""Checkpoints that say how to go on from them, and that never stand in for one that could not be written."""

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

from rap_lightning.callbacks.checkpoint_io import SealedCheckpoints
from rap_lightning.distributed.consistency import require_shared_folder
from rap_lightning.errors import NotFinite, NotSaved
from rap_lightning.models.checkpoint.integrity import folder_digests, seal_folder, unseal_folder
from rap_lightning.models.digests import not_finite
from rap_lightning.module import PreferenceModule
from rap_lightning.strategies import writes_shards

ROOM = 64_000_000
"""Bytes that should be left on a disk beyond a checkpoint."""
BOOKS = (
    "best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path",
    "current_score", "_last_global_step_saved", "_last_checkpoint_saved",
)  # fmt: skip


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, for days on rented machines.

    A checkpoint that can't be written (a full disk) costs the run nothing: it says so and trains on, the checkpoints
    before stay, and the next one is tried. The last of a run is written to another disk then, and only where none has
    room does the run fail. Weights that are not finite are not written. When a run is interrupted it prints, after
    saving, what to go on from.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._doomed: list[str] = []
        self._unsaved = False
        self._bytes = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """As Lightning's; hosts that are to write one folder together must see the same one."""
        super().setup(trainer, pl_module, stage)
        saves = stage == "fit" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if saves and trainer.num_nodes > 1 and writes_shards(trainer.strategy):
            require_shared_folder(Path(str(self.dirpath)))

    # -- when a run ends ------------------------------------------------------------------------------------------

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save if so configured and worth it, then point to the newest checkpoint."""
        if why := self._not_worth_saving(trainer, pl_module, exception):
            if self.save_on_exception and trainer.global_step:
                rank_zero_warn(f"no checkpoint of this moment: {why}.")
        else:
            try:
                self._save_at(trainer)
            except NotFinite as problem:
                rank_zero_warn(str(problem))
            except NotSaved as problem:
                try:
                    self._rescue(trainer, problem)
                except NotSaved:
                    rank_zero_warn(str(problem))
        self._print_newest(trainer, exception)

    def _save_at(self, trainer: pl.Trainer) -> None:
        """What ModelCheckpoint.on_exception does, without its line; the newest checkpoint is pointed to in any case."""
        if self._should_save_on_exception(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_checkpoint(trainer, self.format_checkpoint_name(candidates))
            self._save_last_checkpoint(trainer, candidates)

    def _not_worth_saving(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> str:
        if not getattr(exception, "saves", True):
            return "its weights are not finite"
        if isinstance(module, PreferenceModule) and module.updating:
            return "the weights were being updated"
        if trainer.world_size > 1 and not getattr(exception, "on_all_ranks", False):
            return f"one rank's error ends the run, and saving takes all {trainer.world_size}"
        return ""

    @rank_zero_only
    def _print_newest(self, trainer: pl.Trainer, exception: BaseException) -> None:
        folder = Path(self.dirpath) if self.dirpath else None
        saved = [path for path in folder.glob("*.ckpt") if not path.is_symlink()] if folder else []
        if saved:
            newest = max(saved, key=lambda path: path.stat().st_mtime)
            print(f"to go on, run the same command with: --ckpt_path {newest}", flush=True)
        elif isinstance(exception, KeyboardInterrupt | SystemExit) and not trainer.global_step:
            print("there is no checkpoint to go on from: not one optimizer step was finished", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As Lightning's; what could not be written before is tried once more, and now must succeed."""
        super().on_train_end(trainer, pl_module)
        if self._unsaved:
            candidates = self._monitor_candidates(trainer)
            try:
                ModelCheckpoint._save_none_monitor_checkpoint(self, trainer, candidates)
                super()._save_last_checkpoint(trainer, candidates)
            except NotSaved as problem:
                self._rescue(trainer, problem)

    def _rescue(self, trainer: pl.Trainer, problem: NotSaved) -> None:
        """Write the last checkpoint of a run to another disk, where there is one with room.

        Raises:
            NotSaved: there is none.
        """
        name = Path(self.format_checkpoint_name(self._monitor_candidates(trainer))).name
        places = [Path(place) for place in (trainer.default_root_dir, Path.cwd(), tempfile.gettempdir())]
        wanted = [str(place / "rap-lightning-rescued" / f"{os.getpid()}-{name}") for place in places]
        room = [path for path in wanted if trainer.is_global_zero and not self._shortage(trainer, path)]
        for path in trainer.strategy.broadcast(room):
            try:
                self._save_checkpoint(trainer, path)
            except NotSaved:
                continue
            rank_zero_warn(f"{problem} The last checkpoint stands at {path} instead: give that as --ckpt_path.")
            return
        raise problem

    # -- writing --------------------------------------------------------------------------------------------------

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._training_on(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._unsaved and self.save_last == "link":
            return  # the link stays on the checkpoint that is there
        with self._training_on(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)
        # what "last" pointed to goes only now that it points elsewhere
        doomed, self._doomed = self._doomed, []
        for path in doomed:
            super()._remove_checkpoint(trainer, path)

    @contextmanager
    def _training_on(self, trainer: pl.Trainer) -> Iterator[None]:
        """Where writing fails during training, keep the books as they were, say so, and go on."""
        books = {name: getattr(self, name) for name in BOOKS}
        books["best_k_models"] = dict(self.best_k_models)
        try:
            yield
        except NotSaved as problem:
            vars(self).update(books)
            self._last_global_step_saved = trainer.global_step  # not again at this step
            self._unsaved = True
            newest = self._last_checkpoint_saved or "none yet"
            rank_zero_warn(
                f"{problem} Training goes on. The newest checkpoint is {newest}; the next is tried as usual."
            )

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        module = trainer.lightning_module
        if isinstance(module, PreferenceModule) and module.policy is not None:
            broken = not_finite(module.policy)
            if trainer.strategy.reduce_boolean_decision(bool(broken), all=False):
                error = NotFinite(
                    f"checkpoint {filepath} is not written: weights are not finite: {', '.join(broken[:3])} "
                    f"({len(broken)} parameters)."
                )
                error.saves, error.on_all_ranks = False, True
                raise error
        if shortage := trainer.strategy.broadcast(self._shortage(trainer, filepath)):
            raise NotSaved(shortage)
        if trainer.is_global_zero and Path(filepath).is_dir():
            unseal_folder(Path(filepath))
        io = trainer.strategy.checkpoint_io
        holding: AbstractContextManager[list[NotSaved]] = nullcontext([])
        if isinstance(io, SealedCheckpoints):
            holding = io.holding()
        with holding as problems:
            books = {name: getattr(self, name) for name in ("_last_global_step_saved", "_last_checkpoint_saved")}
            super()._save_checkpoint(trainer, filepath)
        if problem := trainer.strategy.broadcast(str(problems[0]) if problems else ""):
            vars(self).update(books)
            raise NotSaved(problem)
        if trainer.strategy.broadcast(Path(filepath).is_dir()):
            self._seal_folder(trainer, Path(filepath))
        if trainer.is_global_zero:
            self._bytes = _size(Path(filepath))
        self._unsaved = False

    @staticmethod
    def _seal_folder(trainer: pl.Trainer, folder: Path) -> None:
        digests: list[Any] = [folder_digests(folder, trainer.global_rank, trainer.world_size)]
        if trainer.world_size > 1:
            digests *= trainer.world_size
            torch.distributed.all_gather_object(digests, digests[0])
        if trainer.is_global_zero:
            seal_folder(folder, {name: digest for part in digests for name, digest in part.items()})
        trainer.strategy.barrier()

    def _shortage(self, trainer: pl.Trainer, filepath: str) -> str:
        """Why a checkpoint would not fit, as far as rank zero can tell before writing; "" where it would."""
        if not trainer.is_global_zero:
            return ""
        folder = next((p for p in (Path(filepath).parent, *Path(filepath).parents) if p.is_dir()), None)
        if folder is None:
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

    # -- names ----------------------------------------------------------------------------------------------------

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        link = self.last_model_path
        if self.save_last == "link" and link and os.path.realpath(link) == os.path.realpath(filepath):
            self._doomed.append(filepath)
        else:
            super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        """As Lightning's, but there is no moment without a link."""
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


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _expected_bytes(trainer: pl.Trainer) -> int:
    """What the first checkpoint should take: weights (without an adapter's base), optimizer and reference."""
    module = trainer.lightning_module
    adapts = isinstance(module, PreferenceModule) and module.policy_config.adapts
    tensors: list[torch.Tensor] = [p for p in module.parameters() if p.requires_grad or not adapts]
    for optimizer in trainer.optimizers:
        tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    if isinstance(module, PreferenceModule):
        tensors += module.reference.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
