"""One chunk of rows to scored pairs: judge, select, filter, count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rap_lightning.preferences.columns import PairColumns, fits, surely_good
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.formats import RowFormat, ScoredPairs
from rap_lightning.preferences.formats.base import Row
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import BadRow, Judged, Pair, Response, make_pair
from rap_lightning.preferences.readers import Chunk, an_object
from rap_lightning.preferences.relabelling import is_tie
from rap_lightning.preferences.rewards import CONTRADICTED
from rap_lightning.preferences.row_groups import Rows, groups
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import BestVsRandom

EXCHANGED = "score_chosen below score_rejected, exchanged so that the higher reward wins"
TIE = "tie: both scores print as the same goal"
TIE_RULES = {"drop": "", "chosen": "; kept under the chosen response's goal", "error": ", and ties are an error"}
OUTSIDE = "score outside the declared scale"
RESCALE = (
    "Declare the judge's scale (goal.scale.low and .high), map another one onto it (a LinearScale), mend the scores, "
    "or leave such pairs out with outside_scale drop."
)
LEAVE_OUT = "Mend such rows, or leave them out, counted, with bad_rows drop."


@dataclass
class Ingested:
    """What became of one chunk."""

    report: DataReport
    pairs: list[Pair] = field(default_factory=list)
    columns: PairColumns | None = None
    """The pairs, where all of them could be taken a column at a time."""
    ids: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(number, prompt_id, prompt, place) of kept rows that have an id."""
    outside: list[tuple[float, str, str]] = field(default_factory=list)
    """(reward, place, column) of rewards outside the scale, where they stop the run."""


def ingest(chunk: Chunk | Rows, rules: Rules, row_format: RowFormat, listed: bool = False) -> Ingested:
    """The pairs of a chunk, looked at alone: a column at a time where that can be done, the others row by row.

    Args:
        chunk: of the source.
        rules: what is done with rows.
        row_format: of the rows.
        listed: the report lists all that it counts, in the order of rows.
    """
    out = Ingested(DataReport("", "", names=rules.names, rows=[] if listed else None))
    _ingest(chunk, rules, row_format, out)
    if out.report.rows is not None:
        out.report.rows.sort(key=lambda row: row.get("line") or row.get("row") or 0)
    return out


def _ingest(chunk: Chunk | Rows, rules: Rules, row_format: RowFormat, out: Ingested) -> None:
    if not isinstance(chunk, Chunk) or not _fast_lane(chunk, rules, row_format) or rules.goal is None:
        for number, rows in groups(chunk, rules, row_format):
            _ingest_row(number, rows, chunk, rules, row_format, out)
        return
    columns, good, ids = surely_good(chunk.payload, rules.goal, chunk.first, chunk.name, chunk.unit)
    for index in np.flatnonzero(~good).tolist():
        row = an_object(chunk.payload.slice(index, 1).to_pylist()[0])
        rows = row if isinstance(row, BadRow) else [row]
        _ingest_row(chunk.first + index, rows, chunk, rules, row_format, out)
    kept = _without_ties(columns, rules, out)
    ids = [own for own, keep in zip(ids, kept.tolist(), strict=True) if keep]
    columns = columns.take(kept)
    _note_columns(columns, ids, out)
    out.report.read += int(good.sum())
    out.report.kept += len(columns)
    if not out.pairs:
        out.columns = columns
    else:  # rows of both ways stand between each other
        order = {chunk.place(number): number for number in range(chunk.first, chunk.first + len(good))}
        out.pairs = sorted([*out.pairs, *columns.pairs()], key=lambda pair: order[pair.place])


def _fast_lane(chunk: Chunk, rules: Rules, row_format: RowFormat) -> bool:
    return (
        type(row_format) is ScoredPairs
        and not row_format.plain
        and not isinstance(chunk.payload, list)
        and not rules.columns
        and rules.relabelling.mode != "half"
        and rules.rewards is None
        and replace(rules.filters, repeats="keep") == Filters()
        and fits(chunk.payload, rules.goal)
    )


def _note_columns(columns: PairColumns, ids: list[str | None], out: Ingested) -> None:
    if columns.exchanged.any():
        numbers = columns.numbers[columns.exchanged].tolist()
        out.report.note_all("repaired", EXCHANGED, numbers, columns.place_of, "score_chosen, score_rejected")
    if ids and ids[0] is not None:
        numbers = columns.numbers.tolist()
        for index, (own, prompt) in enumerate(zip(ids, _first_users(columns), strict=True)):
            assert own is not None, "rows without an id go row by row"
            out.ids.append((numbers[index], own, prompt, columns.place(index)))


def _first_users(columns: PairColumns) -> list[str]:
    histories = columns.turns.to_pylist()
    return [next(turn["content"] for turn in history if turn["role"] == "user") for history in histories]


def _without_ties(columns: PairColumns, rules: Rules, out: Ingested) -> NDArray[np.bool_]:
    kind = {"drop": "dropped", "chosen": "noted", "error": "faults"}[rules.ties]
    equal = columns.rewards[:, 0] == columns.rewards[:, 1]
    for mask, reason in ((columns.tie & ~equal, TIE), (columns.tie & equal, f"{TIE} (equal)")):
        if mask.any():
            numbers = columns.numbers[mask].tolist()
            told = f"{reason}{TIE_RULES[rules.ties]}"
            out.report.note_all(kind, told, numbers, columns.place_of, "score_chosen, score_rejected")
    return ~columns.tie if rules.ties != "chosen" else np.ones(len(columns), dtype=bool)


def _ingest_row(
    number: int, rows: list[Row] | BadRow, chunk: Chunk | Rows, rules: Rules, row_format: RowFormat, out: Ingested
) -> None:
    place = out.report.row = chunk.place(number)
    out.report.number = number
    out.report.read += 1 if isinstance(rows, BadRow) else len(rows)
    try:
        if isinstance(rows, BadRow):
            raise rows
        judged = judged_of(rows, rules, row_format)
        pairs = list(_pairs(judged, rules, row_format, place, out))
    except BadRow as problem:
        for response in getattr(problem, "left_out", []):
            _problem(out, response, place, rules, "left_out")
        _problem(out, problem, place, rules, "dropped")
        return
    if pairs:
        out.report.kept += 1 if row_format.group_key(rows[0]) is None else len(rows)
        out.pairs += pairs
        if judged.prompt_id is not None:
            out.ids.append((number, str(judged.prompt_id), judged.prompt, place))


def _pairs(judged: Judged, rules: Rules, row_format: RowFormat, place: str, out: Ingested) -> Iterator[Pair]:
    if judged.uses_tools and not rules.tool_turns:
        raise BadRow("chosen, rejected", "tool calls, which need a chat template that shows them")
    if judged.prompt_id is not None and type(judged.prompt_id) is not row_format.id_type:
        raise BadRow("prompt_id", "an id of another type than the first row's", judged.prompt_id)
    rules.filters.check_prompt(judged)
    if not rules.relabelling.takes(judged.history):
        reason = f"not in the half of the prompts that relabel half takes (seed {rules.relabelling.seed})"
        raise BadRow("prompt", reason, by_choice=True)
    responses = _in_scale(judged, rules, place, out)
    if responses is None:
        return
    if rules.filters.on_responses:
        responses, left_out = rules.filters.responses(responses)
        judged.left_out.extend(left_out)
    for problem in judged.left_out:
        _problem(out, problem, place, rules, "left_out")
    if len(responses) < 2:
        column = judged.left_out[-1].column if judged.left_out else "responses"
        raise BadRow(column, "fewer than 2 responses that can be used")
    if row_format.paired:
        chosen = [(responses[0], responses[1])]
    else:
        selection = rules.selection or BestVsRandom()
        texts = "".join(sorted(response.text for response in responses))
        key = f"{hash_turns(judged.history)} {hash_text(texts)}"
        chosen = selection.select(responses, partial(_same_goal, goal=rules.goal), key)
        if not chosen:
            raise BadRow(responses[0].column, f"{TIE}, for all responses", by_choice=True)
    problems = []
    for first, second in chosen:
        pair = make_pair(judged, first, second, place)
        try:
            better, worse = (second, first) if pair.exchanged else (first, second)
            yield _checked(pair, better, worse, rules, out)
        except BadRow as problem:
            problems.append(problem)
    last = problems.pop() if len(problems) == len(chosen) else None
    for other in problems:
        _problem(out, other, place, rules, "dropped")
    if last is not None:
        raise last  # no pair is left of the row


def _checked(pair: Pair, better: Response, worse: Response, rules: Rules, out: Ingested) -> Pair:
    rules.filters.check_pair(better, worse)
    if rules.goal is not None and is_tie(pair, rules.goal):
        pair = _tied(pair, rules, out)
    if pair.exchanged:
        reason = EXCHANGED if rules.rewards is None else CONTRADICTED
        out.report.note("repaired", reason, pair.place, "score_chosen, score_rejected")
    for text, side in zip(pair.responses, (better, worse), strict=True):
        if "\0" in text:
            out.report.note("noted", "U+0000 in the text, kept as it is", pair.place, side.column)
    return pair


def _tied(pair: Pair, rules: Rules, out: Ingested) -> Pair:
    equal = pair.rewards[0] == pair.rewards[1]
    reason = TIE + (" (equal)" if equal else "")
    reason += TIE_RULES[rules.ties]
    if rules.ties != "chosen":
        raise BadRow("score_chosen, score_rejected", reason, stops=rules.ties == "error", by_choice=True)
    out.report.note("noted", reason, pair.place, "score_chosen, score_rejected")
    return replace(pair, tie=True)


def _in_scale(judged: Judged, rules: Rules, place: str, out: Ingested) -> list[Response] | None:
    """The responses whose rewards lie on the scale; None where the run must stop."""
    if rules.goal is None:
        return judged.responses
    good, low_high = [], rules.goal.scale.judge_range
    for response in judged.responses:
        column = f"score_{response.column}" if judged.paired else response.column
        if response.reward in rules.goal.scale:
            good.append(response)
        elif rules.outside_scale == "error":
            out.outside.append((response.reward, place, column))
        elif rules.outside_scale == "clip":
            clipped = min(max(response.reward, low_high[0]), low_high[1])
            note = out.report.note("repaired", f"{OUTSIDE}, clipped to its end", place, column, f"{response.reward:g}")
            note.learn((response.reward, response.reward), "")
            good.append(replace(response, reward=clipped))
        elif judged.paired:
            raise _outside(column, response.reward)
        else:
            judged.left_out.append(_outside(column, response.reward))
    stopped = rules.outside_scale == "error" and len(good) < len(judged.responses)
    return None if stopped else good


def _outside(column: str, reward: float) -> BadRow:
    problem = BadRow(column, OUTSIDE, reward, by_choice=True)
    problem.span = (reward, reward)
    return problem


def _same_goal(a: Response, b: Response, goal: GoalTemplate | None) -> bool:
    if goal is None or a.reward == b.reward:
        return a.reward == b.reward
    return goal.write(*goal.goal_of(a.reward, a.attributes)) == goal.write(*goal.goal_of(b.reward, b.attributes))


def _problem(out: Ingested, problem: BadRow, place: str, rules: Rules, kind: str) -> None:
    out.report.problem("faults" if stops(problem, rules) else kind, problem, place)


def stops(problem: BadRow, rules: Rules) -> bool:
    """Whether a run ends at a row; one that ends it because the rules say so has that for a remedy."""
    if not problem.stops and rules.bad_rows == "error" and not problem.by_choice:
        problem.remedy = problem.remedy or LEAVE_OUT
        return True
    return problem.stops


def judged_of(rows: list[Row], rules: Rules, row_format: RowFormat) -> Judged:
    """A row's conversation and responses, with the rewards that count."""
    judged = row_format.read(rows)
    return judged if rules.rewards is None else rules.rewards.rate(judged)
