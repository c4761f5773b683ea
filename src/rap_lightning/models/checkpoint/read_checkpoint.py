"""Reading checkpoints: plain values and tensors only, never pickled code.

In order of how much is read: :func:`refuse_unreadable` looks at names and ends, :func:`refuse_damaged` at every byte,
:func:`read_checkpoint` loads.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rap_lightning.errors import ConfigError, join_some
from rap_lightning.models.checkpoint.integrity import verify
from rap_lightning.models.checkpoint.sharded_folder import META, refuse_incomplete


def refuse_unreadable(path: Path) -> None:
    """Raise ConfigError where no checkpoint can be at ``path``: nothing there, or a file that is cut off or foreign.

    Raises:
        ConfigError: names another checkpoint beside it that can be used, if there is one.
    """
    try:
        _refuse_unreadable(path)
    except ConfigError as error:
        raise ConfigError(f"{error}{_another(path)}") from error


def refuse_damaged(path: Path) -> bool:
    """Raise ConfigError where :func:`refuse_unreadable` does, and where the content is not what was written.

    Returns:
        Whether that could be known: whether the checkpoint has checksums.
    """
    try:
        _refuse_unreadable(path)
        return verify(path)
    except ConfigError as error:
        raise ConfigError(f"{error}{_another(path)}") from error


def _refuse_unreadable(path: Path) -> None:
    if path.is_dir():
        refuse_incomplete(path)
    elif not path.is_file():
        gone = f"it points to {path.readlink()}, which is gone" if path.is_symlink() else "no such file"
        raise ConfigError(f"{path}: {gone}. Expected a .ckpt file that fit wrote.")
    elif not _is_archive(path):
        raise ConfigError(
            f"{path} can't be read as a checkpoint: it is cut off, or of another kind (for example, a pickle)."
        )


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # with impossible values at its end
        return False


def _another(path: Path) -> str:
    """Return a sentence that names the newest whole checkpoint beside one that can't be used, or ""."""
    for other in all_checkpoints(path.parent):
        try:
            if other.resolve() != path.resolve():
                _refuse_unreadable(other)
                verify(other)
                return f" The newest whole one there is {other}: use that instead."
        except ConfigError:
            continue
    return ""


def newest_whole(
    root: Path, fits: Callable[[Path], bool], say: Callable[[str], None], also: Sequence[Path] = ()
) -> Path | None:  # fmt: skip
    """Return the newest checkpoint below a folder that is whole, or None, and report those that are skipped.

    Args:
        root: a folder of runs.
        also: other folders, where a run's options put its checkpoints.
        fits: whether a checkpoint is of the run to resume; called for whole ones only.
        say: is called with which newer ones are skipped, and why.
    """
    others: list[Path] = []
    found = None
    for path in all_checkpoints(root, *also):
        try:
            _refuse_unreadable(path)
            verify(path)
            if fits(path):
                found = path
                break
            others.append(path)
        except ConfigError as error:
            say(f"skipping: {error}")
    if others:
        say(f"skipping, of runs with other model, data or seed_everything options than this one: {join_some(others)}")
    return found


def all_checkpoints(*roots: Path) -> list[Path]:
    """Return the checkpoints below folders, the newest first, damaged ones too."""
    below = [path for root in roots if root.is_dir() for path in root.rglob("*.ckpt") if not path.is_symlink()]
    found = {path.resolve(): path for path in reversed(below)}.values()  # one folder may be in another
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def run_key(path: Path) -> str | None:
    """Return ``PreferenceModule.run_key`` at the time a checkpoint was written; None where it isn't recorded."""
    return recorded(path).get("rap_lightning", {}).get("run_key")  # type: ignore[no-any-return]


def recorded(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds besides sharded tensors, read from disk when used; empty for a foreign file."""
    file = path / META if path.is_dir() else path
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return saved if isinstance(saved, dict) else {}
    except Exception:  # a foreign file fails with any type of error
        return {}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint file that fit wrote; its tensors are read from disk when they are used.

    Raises:
        ConfigError: it isn't there, can't be read, or isn't a checkpoint of rap-lightning.
    """
    refuse_damaged(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ConfigError(
            f"{path} is refused: it holds more than plain values and tensors, and unpickling it could run code. Use a "
            "checkpoint that fit wrote."
        ) from error
    except Exception as error:  # a foreign or broken file fails with any type of error
        raise ConfigError(f"{path} can't be read as a checkpoint: {type(error).__name__}") from error
    if not isinstance(saved, dict) or "rap_lightning" not in saved:
        raise ConfigError(f"{path} is not a checkpoint of rap-lightning.")
    return saved
