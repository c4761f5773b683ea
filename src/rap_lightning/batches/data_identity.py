"""Which data a run is trained on, as its checkpoints record it: a resumed run continues at a place in these data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rap_lightning.batches.dataset import EncodedPairs, EncodedRow
from rap_lightning.preferences.pairs import Pair


@dataclass(frozen=True)
class DataIdentity:
    """What decides which pairs a run sees, and in which order; no times or paths of files.

    Attributes:
        pairs: scored pairs of the training split; of a stream, those of its beginning.
        ids: digest of their ids, which are digests of their texts, in order.
        scores: digest of their rewards, goals, strengths and weights, in order.
        streamed: they are read during training.
        tokens: digest of their token ids: goals, tools, chat template and lengths decide these too.
    """

    pairs: int
    ids: str
    scores: str
    streamed: bool
    tokens: str = ""

    @classmethod
    def of_table(cls, pairs: EncodedPairs) -> DataIdentity:
        """The identity of a training split that is read as a whole."""
        scores = ["rewards", "goals"]
        if len(pairs.table) and any(one is not None for one in pairs.table[0]["strengths"]):
            scores.append("strengths")
        if any(one != 1.0 for one in pairs.table.select_columns(["weight"])[:]["weight"]):
            scores.append("weight")
        return cls(
            len(pairs.table),
            pairs.digest("pair_id"),
            pairs.digest(*scores),
            False,
            pairs.digest("prompt_ids", "response_ids"),
        )

    @classmethod
    def of_stream(cls, first: Sequence[Pair], rows: Sequence[EncodedRow]) -> DataIdentity:
        """The identity of a stream, by its first pairs: the others are not known before they are trained on."""
        tokens = [(row.get("prompt_ids"), row.get("response_ids")) for row in rows]
        scores = [
            (pair.rewards, pair.attributes, *([pair.weight] if pair.weight != 1 else []), *_strengths(row))
            for pair, row in zip(first, rows, strict=True)
        ]
        return cls(len(first), _digest([pair.id for pair in first]), _digest(scores), True, _digest(tokens))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def change_since(self, saved: dict[str, Any]) -> str:
        """Say in words what has changed since a checkpoint recorded its data; empty where nothing has."""
        before = DataIdentity(**saved)
        if before == self:
            return ""
        if before.streamed != self.streamed:
            return "one of the two was streamed, which gives another order"
        if before.pairs != self.pairs:
            return f"it had {before.pairs:,} scored pairs, and there are {self.pairs:,} now"
        if before.ids != self.ids:
            return f"its {self.pairs:,} scored pairs had other texts or another order"
        if before.scores != self.scores:
            return f"its {self.pairs:,} scored pairs have the same texts, and had other rewards, goals or weights"
        return f"its {self.pairs:,} scored pairs were encoded otherwise (tools, chat template or its switches, lengths)"


def _strengths(row: EncodedRow) -> list[float]:
    """Return the strengths of a row's training pairs; a goal that is text has none, and is in the token ids."""
    return [one for one in row.get("strengths") or () if one is not None]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
