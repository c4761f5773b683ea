"""Every row that was left out, repaired, cut or noted, a json line each: a report counts them and names the first."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from rap_lightning.preferences.data_report import DataReport


class Listing:
    """A file of rows as reports list them; used as a context manager. It appears when it is whole.

    Args:
        path: to write; None lists nothing, and reports then keep no rows.

    Attributes:
        count: lines written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.count = path, 0
        self._file: IO[str] | None = None

    def __enter__(self) -> Listing:
        if self.path is not None:
            self._file = self._partial.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._file is None or self.path is None:
            return
        self._file.close()
        if error is None:
            os.replace(self._partial, self.path)
        else:
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        assert self.path is not None, "there is a file to write"
        return self.path.with_name(f".{self.path.name}.partial")

    def report(self, source: str, split: str) -> DataReport:
        """A report whose rows this takes."""
        return DataReport(source, split, rows=None if self.path is None else [])

    def take(self, report: DataReport) -> None:
        """Write what a report has listed since, and let it forget that: memory does not grow with the data."""
        if self._file is None or not report.rows:
            return
        of: dict[str, Any] = {"source": report.source, "split": report.split}
        self._file.writelines(json.dumps(of | row, ensure_ascii=False) + "\n" for row in report.rows)
        self.count += len(report.rows)
        report.rows.clear()
