"""Scored pairs from files, folders and the Hub, by the datasets library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rap_lightning.errors import DataError
from rap_lightning.preferences.pairs import SCORED_PAIR_COLUMNS

FILE_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")


def splits_of(source: str) -> list[str]:
    """The names of the splits of a folder or Hub data set; a single file has one, ``train``."""
    import datasets

    if _file_format(source):
        return ["train"]
    try:
        return [str(name) for name in datasets.get_dataset_split_names(source)]
    except Exception as error:
        raise _unreadable(source, error) from error


def load_split(source: str, split: str) -> Any:
    """One split as a ``datasets.Dataset`` that has the columns of a scored pair.

    Raises:
        DataError: missing, unreadable or empty source, an unknown split, or columns missing.
    """
    import datasets

    format_name = _file_format(source)
    if format_name:
        if split != "train":
            raise DataError(f"{source} is one file and has the single split 'train'; split {split!r} was asked for.")
        load = (format_name, {"data_files": source})
    else:
        available = splits_of(source)
        if split not in available:
            raise DataError(f"{source} has the splits {', '.join(available)}; split {split!r} was asked for.")
        load = (source, {})
    try:
        table = datasets.load_dataset(load[0], split=split, **load[1])
    except Exception as error:
        raise _unreadable(source, error) from error
    missing = [name for name in SCORED_PAIR_COLUMNS if name not in table.column_names]
    if missing:
        scores = [name for name in missing if name.startswith("score_")]
        hint = " Reward-augmented alignment needs a judge's score for each response." if scores else ""
        raise DataError(
            f"{source} (split {split}): expected the columns {', '.join(SCORED_PAIR_COLUMNS)}; "
            f"found {', '.join(table.column_names) or 'none'}; missing {', '.join(missing)}.{hint} "
            f"Rename or add the columns, then try again."
        )
    if len(table) == 0:
        raise DataError(f"{source} (split {split}) has no rows.")
    return table


def _file_format(source: str) -> str | None:
    """The datasets builder for a single file; ``None`` for a folder or a Hub id.

    Raises:
        DataError: the source is a path that doesn't exist, or a file of a kind that isn't read.
    """
    path = Path(source)
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    format_name = FILE_FORMATS.get(suffixes[-1]) if suffixes else None
    if path.is_file():
        if format_name is None:
            raise DataError(f"{source}: expected a file ending in {', '.join(FILE_FORMATS)} (also compressed).")
        return format_name
    if path.is_dir():
        return None
    looks_like_path = format_name is not None or source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_like_path:
        raise DataError(f"{source}: no such file or folder. Give a file, a folder, or a Hub id like org/name.")
    return None


def _unreadable(source: str, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
    kind = "can't be read" if Path(source).exists() else "is neither a file here nor a Hub data set that can be reached"
    return DataError(f"{source} {kind}: {type(error).__name__}: {reason[0]}")
