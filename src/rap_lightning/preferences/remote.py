"""Sources behind a URL (``s3://``, ``gs://``, ``hf://`` and what else fsspec reads): copied once, then read as local.

The copy is kept by URL and by what the server says of each file (its ETag, or size and time), so a file that changes is
copied again, and the identity of the data is the content of the copy.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from rap_lightning.errors import ConfigError, DataError, first_line
from rap_lightning.preferences.pairs import shown
from rap_lightning.provenance import flatten, mask_text, names_secret

SEPARATOR = "://"
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
"""The package that reads a scheme, for messages."""
NOT_READ = {"http": "download the file", "https": "download the file", "file": "give the path alone"}
ENVIRONMENT = "Keys come from the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN, ...)."


def is_remote(path: str) -> bool:
    """Return whether a source is a URL."""
    return SCHEME.match(path) is not None


def check_remote(path: str, options: Mapping[str, Any]) -> None:
    """Check a URL and the options of its file system, without asking the server.

    Raises:
        ConfigError: a scheme that is not read, or a key in what configs record.
    """
    scheme, _, rest = path.partition(SEPARATOR)
    if scheme in NOT_READ:
        raise ConfigError(f"source {mask_text(path)}: {scheme}:// is not read; {NOT_READ[scheme]}.")
    if "@" in rest.split("/", 1)[0] and ":" in rest.split("@", 1)[0]:
        raise ConfigError(f"source {scheme}://***: a key in a URL would be written into every config. {ENVIRONMENT}")
    if secret := [name for name in flatten(dict(options)) if names_secret(name)]:
        raise ConfigError(
            f"source {path}: storage_options {', '.join(secret)} would be written into every config. {ENVIRONMENT}"
        )


def copied(path: str, options: Mapping[str, Any]) -> Path:
    """Return the local copy of a file or a folder behind a URL; it is made at the first call of a process.

    Raises:
        ConfigError: the package for its scheme is missing.
        DataError: it can't be read.
    """
    return _copied(path, json.dumps(dict(options), sort_keys=True, default=str))


@cache
def _copied(path: str, options: str) -> Path:
    import datasets
    from filelock import FileLock  # which datasets needs

    scheme = path.partition(SEPARATOR)[0]
    try:
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(path, **json.loads(options))
    except ImportError as error:
        package = PACKAGES.get(scheme, "the package that fsspec names")
        raise ConfigError(
            f"source {path}: {scheme}:// needs {package}, which can't be imported: pip install {package}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"source {path}: {shown(str(error), 200)}") from error
    try:
        files = {root: fs.info(root)} if fs.isfile(root) else fs.find(root, detail=True)
        if not files:
            raise FileNotFoundError(path)
        names = {name: _name_in(root, name) for name in sorted(files)}
        marks = [(names[name], files[name].get("size"), _mark(fs, name, files[name])) for name in names]
        key = hashlib.sha256(json.dumps([path, marks]).encode()).hexdigest()[:16]
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "rap_lightning" / "remote" / key
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                size = sum(files[name].get("size") or 0 for name in names)
                print(
                    f"copying {path} ({len(names)} files, {size / 1e6:,.1f} MB) to {folder}",
                    file=sys.stderr,
                    flush=True,
                )
                _copy(fs, names, folder)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file or folder.") from error
    except DataError:
        raise
    except Exception as error:  # each file system raises types of its own, botocore's among them
        reason = shown(mask_text(first_line(error)), 200)
        advice = "" if isinstance(error, OSError) and error.filename is not None else f" {ENVIRONMENT}"
        raise DataError(f"{path} can't be read: {type(error).__name__}: {reason}.{advice}") from error
    return folder / PurePosixPath(root).name if root in files else folder


def _name_in(root: str, name: str) -> str:
    """Return the name of a file inside its folder; refuse one that would lead out of it."""
    inside = PurePosixPath(name).name if name == root else str(PurePosixPath(name).relative_to(root))
    if ".." in PurePosixPath(inside).parts or PurePosixPath(inside).is_absolute():
        raise DataError(f"{name}: a name that leads out of its folder")
    return inside


def _mark(fs: Any, name: str, info: Mapping[str, Any]) -> str:
    """Return what changes with a file: its ETag where the server gives one, else all that it says."""
    tag = next((info[key] for key in ("ETag", "etag", "md5Hash", "blob_id") if info.get(key)), None)
    return str(tag) if tag is not None else str(fs.ukey(name))


def _copy(fs: Any, names: Mapping[str, str], folder: Path) -> None:
    """Copy files into a folder that appears once it is complete."""
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, inside in names.items():
            target = work / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
