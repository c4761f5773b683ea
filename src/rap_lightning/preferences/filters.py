"""Filters of prompts, responses and pairs. Everything they remove is counted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.bounded_json import load_json
from rap_lightning.preferences.hashing import hash_text
from rap_lightning.preferences.pairs import BadRow, Judged, Response


@dataclass(frozen=True)
class Filters:
    """Which prompts, responses and pairs to leave out.

    Args:
        min_gap: pairs whose rewards differ by less, in the judge's units, are left out.
        min_reward: responses with a lower reward are left out.
        max_reward: responses with a higher reward are left out.
        max_length_ratio: pairs whose longer response has more than this many times the other's characters are left out.
        near_duplicates: responses to one prompt that share this part of their words (Jaccard index, 0 to 1) with an
            earlier one are left out.
        exclude: a file of prompts to leave out, for decontamination: one per line, or JSON Lines with a prompt,
            instruction or question. Case, punctuation and whitespace are ignored.
        repeats: what to do with a pair that was read before: keep it, for oversampled data, or drop it.

    >>> Filters(min_gap=0.5).repeats  # repeated pairs are kept, unless they are to be dropped
    'keep'
    """

    min_gap: float | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    max_length_ratio: float | None = None
    near_duplicates: float | None = None
    exclude: str | None = None
    repeats: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.min_gap is not None and not self.min_gap > 0:
            raise ConfigError(f"filters.min_gap must be above 0, found {self.min_gap}")
        if self.max_length_ratio is not None and not self.max_length_ratio > 1:
            raise ConfigError(f"filters.max_length_ratio must be above 1, found {self.max_length_ratio}")
        if self.near_duplicates is not None and not 0 < self.near_duplicates <= 1:
            raise ConfigError(f"filters.near_duplicates must be above 0 and at most 1, found {self.near_duplicates}")
        low, high = self.min_reward, self.max_reward
        if low is not None and high is not None and not low < high:
            raise ConfigError(f"filters.min_reward must be below max_reward, found {low} and {high}")
        if self.exclude is not None:
            excluded(self.exclude)  # so that a missing file is reported at once

    def describe(self) -> str:
        """Return the options and the content of the list of prompts to exclude, for cache keys."""
        prompts = sorted(excluded(self.exclude)) if self.exclude is not None else []
        return f"{self} {hash_text(repr(prompts))}"

    def check_prompt(self, judged: Judged) -> None:
        """Raise BadRow if a user turn is in the list of prompts to exclude."""
        if self.exclude is None:
            return
        known = excluded(self.exclude)
        for i, turn in enumerate(judged.history):
            if turn["role"] == "user" and normal(turn["content"]) in known:
                raise BadRow(f"prompt (turn {i + 1})", "a prompt in the list of prompts to exclude", by_choice=True)

    def responses(self, responses: Sequence[Response]) -> tuple[list[Response], list[BadRow]]:
        """Return the responses to keep, and why others are left out."""
        good: list[Response] = []
        bad: list[BadRow] = []
        words: list[set[str]] = []
        for response in responses:
            if self.min_reward is not None and response.reward < self.min_reward:
                bad.append(_left_out(response, f"a reward below filters.min_reward {self.min_reward:g}"))
                continue
            if self.max_reward is not None and response.reward > self.max_reward:
                bad.append(_left_out(response, f"a reward above filters.max_reward {self.max_reward:g}"))
                continue
            if self.near_duplicates is not None:
                own = set(normal(response.text).split())
                if any(_jaccard(own, other) >= self.near_duplicates for other in words):
                    bad.append(_left_out(response, "nearly the same text as an earlier response to this prompt"))
                    continue
                words.append(own)
            good.append(response)
        return good, bad

    def check_pair(self, better: Response, worse: Response) -> None:
        """Raise BadRow if a pair is to be left out."""
        if self.min_gap is not None and not better.reward - worse.reward >= self.min_gap:
            raise _left_out(worse, f"a gap between rewards below filters.min_gap {self.min_gap:g}")
        if self.max_length_ratio is not None:
            short, long = sorted((len(better.text), len(worse.text)))
            if long > short * self.max_length_ratio:
                raise _left_out(worse, f"lengths beyond filters.max_length_ratio {self.max_length_ratio:g}")


def _left_out(response: Response, reason: str) -> BadRow:
    return BadRow(response.column, reason, by_choice=True)


def normal(text: str) -> str:
    """Return the words of a text: lower case, without punctuation, separated by a space."""
    return " ".join(re.findall(r"\w+", text.casefold()))


@lru_cache(maxsize=4)
def excluded(path: str) -> frozenset[str]:
    """Return the prompts of a list to exclude, as :func:`normal` returns them."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"filters.exclude: no such file: {path}")
    prompts = set()
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"filters.exclude: {path}: byte {error.start + 1} is not UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text = line
        if file.suffix in (".jsonl", ".json"):
            try:
                row = load_json(line)
                text = next(row[name] for name in ("prompt", "instruction", "question") if name in row)
            except (ValueError, StopIteration, TypeError) as error:
                raise DataError(
                    f"filters.exclude: {path} line {number}: expected an object with a prompt, instruction or question."
                ) from error
        prompts.add(normal(str(text)))
    if not prompts:
        raise DataError(f"filters.exclude: {path} has no prompts.")
    return frozenset(prompts - {""})


def _jaccard(a: set[str], b: set[str]) -> float:
    either = len(a | b)
    return len(a & b) / either if either else 1.0
