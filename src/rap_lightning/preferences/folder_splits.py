"""Which files of a local folder are read, and for which split.

The rules for splits are those of the datasets library, which looks at names only. What it leaves out is not lost
silently: rows of another kind, and files that are named after a split, are refused; others are named in a warning.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from rap_lightning.errors import DataError, join_some
from rap_lightning.preferences.readers import kind_of

PLAIN = re.compile(r"[\w/ .,+=@()~-]*")
"""Paths in which datasets sees no pattern, chain of URLs, or protocol."""
SPLIT_WORD = re.compile(
    r"(?i)(?:^|[-._ 0-9/])(?:train|training|validation|valid|dev|val|test|testing|eval|evaluation)(?=[-._ 0-9/])"
)
"""The words by which datasets finds splits in names of files and folders."""
DOCUMENTS = re.compile(r"(?i).*\.(?:md|ya?ml)|license.*|dataset_infos?\.json|config\.json|world\.json|.*\.lock")
"""Names of files that are never rows."""
MODEL_SUFFIXES = {".json", ".jinja", ".safetensors", ".bin", ".model", ".txt"}  # beside a config.json


def is_plain(path: Path) -> bool:
    """Return whether datasets takes a path literally."""
    return PLAIN.fullmatch(str(path)) is not None


def files_in(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield the path inside a folder and the modification time of each file, symlinked folders included."""
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name != ".git")
        if (real := os.path.realpath(root)) in seen:  # a symlink to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            path = os.path.join(root, name)
            yield os.path.relpath(path, folder), os.lstat(path).st_mtime_ns


@cache  # the data module asks seven times, and datasets takes 10 ms for a folder
def splits_in_folder(folder: Path, listing: tuple[tuple[str, int], ...]) -> dict[str, list[str]]:
    """Return the files of each split; a changed ``listing`` makes it look again.

    Raises:
        DataError: a file with rows, or one that is named after a split, is in no split.
    """
    names = [name for name, _ in listing]
    if is_plain(folder):
        splits = _by_datasets(folder)
    else:
        with TemporaryDirectory() as mirror:  # the same names in a folder that is no pattern
            for name in names:
                link, parent = Path(mirror, name), (folder / name).parent
                if parent == parent.resolve():  # datasets does not follow symlinks to folders
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(folder / name)
            base = Path(mirror).resolve()
            splits = {
                split: [str(folder / Path(file).relative_to(base)) for file in files]
                for split, files in _by_datasets(base).items()
            }
    _check_left_out(folder, names, splits)
    return splits


def _by_datasets(folder: Path) -> dict[str, list[str]]:
    import datasets

    files = datasets.load_dataset_builder(str(folder)).config.data_files
    return {str(name): [str(file) for file in names] for name, names in (files or {}).items()}


def _check_left_out(folder: Path, names: Sequence[str], splits: Mapping[str, Sequence[str]]) -> None:
    """Refuse or name the files of a folder that are in no split."""
    read = {os.path.relpath(file, folder) for files in splits.values() for file in files}
    models = {PurePath(name).parent for name in names if PurePath(name).name == "config.json"}
    left_out = [name for name in sorted(names) if name not in read and not _is_document(PurePath(name), models)]
    hidden = [name for name in left_out if any(part.startswith((".", "__")) for part in PurePath(name).parts)]
    chosen_by_card = re.search(r"(?m)^configs:", _card(folder)) is not None
    refused = [name for name in left_out if name not in hidden and not chosen_by_card and _has_rows(name, read)]
    if refused:
        raise DataError(
            f"{folder} has files that would be left out: {_listed(refused)}; read would be {_listed(sorted(read))}. "
            "A folder should contain files of one kind, named after their split (train-1.jsonl, test.jsonl): convert "
            "or move the others, or list the files one by one as sources."
        )
    if named := [name for name in left_out if name not in hidden or kind_of(name)]:
        warnings.warn(f"{folder}: in no split, so not read: {_listed(named)}", stacklevel=2)


def _is_document(name: PurePath, models: set[PurePath]) -> bool:
    return DOCUMENTS.fullmatch(name.name) is not None or (name.suffix in MODEL_SUFFIXES and name.parent in models)


def _has_rows(name: str, read: set[str]) -> bool:
    """Return whether a file looks like rows of a split: by its name, or because it is of another kind than the others.

    A .json file that is not named after a split may be anything.
    """
    kind, suffixes = kind_of(name), [suffix.lower() for suffix in PurePath(name).suffixes]
    if kind is None and not {".csv", ".tsv"} & set(suffixes):
        return False
    others = kind not in {kind_of(file) for file in read} and ".json" not in suffixes
    return others or SPLIT_WORD.search(name) is not None


def _card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _listed(names: Sequence[str]) -> str:
    return join_some([ascii(name)[1:-1] for name in names], 10)
