"""Scored pairs, encoded once, seen as training pairs.

Each original pair is one row of an Arrow table with the prompt under either goal and both responses; training pairs are
found by index arithmetic over it (rap_lightning.preferences.relabel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from rap_lightning.batches.encode import Encoder, Notes
from rap_lightning.batches.sampler import BatchPlan, PairSize
from rap_lightning.errors import DataError
from rap_lightning.preferences.pairs import BadRow, read_pair
from rap_lightning.preferences.relabel import UNCONDITIONED, halves, is_tie, locate
from rap_lightning.preferences.report import DataReport

FORMAT = 2  # part of the cache key: raise it when the columns below or the encoding change
EXCHANGED = "score_chosen below score_rejected, exchanged so that the higher reward wins"


@dataclass(frozen=True)
class Example:
    """One training pair as token ids; see :class:`rap_lightning.batches.types.Batch` for the units."""

    pair_id: str
    origin: int
    goal: str | None
    rewards: tuple[float, float]
    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]


class EncodedPairs(Dataset[Any]):
    """2N training pairs (N without a goal) over a table of N encoded pairs."""

    def __init__(self, table: Any, conditioned: bool, max_length: int) -> None:
        self.table, self.conditioned, self.max_length = table, conditioned, max_length

    def __len__(self) -> int:
        return len(self.table) * halves(self.conditioned)

    def example(self, index: int) -> Example:
        """Training pair ``index``; responses are cut so that prompt and response fit ``max_length``."""
        row, half = locate(index, self.conditioned)
        pair = self.table[row]
        prompt = pair["prompt_ids"][half]
        room = self.max_length - max(map(len, pair["prompt_ids"]))  # the same under both goals, so cuts are too
        chosen, rejected = (pair["response_ids"][which][:room] for which in (half, 1 - half))
        return Example(
            pair_id=pair["pair_id"],
            origin=half if self.conditioned else UNCONDITIONED,
            goal=pair["goals"][half] if self.conditioned else None,
            rewards=(pair["rewards"][half], pair["rewards"][1 - half]),
            prompt_ids=prompt,
            chosen_ids=chosen,
            rejected_ids=rejected,
        )

    def sizes(self) -> list[PairSize]:
        """Tokens of every training pair, as :meth:`example` gives it, read from the columns' offsets alone."""
        lengths = []
        for rows in self.table.select_columns(["prompt_ids", "response_ids"]).with_format("arrow").iter(1000):
            lengths += list(zip(*(_lengths(rows[name]) for name in ("prompt_ids", "response_ids")), strict=True))
        found = []
        for index in range(len(self)):
            row, half = locate(index, self.conditioned)
            prompts, responses = lengths[row]
            room = self.max_length - max(prompts)
            chosen, rejected = (min(responses[which], room) for which in (half, 1 - half))
            found.append(PairSize(prompts[half], chosen, rejected))
        return found

    def __getitem__(self, plan: BatchPlan) -> tuple[BatchPlan, list[Example]]:
        """The examples of a whole batch: the sampler plans batches, not rows."""
        return plan, [self.example(index) for index in plan.indices]


def encode_pairs(
    rows: Any, encoder: Encoder, *, source: str, split: str, num_proc: int | None = None, drop_outside: bool = False
) -> tuple[EncodedPairs, DataReport]:
    """Validate, relabel and tokenise the rows of a scored-pairs table, with progress, cached by content.

    Args:
        rows: a ``datasets.Dataset`` with the columns of a scored pair.
        encoder: renders and tokenises; its goal template's scale is what scores must lie in.
        source, split: for the report.
        num_proc: processes that share the work.
        drop_outside: drop pairs with a score outside the declared scale instead of stopping.

    Raises:
        DataError: a score outside the declared scale (unless dropped), or no usable row.
    """
    goal = encoder.goal
    table = rows.map(
        _encode_rows,
        batched=True,
        batch_size=100,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_features(),
        fn_kwargs={"encoder": encoder},
        num_proc=num_proc,
        new_fingerprint=f"{rows._fingerprint}-{encoder.key()}-{FORMAT}",
        desc=f"encoding {split}",
    )
    report = DataReport(source, split, read=len(rows))
    keep = []
    outside: list[str] = []
    facts = table.select_columns(["dropped", "column", "repaired", "cut_prompt", "cut_response", "outside"])
    for index, row in enumerate(facts):
        number = index + 1
        if row["outside"] and drop_outside:
            report.note(report.dropped, "score outside the declared scale", number, row["column"])
        elif row["outside"]:
            outside.append(f"row {number} ({row['column']} = {row['outside']})")
        elif row["dropped"]:
            report.note(report.dropped, row["dropped"], number, row["column"])
        else:
            keep.append(index)
            for reason in row["repaired"]:
                report.note(report.repaired, reason, number, "chosen, rejected or prompt")
            if row["cut_prompt"]:
                report.note(report.truncated, "prompt text cut, goal kept", number, "prompt")
            for half, cut in enumerate(row["cut_response"]):
                if cut:
                    name = ("chosen", "rejected")[half]
                    report.note(report.truncated, f"end of the {name} response cut", number, name)
    if outside and goal is not None:
        shown = "; ".join(outside[:5]) + ("; ..." if len(outside) > 5 else "")
        raise DataError(
            f"{source} (split {split}): expected scores from {goal.scale.low:g} to {goal.scale.high:g}, the declared "
            f"scale; found {len(outside):,} rows outside: {shown}. Set --data.goal.scale.low and .high to the judge's "
            "scale, mend the scores, or drop such pairs with --data.outside_scale drop."
        )
    if not keep:
        reasons = "\n".join(report.lines())
        raise DataError(f"{source} (split {split}): no row is left to train on.\n{reasons}")
    pairs = EncodedPairs(table.select(keep), goal is not None, encoder.max_length)
    report.pairs, report.relabelled = len(keep), len(pairs)
    return pairs, report


def _lengths(column: Any) -> list[list[int]]:
    """The lengths of the inner lists of an Arrow column of lists of lists."""
    from pyarrow import compute

    inner = iter(compute.list_value_length(compute.list_flatten(column)).to_pylist())
    return [[next(inner) for _ in range(count)] for count in compute.list_value_length(column).to_pylist()]


def _encode_rows(batch: dict[str, list[Any]], indices: list[int], encoder: Encoder) -> dict[str, list[Any]]:
    columns = list(batch)
    encoded = [_encode_row({name: batch[name][i] for name in columns}, encoder) for i in range(len(indices))]
    return {name: [row[name] for row in encoded] for name in encoded[0]}


def _encode_row(row: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    try:
        return _encoded(row, encoder)
    except BadRow as problem:
        return _result(dropped=problem.reason, column=problem.column)


def _encoded(row: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
    pair, goal, notes = read_pair(row), encoder.goal, Notes()
    if goal is not None:
        for reward in pair.rewards:
            if reward not in goal.scale:
                column = "score_chosen" if row["score_chosen"] == reward else "score_rejected"
                return _result(outside=f"{reward:g}", column=column)
        if is_tie(pair, goal):
            reason = "tie: both scores print as the same goal" + (
                "" if pair.rewards[0] != pair.rewards[1] else " (equal)"
            )
            return _result(dropped=reason, column="score_rejected")
    goals: list[float | None] = list(pair.rewards) if goal is not None else [None]
    whole = [encoder.prompt(pair.history, reward, notes) for reward in goals]
    columns = ("rejected", "chosen") if pair.exchanged else ("chosen", "rejected")
    responses = [
        encoder.response(whole[0], text, notes, column) for text, column in zip(pair.responses, columns, strict=True)
    ]
    longest = max(map(len, responses))
    prompts = [encoder.fit(prompt, pair.history, longest) for prompt in whole]
    room = encoder.max_length - max(len(prompt.ids) for prompt in prompts)
    if pair.exchanged:
        notes.repaired.append(EXCHANGED)
    return _result(
        pair_id=pair.id,
        rewards=list(pair.rewards),
        goals=[goal.printed(reward) for reward in pair.rewards] if goal is not None else [],
        prompt_ids=[prompt.ids for prompt in prompts],
        response_ids=responses,
        repaired=sorted(set(notes.repaired)),
        cut_prompt=max(prompt.cut for prompt in prompts),
        cut_response=[max(0, len(ids) - room) for ids in responses],
    )


def _features() -> Any:
    """The columns of an encoded row. Left to be guessed, a column that is empty at first would refuse later values."""
    from datasets import Features, List, Value

    ids = List(List(Value("int32")))
    return Features(
        pair_id=Value("string"), rewards=List(Value("float64")), goals=List(Value("string")), prompt_ids=ids,
        response_ids=ids, dropped=Value("string"), column=Value("string"), outside=Value("string"),
        repaired=List(Value("string")), cut_prompt=Value("int64"), cut_response=List(Value("int64")),
    )  # fmt: skip


def _result(**values: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "pair_id": "",
        "rewards": [],
        "goals": [],
        "prompt_ids": [],
        "response_ids": [],
        "dropped": "",
        "column": "",
        "outside": "",
        "repaired": [],
        "cut_prompt": 0,
        "cut_response": [],
    }
    return empty | values
