"""The rewards that a judge gave to the responses of a source, looked up by conversation and response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rap_lightning.preferences.hashing import hash_pair, hash_text, hash_turns
from rap_lightning.preferences.pairs import BadRow, Judged, Message

UNJUDGED = "the judge gave the response no reward"
CONTRADICTED = "the judge's reward contradicts the label, exchanged so that the higher reward wins"


def response_key(history: Sequence[Message], text: str) -> int:
    """Return the 64-bit digest of a conversation and a response to it."""
    return hash_pair(hash_turns(history), hash_text(text), 0)


@dataclass(frozen=True)
class Labels:
    """How often a judge's rewards agree with the labels of pairs."""

    agree: int = 0
    contradict: int = 0
    equal: int = 0

    def line(self) -> str:
        total = self.agree + self.contradict + self.equal
        return (
            f"of {total:,} labelled pairs the rewards agree with {self.agree:,} ({self.agree / total:.1%}) and "
            f"contradict {self.contradict:,}, whose responses are exchanged: the higher reward wins"
            + (f"; {self.equal:,} have equal rewards" if self.equal else "")
        )


class RewardTable:
    """The rewards of a judge for the responses of a source, in a file that each process reads on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def write(path: Path, rewards: dict[int, float], failed: int, labels: Labels) -> RewardTable:
        """Write rewards by :func:`response_key`; ``failed`` is the number of responses without one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            keys=np.array(list(rewards), dtype=np.uint64),
            values=np.array(list(rewards.values()), dtype=np.float64),
            counts=np.array([failed, labels.agree, labels.contradict, labels.equal]),
        )
        partial.replace(path)
        return RewardTable(path)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # processes read the file instead of receiving its content

    @cached_property
    def rewards(self) -> dict[int, float]:
        with np.load(self.path, allow_pickle=False) as file:
            return dict(zip(file["keys"].tolist(), file["values"].tolist(), strict=True))

    @cached_property
    def _counts(self) -> list[int]:
        with np.load(self.path, allow_pickle=False) as file:
            return list(map(int, file["counts"]))

    @property
    def failed(self) -> int:
        return self._counts[0]

    @property
    def labels(self) -> Labels:
        return Labels(*self._counts[1:])

    def describe(self) -> str:
        """Return what identifies the table in cache keys: its file name is a digest of judge and data."""
        return f"{self.path.stem} {self.failed}"

    def rate(self, judged: Judged) -> Judged:
        """Replace the rewards of responses with the judge's; responses without one are left out."""
        rated, left_out = [], list(judged.left_out)
        for response in judged.responses:
            reward = self.rewards.get(response_key(judged.history, response.text))
            if reward is not None:
                rated.append(replace(response, reward=reward, attributes=()))
            elif judged.paired:
                raise BadRow(response.column, UNJUDGED)
            else:
                left_out.append(BadRow(response.column, UNJUDGED))
        return replace(judged, responses=rated, left_out=left_out)
