"""Data sources: files, folders and the Hub, with splits by the rules of the datasets library.

Files of known kinds are read by :mod:`rap_lightning.preferences.readers`, everything else by ``datasets``. A path that
exists is that path and nothing else; which files of a folder are read is decided in
:mod:`rap_lightning.preferences.folder_splits`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rap_lightning.errors import ConfigError, DataError, first_line, join_some
from rap_lightning.preferences.csv_values import missing_in_csv
from rap_lightning.preferences.folder_splits import files_in, is_plain, splits_in_folder
from rap_lightning.preferences.pairs import shown
from rap_lightning.preferences.readers import COMPRESSIONS, ROWS, Chunk, kind_of, numbered, read_file
from rap_lightning.preferences.remote import check_remote, copied, is_remote


@dataclass(frozen=True)
class Source:
    """One of several sources.

    Args:
        path: a file (.parquet, .arrow, .jsonl, .json, text also compressed), a folder, a Hub id like org/name, or the
            URL of a file or a folder that fsspec reads (s3://, gs://, hf://), which is copied into the cache.
        weight: how often each of its training pairs is used in an epoch: 2 is twice, 0.5 a seeded half of them.
        split: the split to use as training split; by default the one of the same name.
        format: as for the data module; by default the data module's.
        revision: of a Hub dataset: a branch, tag or commit.
        config: of a Hub dataset that has several.
        storage_options: of a URL's file system, as in {endpoint_url: ...} or {anon: true}; never keys, which come from
            the environment.
    """

    path: str
    weight: float = 1.0
    split: str | None = None
    format: str | None = None
    revision: str | None = None
    config: str | None = None
    storage_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"source {self.path}: weight must be above 0, found {self.weight}")
        remote = local_path(self.path) is None and is_remote(self.path)
        if remote:
            check_remote(self.path, self.storage_options or {})
        elif self.storage_options is not None:
            raise ConfigError(
                f"source {self.path}: storage_options have no effect without a URL (s3://...); remove them."
            )
        if remote or local_path(self.path) is not None:
            for name in ("revision", "config"):
                if getattr(self, name) is not None:
                    kind = "URLs" if remote else "local files"
                    raise ConfigError(f"source {self.path}: {name} has no effect on {kind}; leave it out.")


def local_path(text: str) -> Path | None:
    """Return the absolute path of what a source names, as it is written or else with ~ expanded; None if it is absent.

    Absolute, because ``datasets`` reads ``parquet``, ``json`` or ``text`` as the name of one of its readers.
    """
    found = next((path for path in (text, os.path.expanduser(text)) if os.path.exists(path)), None)
    if found is None:
        return None
    return Path(found).resolve() if os.path.isdir(found) else Path(found).absolute()


HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
"""The name of a dataset on the Hub, as opposed to a path."""
MODEL_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
"""The name of a model on the Hub, as opposed to a path; the oldest ones have no owner."""
SPLIT_FLAGS = (
    "Choose a split with --data.train_split NAME and --data.val_split NAME (null: the usual one, if there is any); in "
    "commands other than fit with --split NAME."
)
"""How to choose splits, for messages about one that does not exist."""
VALIDATION_NAMES = ("validation", "valid", "val", "test_prefs", "test")
"""Usual names of validation splits; the first that exists is used."""


def refuse_no_model(option: str, path: str) -> None:
    """Raise ConfigError if the model that an option names can be neither a folder nor on the Hub."""
    if not Path(path).exists() and not MODEL_ID.fullmatch(path):
        raise ConfigError(f"{option} {path}: no such folder, and not a Hub id (org/name).")


def as_sources(source: str | Sequence[Source]) -> list[Source]:
    """Return the list of sources of an option: one path, or several sources."""
    sources = [Source(source)] if isinstance(source, str) else list(source)
    if not sources:
        raise ConfigError("no source: name a file, a folder, or a Hub id.")
    return sources


def splits_of(source: Source) -> list[str]:
    """Return the names of the splits of a folder or Hub dataset; a single file has one, ``train``."""
    path = _local(source)
    if path is not None and path.is_file():
        return ["train"]
    if path is not None and (saved := _saved_to_disk(path)) is not None:
        return saved
    return [str(name) for name in _builder_splits(source)]


def splits_among(sources: Sequence[Source]) -> list[str]:
    """Return the splits of several sources; a source that names its split is part of the training split."""
    names = [name for source in sources for name in (["train"] if source.split else splits_of(source))]
    return list(dict.fromkeys(names))


def having(sources: Sequence[Source], split: str, train_split: str = "train") -> list[Source]:
    """Return the sources that have a split."""
    found = [
        source for source in sources
        if (split == train_split if source.split else split in splits_of(source))
    ]  # fmt: skip
    if not found:
        known = ", ".join(splits_among(sources))
        raise DataError(f"{', '.join(source.path for source in sources)}: no split {split!r}; found {known}.")
    return found


def chunks_of(source: Source, split: str, *, streaming: bool = False) -> Iterator[Chunk]:
    """Yield the rows of one split in order, in chunks.

    Args:
        source: where to read from.
        split: name of the split; ``source.split`` overrides it.
        streaming: read a Hub dataset without downloading it first. Local files are always read in parts.
    """
    wanted = source.split or split
    files = files_of(source, wanted)
    if files is None:
        yield from _from_library(source, wanted, streaming)
        return
    for path, label in files:
        yield from read_file(path, label)


def files_of(source: Source, split: str) -> list[tuple[str, str]] | None:
    """Return (path, label) of the files of a split; None if only the datasets library can read the source."""
    path = _local(source)
    if path is None:
        return None
    if path.is_file():
        if split != "train":
            raise DataError(
                f"{source.path} is one file and has the single split 'train'; {split!r} was asked for. {SPLIT_FLAGS}"
            )
        return [(str(path), path.name)]
    if _saved_to_disk(path) is not None:
        return None
    available = _builder_splits(source)
    _check_split(source, split, available)
    files = available[split]
    if any(kind_of(file) is None for file in files):
        return None
    return [(file, str(Path(file).relative_to(path)) if Path(file).is_relative_to(path) else file) for file in files]


def _check_split(source: Source, split: str, available: Iterable[str]) -> None:
    if split not in available:
        raise DataError(f"{source.path} has the splits {', '.join(available)}; {split!r} was asked for. {SPLIT_FLAGS}")


def fingerprint(source: Source, split: str) -> str:
    """Return a digest of a split's content: of every byte of local files, or the Hub split's fingerprint.

    Sizes and times are not enough: an editor, rsync or tar can keep both.
    """
    path, files = _local(source), files_of(source, source.split or split)
    if path is None:
        # datasets (5.2) has no public accessor
        facts: Any = _load(source, source.split or split, streaming=False)._fingerprint
    else:
        facts = _contents(path) if files is None else [(str(Path(file).resolve()), _content(file)) for file, _ in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _contents(folder: Path) -> list[tuple[str, str]]:
    return [(str(folder / name), _content(folder / name)) for name, _ in files_in(folder)]


def _content(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(source: Source) -> Path | None:
    """Return the path of a local source, or of the copy of a remote one; None for a Hub id."""
    path = local_path(source.path)
    if path is None and is_remote(source.path):
        path = copied(source.path, source.storage_options or {})
    if path is not None:
        if not path.is_dir() and kind_of(str(path)) is None:
            raise DataError(
                f"{source.path}: expected a file ending in .parquet, .arrow, .jsonl or .json "
                f"(text also compressed: {', '.join(COMPRESSIONS)})."
            )
        return path
    if source.path.startswith(("[", "{")):
        raise ConfigError(
            f"source: {shown(source.path)} is not a list of sources. Write one as "
            "[{path: a.jsonl}, {path: b.jsonl, weight: 2}]"
        )
    if kind_of(source.path) or not HUB_ID.fullmatch(source.path):
        raise DataError(
            f"{source.path}: no such file or folder, and not a Hub id (org/name). Give a file, a folder, or a Hub id."
        )
    return None


def _saved_to_disk(path: Path) -> list[str] | None:
    """Return the splits of a folder that ``Dataset.save_to_disk`` wrote; None for other folders."""
    if (path / "dataset_dict.json").is_file():
        return [str(name) for name in json.loads((path / "dataset_dict.json").read_text())["splits"]]
    return ["train"] if (path / "state.json").is_file() else None


def _builder_splits(source: Source) -> dict[str, list[str]]:
    path = _local(source)
    try:
        if path is None:
            return _splits_on_hub(source.path, source.config, source.revision)
        return splits_in_folder(path, tuple(files_in(path)))
    except Exception as error:
        raise _unreadable(source, error) from error


@cache
def _splits_on_hub(path: str, config: str | None, revision: str | None) -> dict[str, list[str]]:
    import datasets

    return {str(name): [] for name in datasets.get_dataset_split_names(path, config, revision=revision)}


def _load(source: Source, split: str, *, streaming: bool) -> Any:
    import datasets

    _check_split(source, split, splits_of(source))
    path = _local(source)
    try:
        if path is not None and _saved_to_disk(path) is not None:
            table = datasets.load_from_disk(str(path))
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        if path is not None and not is_plain(path):
            raise DataError(
                f"{source.path}: only .parquet, .arrow and .json files are read from a folder whose path has "
                "characters that datasets takes for a pattern. Rename the folder, or convert the files."
            )
        options: dict[str, Any] = {"revision": source.revision, "name": source.config} if path is None else {}
        if path is not None:  # datasets recognises files by their times, and would use what it has read of them before
            content = hashlib.sha256(repr(_contents(path)).encode()).hexdigest()[:16]
            options = missing_in_csv([path / name for name, _ in files_in(path)])
            options |= {"cache_dir": os.path.join(datasets.config.HF_DATASETS_CACHE, "rap_lightning", content)}
        return datasets.load_dataset(str(path or source.path), split=split, streaming=streaming, **options)
    except Exception as error:
        raise _unreadable(source, error) from error


def _from_library(source: Source, split: str, streaming: bool) -> Iterator[Chunk]:
    table = _load(source, split, streaming=streaming).with_format("arrow")
    try:
        batches = (batch for part in table.iter(ROWS) for batch in part.combine_chunks().to_batches())
        yield from numbered(batches, f"{source.path} ({split})")
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def cache_unusable(error: BaseException) -> DataError | None:
    """Return the message for an error that is of the cache of Hugging Face's libraries, and not of any data."""
    import datasets

    caches = [Path(datasets.config.HF_CACHE_HOME).expanduser(), Path(datasets.config.HF_DATASETS_CACHE).expanduser()]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and isinstance(seen.filename, str):
            named = Path(seen.filename)
            for cache in caches:
                if named.is_relative_to(cache) or (cache.is_relative_to(named) and not cache.exists()):
                    return DataError(
                        f"the cache {cache} can't be used: {seen.strerror} ({named}). Set HF_HOME, or "
                        "HF_DATASETS_CACHE, to a folder that can be written."
                    )
        seen = seen.__cause__ or seen.__context__
    return None


def _configs(path: Path | None) -> list[str]:
    """Return the configs that the card of a dataset's clone declares."""
    import datasets

    try:
        return [] if path is None or not path.is_dir() else list(datasets.get_dataset_config_names(str(path)))
    except Exception:  # it raises many types for folders that are no clone
        return []


def _unreadable(source: Source, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    if unusable := cache_unusable(error):
        return unusable
    path = _local(source)  # of a URL its copy, which was made before anything of it could fail
    if len(configs := _configs(path)) > 1:
        return DataError(
            f"{source.path} is the clone of a dataset with the configs {join_some(configs)}, of which a local source "
            "has only one. Name the files or the folder of one, or the dataset on the Hub with its config."
        )
    reason = first_line(error.__cause__ or error) or type(error).__name__
    kind = "can't be read" if path is not None else "is neither a local file nor a Hub dataset that can be reached"
    advice = ""
    if path is not None and path.is_dir():
        advice = " A folder should contain files of one kind, named after their split: train.jsonl, test.jsonl."
    return DataError(f"{source.path} {kind}: {type(error).__name__}: {shown(reason, 300)}{advice}")
