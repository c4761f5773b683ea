"""Which values of CSV files are missing: pandas takes the texts None, null and NA for that in any column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "<NA>", "#N/A"]
"""What programs write for a number that is missing."""
ROWS = 10_000


def missing_in_csv(files: Sequence[Path]) -> dict[str, Any]:
    """Return the options of pandas' reader by which such words are missing in columns of numbers, and text elsewhere.

    Args:
        files: of a folder; those that are not CSV or TSV are left out.
    """
    import pandas  # type: ignore[import-untyped]

    numbers: dict[str, bool] = {}
    files = [file for file in files if {".csv", ".tsv"} & set(file.suffixes)]
    for file in files:
        separator = "\t" if ".tsv" in file.suffixes else ","
        options: dict[str, Any] = {"sep": separator, "dtype": str, "keep_default_na": False, "na_values": [""]}
        try:
            with pandas.read_csv(file, chunksize=ROWS, **options) as parts:
                for part in parts:
                    for name in part.columns:
                        values = part[name][~part[name].isin(WORDS)].dropna()
                        fine = bool(pandas.to_numeric(values, errors="coerce").notna().all())
                        numbers[name] = numbers.get(name, True) and fine
        except (ValueError, OSError):  # what can't be read is reported by the library that reads it
            continue
    missing = {name: WORDS if of_numbers else [""] for name, of_numbers in numbers.items()}
    return {"keep_default_na": False, "na_values": missing} if files else {}
