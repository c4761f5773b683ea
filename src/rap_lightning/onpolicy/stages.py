"""Stages whose results are files: done once, resumed, redone where what they were made of has changed.

``state.json`` in a round's folder holds for every stage a digest of what went in, and of what came out. A result that
was changed since by hand is used as it is, and said; everything after it is made again. What is made again moves to
``old/``: nothing is deleted.
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
    """The stages of one folder.

    Args:
        folder: where results and ``state.json`` stand.
        title: what messages call it.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder, self.title = folder, title
        self.path = folder / "state.json"
        self.state: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.state = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{self.path} is not JSON: {error}. Remove the folder to begin anew.") from error

    def run(
        self, name: str, inputs: str, results: Sequence[str], make: Callable[[], None], also: Sequence[str] = ()
    ) -> str:
        """Make a stage's results unless they are there.

        Args:
            name: of the stage.
            inputs: digest of everything that it is made of.
            results: names of the files or folders that it makes; the first is the one that later stages read.
            make: makes them; it may find what an interrupted run left, made of the same inputs.
            also: what else the stage leaves: it moves with the results, but may be changed or missing.

        Returns:
            The digest of the results, for the stages after it.
        """
        paths = [self.folder / result for result in results]
        known = self.state.get(name, {})
        if known.get("inputs") != inputs and (known or any(path.exists() for path in paths)):
            edited = "made" in known and paths[0].exists() and digest_of_paths(paths) != known["made"]
            why = "what it is made of has changed" if known else "nothing is known of how it was made"
            hand = ", which was changed by hand," if edited else ""
            print(f"{self.title}: {name} is done again: {why}. What was there{hand} is in old/")
            self.aside(name, [*paths, *(self.folder / one for one in also)])
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

    def _record(self, name: str, inputs: str, made: str | None) -> None:
        self.state[name] = {"inputs": inputs} | ({} if made is None else {"made": made})
        write_json(self.path, self.state)

    def aside(self, name: str, paths: Sequence[Path]) -> None:
        """Move what is there into ``old/``."""
        there = [path for path in paths if path.exists() or path.is_symlink()]
        if not there:
            return
        number = 1 + len(list((self.folder / "old").glob(f"{name}-*")))
        target = self.folder / "old" / f"{name}-{number}"
        target.mkdir(parents=True)
        for path in there:
            shutil.move(path, target / path.name)


def digest_of_paths(paths: Sequence[Path]) -> str:
    """Of files, and of all files in folders; names count, times don't."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
            name = file.relative_to(path) if path.is_dir() else ""
            digest.update(f"{path.name}/{name} {file_digest(file)}".encode())
    return digest.hexdigest()[:24]
