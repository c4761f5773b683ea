"""Stages whose results are files: made once, resumed, and made again when their inputs have changed.

``state.json`` in a round's folder holds for every stage a digest of its inputs and of its results. A result that was
edited by hand is used as it is, and everything that depends on it is made again. Replaced results move to ``old/``;
nothing is deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rap_lightning.errors import DataError
from rap_lightning.onpolicy.jsonl_ledger import file_digest, write_json


class Stages:
    """The stages of one folder, which messages call ``title``."""

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.path = folder / "state.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.state = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{self.path} is not JSON: {error}. Remove the folder to start over.") from error

    def run(
        self, name: str, inputs: str, results: Sequence[str], make: Callable[[], None], also: Sequence[str] = ()
    ) -> str:
        """Make a stage's results unless they exist; return their digest, as an input of later stages.

        Args:
            name: name of the stage.
            inputs: digest of everything that the results depend on.
            results: files or folders that the stage makes; later stages read the first one.
            make: makes them; it may find what an interrupted run of the same inputs left.
            also: further files of the stage: they move with the results, but may be edited or missing.
        """
        paths = [self.folder / result for result in results]
        known = self.state.get(name, {})
        if known.get("inputs") != inputs and (known or any(path.exists() for path in paths)):
            edited = "made" in known and paths[0].exists() and digest_of_paths(paths) != known["made"]
            why = "what it is made of has changed" if known else "nothing is known of how it was made"
            hand = ", edited by hand," if edited else ""
            print(f"{self.title}: {name} is done again: {why}. The previous result{hand} is in old/")
            self.move_to_old(name, [*paths, *(self.folder / one for one in also)])
            known = {}
        if "made" in known and all(path.exists() for path in paths):
            now = digest_of_paths(paths)
            if now != known["made"]:
                print(f"{self.title}: {name} was changed by hand, and is used as it is")
                self._record(name, inputs, now)
            return now
        self._record(name, inputs, None)
        make()
        now = digest_of_paths(paths)
        self._record(name, inputs, now)
        return now

    def move_to_old(self, name: str, paths: Sequence[Path]) -> None:
        """Move existing files into a new folder below ``old/``."""
        existing = [path for path in paths if path.exists() or path.is_symlink()]
        if not existing:
            return
        number = 1 + len(list((self.folder / "old").glob(f"{name}-*")))
        target = self.folder / "old" / f"{name}-{number}"
        target.mkdir(parents=True)
        for path in existing:
            shutil.move(path, target / path.name)

    def _record(self, name: str, inputs: str, made: str | None) -> None:
        self.state[name] = {"inputs": inputs} | ({} if made is None else {"made": made})
        write_json(self.path, self.state)


def digest_of_paths(paths: Sequence[Path]) -> str:
    """Return the digest of files and of all files in folders; it depends on names and content, not on times."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            name = file.relative_to(path) if path.is_dir() else ""
            digest.update(f"{path.name}/{name} {file_digest(file)}".encode())
    return digest.hexdigest()[:24]
