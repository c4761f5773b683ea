"""Scored pairs a column at a time: the fast lane for message lists in Arrow.

Most rows of most data are good, and that can be seen for a thousand of them at once. Rows that are surely good are
taken here; every other one, with its doubt, goes the way of single rows (rap_lightning.preferences.ingest), which says
what is wrong with it. Both ways give the same pairs and the same counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.hashing import PRIME, ROLE, Hashes, hash_column, hash_columns_of_turns
from rap_lightning.preferences.pairs import Pair

VISIBLE = r"[\p{L}\p{N}\p{P}\p{S}]"
ODD = "[\0\ufdd0-\ufdef]"  # noted or refused row by row
ROLE_CODES = {"system": 0, "user": 1, "assistant": 2}


@dataclass(frozen=True)
class PairColumns:
    """Scored pairs as columns of n rows; see :class:`rap_lightning.preferences.pairs.Pair` for their meaning.

    Attributes:
        turns: Arrow list of {role, content}, the histories.
        responses: Arrow strings, the winners' and the losers' texts.
        rewards: [n, 2] float64, winner and loser.
        ids, keys: [n] digests of the pair, and of the pair whatever the order of its responses.
        exchanged, tie: [n] bool.
        numbers: [n] line or row in the file; ``name`` and ``unit`` say of which.
    """

    turns: Any
    responses: tuple[Any, Any]
    rewards: NDArray[np.float64]
    ids: Hashes
    keys: Hashes
    exchanged: NDArray[np.bool_]
    tie: NDArray[np.bool_]
    numbers: NDArray[np.int64]
    name: str
    unit: str

    def __len__(self) -> int:
        return len(self.ids)

    def place(self, index: int) -> str:
        """Where a pair was read."""
        return f"{self.name} {self.unit} {self.numbers[index]}"

    def places(self) -> list[str]:
        """Where each pair was read."""
        return [f"{self.name} {self.unit} {number}" for number in self.numbers.tolist()]

    def take(self, mask: NDArray[np.bool_]) -> PairColumns:
        """The pairs that a mask keeps."""
        import pyarrow as pa

        if mask.all():
            return self
        kept = pa.array(mask)
        return replace(
            self, turns=self.turns.filter(kept), responses=tuple(texts.filter(kept) for texts in self.responses),
            rewards=self.rewards[mask], ids=self.ids[mask], keys=self.keys[mask], exchanged=self.exchanged[mask],
            tie=self.tie[mask], numbers=self.numbers[mask],
        )  # fmt: skip

    def pairs(self) -> list[Pair]:
        """The pairs, one by one."""
        histories = self.turns.to_pylist()
        winners, losers = (texts.to_pylist() for texts in self.responses)
        rewards, flags = self.rewards.tolist(), zip(self.exchanged.tolist(), self.tie.tolist(), strict=True)
        return [
            Pair(
                id=f"{own:016x}", history=tuple({"role": t["role"], "content": t["content"]} for t in history),
                responses=(win, lose), rewards=(high, low), exchanged=exchanged, tie=tie, place=place,
            )
            for own, history, win, lose, (high, low), (exchanged, tie), place in zip(
                self.ids.tolist(), histories, winners, losers, rewards, flags, self.places(), strict=True
            )
        ]  # fmt: skip


def fits(batch: Any, goal: GoalTemplate | None) -> bool:
    """Whether a record batch has message lists and scores of the plain kind, and the goal needs nothing more."""
    import pyarrow as pa

    names = batch.schema.names
    if goal is None or goal.attributes or "tools" in names:
        return False
    wanted = {"chosen", "rejected", "score_chosen", "score_rejected"}
    if not wanted <= set(names) or any(names.count(name) != 1 for name in wanted):
        return False
    for name in ("chosen", "rejected"):
        kind = batch.schema.field(name).type
        if not pa.types.is_list(kind) or not pa.types.is_struct(kind.value_type):
            return False
        fields = {field.name: field.type for field in kind.value_type}
        if set(fields) != {"role", "content"} or not all(pa.types.is_string(t) for t in fields.values()):
            return False
    for name in ("prompt", "prompt_id"):
        if name in names and not pa.types.is_string(batch.schema.field(name).type):
            return False
    return all(_is_number(batch.schema.field(name).type) for name in ("score_chosen", "score_rejected"))


def surely_good(
    batch: Any, goal: GoalTemplate, first: int, name: str, unit: str
) -> tuple[PairColumns, NDArray[np.bool_], list[str | None]]:
    """The rows without any doubt.

    Args:
        batch: a record batch that :func:`fits`.
        goal: its scale and its text decide about outsiders and ties.
        first: number of its first row.
        name, unit: for places.

    Returns:
        The pairs of the good rows (ties and exchanged ones among them, marked), a mask of the good rows, and for those
        their prompt ids where there is such a column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    sides = [batch.column(side) for side in ("chosen", "rejected")]
    scores = [batch.column(side) for side in ("score_chosen", "score_rejected")]
    count = batch.num_rows
    nulls = sum(column.null_count for column in (*sides, *scores))
    lists = [side.flatten() for side in sides]
    nulls += sum(part.null_count + _field(part, name).null_count for part in lists for name in ("role", "content"))
    if nulls or count == 0:
        return _none_of(batch, count, name, unit)
    offsets = [np.asarray(side.offsets, dtype=np.int64) - side.offsets[0].as_py() for side in sides]
    lengths = np.diff(offsets[0])
    good = (lengths == np.diff(offsets[1])) & (lengths >= 2)
    if not good.all():  # only rows of equal length can be laid side by side
        return _part(batch, good, goal, first, name, unit)
    contents = [_field(part, "content") for part in lists]
    roles = [_codes(_field(part, "role")) for part in lists]
    starts, ends = offsets[0][:-1], offsets[0][1:]
    last = np.zeros(len(roles[0]), dtype=bool)
    last[ends - 1] = True
    same = np.asarray(pc.equal(contents[0], contents[1])) & (roles[0] == roles[1])
    good &= _all_in_row(same | last, starts)  # one history
    has_system = roles[0][starts] == ROLE_CODES["system"]
    place = np.arange(len(last)) - np.repeat(starts + has_system, lengths)
    expected = np.where(place < 0, 0, np.where(place % 2 == 0, 1, 2))
    good &= _all_in_row((roles[0] == expected) & (roles[1] == expected), starts) & ((lengths - has_system) % 2 == 0)
    finals = [part.take(pa.array(ends - 1)) for part in contents]
    for final in finals:
        good &= np.asarray(pc.match_substring_regex(final, VISIBLE))
        good &= ~np.asarray(pc.match_substring_regex(final, ODD))
    trimmed = [pc.utf8_trim_whitespace(final) for final in finals]
    good &= ~np.asarray(pc.equal(*trimmed))
    numbers = [np.asarray(score.cast(pa.float64(), safe=False)) for score in scores]
    low, high = goal.scale.judge_range
    for values in numbers:
        good &= np.isfinite(values) & (values >= low) & (values <= high)
    good &= _prompt_agrees(batch, contents[0], starts + has_system, ends - 2)
    if not good.all():
        return _part(batch, good, goal, first, name, unit)

    exchanged = numbers[1] > numbers[0]
    winner, loser = (
        pc.if_else(pa.array(exchanged), finals[1 - side], finals[side]) if exchanged.any() else finals[side]
        for side in (0, 1)
    )
    rewards = np.stack(numbers, 1)
    rewards[exchanged] = rewards[exchanged][:, ::-1]
    history = np.flatnonzero(~last)
    of_role = np.array([ROLE["system"], ROLE["user"], ROLE["assistant"]], dtype=np.uint64)
    told = hash_columns_of_turns(
        hash_column(contents[0].take(pa.array(history))),
        of_role[roles[0][history]],
        starts - np.arange(count),
        lengths - 1,
    )
    first_hash, second_hash = hash_column(winner), hash_column(loser)
    prime = np.uint64(PRIME)
    turns = pa.ListArray.from_arrays(
        pa.array((offsets[0] - np.arange(count + 1)).astype(np.int32)), lists[0].take(pa.array(history))
    )
    columns = PairColumns(
        turns=turns, responses=(winner, loser), rewards=rewards,
        ids=(told * prime + first_hash) * prime + second_hash, keys=told * prime * prime + first_hash + second_hash,
        exchanged=exchanged, tie=_ties(rewards, goal), numbers=np.arange(first, first + count), name=name, unit=unit,
    )  # fmt: skip
    ids = batch.column("prompt_id").to_pylist() if "prompt_id" in batch.schema.names else [None] * count
    return columns, np.ones(count, dtype=bool), ids


def _part(
    batch: Any, good: NDArray[np.bool_], goal: GoalTemplate, first: int, name: str, unit: str
) -> tuple[PairColumns, NDArray[np.bool_], list[str | None]]:
    """The good rows of a batch that has others too."""
    import pyarrow as pa

    if not good.any():
        return _none_of(batch, batch.num_rows, name, unit)
    kept = np.flatnonzero(good)
    columns, mask, ids = surely_good(batch.take(pa.array(kept)), goal, first, name, unit)
    numbers = first + kept[mask]
    whole = np.zeros(batch.num_rows, dtype=bool)
    whole[kept[mask]] = True
    return replace(columns, numbers=numbers), whole, ids


def _none_of(batch: Any, count: int, name: str, unit: str) -> tuple[PairColumns, NDArray[np.bool_], list[str | None]]:
    import pyarrow as pa

    none = np.zeros(0, dtype=np.uint64)
    empty, flags = pa.array([], pa.string()), np.zeros(0, dtype=bool)
    columns = PairColumns(
        batch.column("chosen").slice(0, 0), (empty, empty), np.zeros((0, 2)), none, none, flags, flags,
        np.zeros(0, dtype=np.int64), name, unit,
    )  # fmt: skip
    return columns, np.zeros(count, dtype=bool), []


def _prompt_agrees(batch: Any, contents: Any, first_user: Any, last_user: Any) -> NDArray[np.bool_]:
    import pyarrow as pa
    import pyarrow.compute as pc

    count = batch.num_rows
    users = [np.clip(at, 0, len(contents) - 1) for at in (first_user, last_user)]
    spoken = np.ones(count, dtype=bool)
    if "prompt" in batch.schema.names:
        prompt = batch.column("prompt")
        said = [np.asarray(pc.equal(prompt, contents.take(pa.array(at))).fill_null(False)) for at in users]
        spoken = (said[0] | said[1]) & np.asarray(pc.match_substring_regex(prompt, VISIBLE).fill_null(False))
    if "prompt_id" in batch.schema.names:
        spoken &= np.asarray(batch.column("prompt_id").is_valid())
    return spoken


def _ties(rewards: NDArray[np.float64], goal: GoalTemplate) -> NDArray[np.bool_]:
    values, inverse = np.unique(rewards, return_inverse=True)
    texts: dict[str, int] = {}
    codes = np.array([texts.setdefault(goal.write(*goal.goal_of(value)), len(texts)) for value in values.tolist()])
    first, second = codes[inverse.reshape(rewards.shape)].T
    return np.asarray(first == second)


def _all_in_row(flags: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.logical_and.reduceat(flags, starts)


def _codes(roles: Any) -> NDArray[np.int64]:
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(roles, pa.array(list(ROLE_CODES)))
    return np.asarray(found.fill_null(-1), dtype=np.int64)


def _field(part: Any, name: str) -> Any:
    import pyarrow.compute as pc

    return pc.struct_field(part, name)


def _is_number(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))
