"""Reading checkpoints: plain values and tensors only, never pickled code."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rap_lightning.errors import ConfigError, join_some
from rap_lightning.models.checkpoint.integrity import verify
from rap_lightning.models.checkpoint.sharded_files import refuse_incomplete


def refuse_unreadable(path: Path) -> None:
    """Raise ConfigError where no checkpoint can be at ``path``: nothing there, or a file that is cut off or foreign.

    A sharded checkpoint is a folder, with a list of what must be in it.
    """
    if path.is_dir():
        try:
            refuse_incomplete(path)
        except ConfigError as error:
            raise ConfigError(f"{error}{_another(path)}") from error
        return
    if not path.is_file():
        gone = f"it points to {path.readlink()}, which is gone" if path.is_symlink() else "no such file"
        raise ConfigError(f"{path}: {gone}. Expected a .ckpt file that fit wrote.{_another(path)}")
    if not _is_archive(path):
        raise ConfigError(
            f"{path} can't be read as a checkpoint: it is cut off, or of another kind (a pickle, say).{_another(path)}"
        )


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # whose end says something impossible
        return False


def refuse_damaged(path: Path) -> bool:
    """``refuse_unreadable``, and raise ConfigError where the content is not what was written, naming another.

    Returns whether that could be known: whether there is a digest of the content.
    """
    refuse_unreadable(path)
    try:
        return verify(path)
    except ConfigError as error:
        raise ConfigError(f"{error}{_another(path)}") from error


def newest_whole(root: Path, fits: Callable[[Path], bool], say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint below a folder that is whole, or None; each one passed over is said.

    Args:
        root: a folder of runs.
        fits: whether a checkpoint is of the run that is to go on; asked of whole ones only.
        say: is told which newer ones were passed over, and why.
    """
    others: list[Path] = []
    found = None
    for path in _checkpoints(root):
        try:
            refuse_unreadable(path)
            verify(path)
            if fits(path):
                found = path
                break
            others.append(path)
        except ConfigError as error:
            say(f"passed over: {error}")
    if others:
        say(
            f"passed over, of runs with other model, data or seed_everything options than this one: {join_some(others)}"
        )
    return found


def count(root: Path) -> int:
    """Checkpoints below a folder, whatever state they are in."""
    return len(_checkpoints(root))


def _checkpoints(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*.ckpt") if not path.is_symlink()] if root.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _another(path: Path) -> str:
    """A sentence that names the newest whole checkpoint beside one that can't be used, or ""."""
    for other in _checkpoints(path.parent):
        try:
            if other.resolve() == path.resolve():
                continue
            if other.is_dir():
                refuse_incomplete(other)
            if (other.is_dir() or _is_archive(other)) and verify(other):
                return f" The newest whole one there is {other}: give that instead."
        except ConfigError:
            continue
    return ""


def run_key(path: Path) -> str | None:
    """What ``PreferenceModule.run_key`` was when a checkpoint was written; None where it doesn't say."""
    file = path / "meta.pt" if path.is_dir() else path
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return saved.get("rap_lightning", {}).get("run_key")  # type: ignore[no-any-return]
    except Exception:  # a foreign file fails in whatever way its bytes happen to
        return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file that fit wrote; its tensors stay on disk until they are looked at.

    Raises:
        ConfigError: it isn't there, can't be read, or isn't one of ours.
    """
    refuse_damaged(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a foreign or broken file fails in whatever way its bytes happen to
        raise ConfigError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from error
    if not isinstance(saved, dict) or "rap_lightning" not in saved:
        raise ConfigError(f"{path} is not a checkpoint of rap-lightning.")
    return saved
