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
        return self.place_of(int(self.numbers[index]))

    def place_of(self, number: int) -> str:
        """A line or row of the file."""
        return f"{self.name} {self.unit} {number}"

    def places(self) -> list[str]:
        """Where each pair was read."""
        return [self.place_of(number) for number in self.numbers.tolist()]

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
    conversations = _conversations(batch)
    if conversations is None:
        return _none_of(batch, batch.num_rows, name, unit)
    good = conversations.lengths[0] == conversations.lengths[1]
    good &= conversations.lengths[0] >= 2
    if good.all():  # only rows of equal length can be laid side by side
        good = _talk_is_good(conversations) & _scores_are_good(batch, goal)
        good &= _prompt_agrees(batch, conversations)
    if not good.all():
        return _part(batch, good, goal, first, name, unit)
    ids = batch.column("prompt_id").to_pylist() if "prompt_id" in batch.schema.names else [None] * len(good)
    return _columns(conversations, _scores(batch), goal, first, name, unit), good, ids


@dataclass(frozen=True)
class _Conversations:
    """The chosen and the rejected conversation of n rows, their T turns one after another.

    Attributes:
        turns: Arrow structs of role and content.
        contents, roles: Arrow strings, and [T] codes of ROLE_CODES, -1 for any other.
        offsets: [n + 1], where each row's turns begin.
    """

    turns: tuple[Any, Any]
    contents: tuple[Any, Any]
    roles: tuple[NDArray[np.int64], NDArray[np.int64]]
    offsets: tuple[NDArray[np.int64], NDArray[np.int64]]

    @property
    def lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[n] turns of each row."""
        return np.diff(self.offsets[0]), np.diff(self.offsets[1])

    # what follows is the same on both sides, once rows are known to have as many turns

    @property
    def starts(self) -> NDArray[np.int64]:
        """[n] each row's first turn."""
        return self.offsets[0][:-1]

    @property
    def ends(self) -> NDArray[np.int64]:
        """[n] one past each row's last turn."""
        return self.offsets[0][1:]

    @property
    def is_last(self) -> NDArray[np.bool_]:
        """[T] whether a turn is its row's last, the response."""
        last = np.zeros(len(self.roles[0]), dtype=bool)
        last[self.ends - 1] = True
        return last

    @property
    def has_system(self) -> NDArray[np.bool_]:
        """[n] whether a row begins with a system message."""
        return np.asarray(self.roles[0][self.starts] == ROLE_CODES["system"])

    def responses(self) -> tuple[Any, Any]:
        """Arrow strings, the last contents of each side."""
        import pyarrow as pa

        at = pa.array(self.ends - 1)
        return self.contents[0].take(at), self.contents[1].take(at)


def _conversations(batch: Any) -> _Conversations | None:
    """None where there are no rows, or anything is null."""
    sides = [batch.column(side) for side in ("chosen", "rejected")]
    lists = [side.flatten() for side in sides]
    nulls = sum(column.null_count for column in (*sides, *_score_columns(batch)))
    nulls += sum(part.null_count + _field(part, name).null_count for part in lists for name in ("role", "content"))
    if nulls or batch.num_rows == 0:
        return None
    one, two = (
        (part, _field(part, "content"), _codes(_field(part, "role")), np.asarray(side.offsets, dtype=np.int64))
        for part, side in zip(lists, sides, strict=True)
    )
    # a slice of a batch has offsets into the whole
    return _Conversations(
        (one[0], two[0]), (one[1], two[1]), (one[2], two[2]), (one[3] - one[3][0], two[3] - two[3][0])
    )


def _talk_is_good(talk: _Conversations) -> NDArray[np.bool_]:
    """[n] one history, roles in turn, two visible responses that differ, nothing odd in them."""
    import pyarrow.compute as pc

    roles, starts, system, last = talk.roles, talk.starts, talk.has_system, talk.is_last
    same = np.asarray(pc.equal(*talk.contents)) & (roles[0] == roles[1])
    good = _all_in_row(same | last, starts)
    place = np.arange(len(last)) - np.repeat(starts + system, talk.lengths[0])
    expected = np.where(place < 0, 0, np.where(place % 2 == 0, 1, 2))
    good &= _all_in_row((roles[0] == expected) & (roles[1] == expected), starts)
    good &= (talk.lengths[0] - system) % 2 == 0
    responses = talk.responses()
    for response in responses:
        good &= np.asarray(pc.match_substring_regex(response, VISIBLE))
        good &= ~np.asarray(pc.match_substring_regex(response, ODD))
    return np.asarray(good & ~np.asarray(pc.equal(*(pc.utf8_trim_whitespace(response) for response in responses))))


def _score_columns(batch: Any) -> tuple[Any, Any]:
    return batch.column("score_chosen"), batch.column("score_rejected")


def _scores(batch: Any) -> NDArray[np.float64]:
    """[n, 2]"""
    import pyarrow as pa

    return np.stack([np.asarray(score.cast(pa.float64(), safe=False)) for score in _score_columns(batch)], 1)


def _scores_are_good(batch: Any, goal: GoalTemplate) -> NDArray[np.bool_]:
    scores, (low, high) = _scores(batch), goal.scale.judge_range
    return np.asarray((np.isfinite(scores) & (scores >= low) & (scores <= high)).all(1))


def _columns(
    talk: _Conversations, rewards: NDArray[np.float64], goal: GoalTemplate, first: int, name: str, unit: str
) -> PairColumns:
    """Rows that are all good, the better response first."""
    import pyarrow as pa
    import pyarrow.compute as pc

    count = len(rewards)
    exchanged = rewards[:, 1] > rewards[:, 0]
    winner, loser = responses = talk.responses()
    if exchanged.any():
        winner, loser = (pc.if_else(pa.array(exchanged), responses[1 - side], responses[side]) for side in (0, 1))
        rewards[exchanged] = rewards[exchanged][:, ::-1]
    history = np.flatnonzero(~talk.is_last)
    of_role = np.array([ROLE["system"], ROLE["user"], ROLE["assistant"]], dtype=np.uint64)
    told = hash_columns_of_turns(
        hash_column(talk.contents[0].take(pa.array(history))),
        of_role[talk.roles[0][history]],
        talk.starts - np.arange(count),  # each row before has lost its response
        talk.lengths[0] - 1,
    )
    turns = pa.ListArray.from_arrays(
        pa.array((talk.offsets[0] - np.arange(count + 1)).astype(np.int32)), talk.turns[0].take(pa.array(history))
    )
    win, lose, prime = hash_column(winner), hash_column(loser), np.uint64(PRIME)
    return PairColumns(
        turns=turns, responses=(winner, loser), rewards=rewards,
        ids=(told * prime + win) * prime + lose, keys=told * prime * prime + win + lose,
        exchanged=exchanged, tie=_ties(rewards, goal), numbers=np.arange(first, first + count), name=name, unit=unit,
    )  # fmt: skip


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


def _prompt_agrees(batch: Any, talk: _Conversations) -> NDArray[np.bool_]:
    """[n] a prompt column says what the first or the last user turn says, and has an id where ids are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    contents = talk.contents[0]
    users = [np.clip(at, 0, len(contents) - 1) for at in (talk.starts + talk.has_system, talk.ends - 2)]
    spoken = np.ones(batch.num_rows, dtype=bool)
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
