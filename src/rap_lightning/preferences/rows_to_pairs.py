"""One chunk of rows to scored pairs: parse, judge, filter, select, and count what happens to each row.

Read in this order: :func:`judged_rows` reads each row, or group of rows, into a conversation with responses and counts
bad rows; :func:`rows_to_pairs` makes pairs of these. Both look at one row at a time, so chunks can be processed in
parallel; checks across rows follow in :mod:`rap_lightning.preferences.cross_row_checks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.formats import RowFormat
from rap_lightning.preferences.formats.base import Row
from rap_lightning.preferences.hashing import hash_text, hash_turns
from rap_lightning.preferences.pairs import BadRow, Judged, Pair, Response, is_blank, make_pair
from rap_lightning.preferences.readers import ROWS, Chunk
from rap_lightning.preferences.relabelling import draw_goals, is_tie, repeats_best
from rap_lightning.preferences.rewards import CONTRADICTED
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import BestVsRandom
from rap_lightning.preferences.thoughts import Thinking, never_end, split_thoughts, treated

EXCHANGED = "score_chosen below score_rejected, exchanged so that the higher reward wins"
TIE = "tie: both scores print as the same goal"
TIE_RULES = {"drop": "", "chosen": "; kept under the chosen response's goal", "error": ", and ties are an error"}
BEST_ALREADY = "no best-goal pair: one of the two own goals is the best goal already"
OUTSIDE = "score outside the declared scale"
LEAVE_OUT = "Correct such rows, or drop and count them with bad_rows drop."
SCORES = "score_chosen, score_rejected"

RowGroup = tuple[str, list[Row] | BadRow]
"""The place of the first row, and rows that are read together (in most formats one), or why a row can't be read."""
Rows = Chunk | list[RowGroup]
"""Rows for one process: not parsed yet, or in groups."""


@dataclass
class ChunkPairs:
    """The pairs of one chunk."""

    report: DataReport
    pairs: list[Pair] = field(default_factory=list)
    prompt_ids: list[tuple[str, str, str]] = field(default_factory=list)  # (prompt_id, prompt, place) of kept rows


def rows_to_pairs(rows: Rows, rules: Rules, row_format: RowFormat, log_rows: bool = False) -> ChunkPairs:
    """Return the scored pairs of some rows."""
    out = ChunkPairs(DataReport("", "", names=rules.names, rows=[] if log_rows else None))
    for place, count, judged in judged_rows(rows, rules, row_format, out.report):
        try:
            pairs = list(_pairs(judged, rules, row_format, place, out.report))
        except BadRow as problem:
            _note_bad_row(problem, place, rules, out.report)
            continue
        out.report.kept += count
        out.pairs += pairs
        if judged.prompt_id is not None:
            out.prompt_ids.append((str(judged.prompt_id), judged.prompt, place))
    return out


# -- rows --------------------------------------------------------------------------------------------------------------


def judged_rows(
    rows: Rows, rules: Rules, row_format: RowFormat, report: DataReport
) -> Iterator[tuple[str, int, Judged]]:
    """Yield (place, number of rows, conversation) of rows with at least two usable responses; count the other rows."""
    groups = _single_rows(rows, rules.columns) if isinstance(rows, Chunk) else rows
    for place, group in groups:
        report.read += 1 if isinstance(group, BadRow) else len(group)
        try:
            if isinstance(group, BadRow):
                raise group
            for row in group:
                report.unread.update(row_format.unread(row))
            judged = row_format.read_row(group)
            if rules.thinking != "keep":
                judged = _treat_thoughts(judged, rules.thinking, place, report)
            if len(judged.responses) < 2:
                raise _too_few(judged.left_out)
            if rules.rewards is not None:
                judged = rules.rewards.rate(judged)
        except BadRow as problem:
            _note_bad_row(problem, place, rules, report)
            continue
        yield place, len(group), judged


def _treat_thoughts(judged: Judged, thinking: Thinking, place: str, report: DataReport) -> Judged:
    """Return a conversation whose responses have their thoughts removed, or no longer in their tags.

    Raises:
        BadRow: one of the two responses of a pair can't be used then.
    """
    good, bad, seen, changed = list[Response](), list[BadRow](), set[str](), False
    for response in judged.responses:
        text = treated(response.text, thinking)
        if never_end(text):
            bad.append(BadRow(response.column, "thoughts that never end, so that there is no answer"))
        elif is_blank(split_thoughts(text)[1]):
            bad.append(BadRow(response.column, "a response of thoughts alone"))
        elif text.strip() in seen:
            bad.append(BadRow(response.column, f"the same answer as another response (thinking {thinking})"))
        else:
            good.append(replace(response, text=text))
            changed = changed or text != response.text
        seen.add(text.strip())
    if bad and judged.paired:
        raise bad[0]
    if changed:
        report.note("noted", f"thoughts of responses: thinking {thinking}", place, "responses")
    return replace(judged, responses=good, left_out=[*judged.left_out, *bad])


def in_groups(chunks: Iterable[Chunk], row_format: RowFormat, columns: dict[str, str] | None) -> Iterator[Rows]:
    """Yield the rows of chunks, with rows that the format reads together in one list.

    Only formats with groups are parsed here. The chunks of all others are returned as they are, so that the processes
    that read them also parse them.
    """
    if not row_format.grouped:
        yield from chunks
        return
    groups = _groups(chunks, row_format, columns)
    while some := list(islice(groups, ROWS)):
        yield some


def _groups(chunks: Iterable[Chunk], row_format: RowFormat, columns: dict[str, str] | None) -> Iterator[RowGroup]:
    group: list[Row] = []
    start, key = "", None
    for chunk in chunks:
        for number, row in chunk.rows():
            place = chunk.place(number)
            if isinstance(row, BadRow):  # it does not end a group
                yield place, row
                continue
            row = rename_columns(row, columns)
            own = (chunk.name, row_format.group_key(row))
            if group and own != key:
                yield start, group
                group = []
            if not group:
                start, key = place, own
            group.append(row)
    if group:
        yield start, group


def _single_rows(chunk: Chunk, columns: dict[str, str] | None) -> Iterator[RowGroup]:
    for number, row in chunk.rows():
        yield chunk.place(number), row if isinstance(row, BadRow) else [rename_columns(row, columns)]


def rename_columns(row: Row, columns: dict[str, str] | None) -> Row:
    """Return a row with our column names, from {theirs: ours}."""
    return row if not columns else {columns.get(name, name): value for name, value in row.items()}


def _too_few(left_out: Sequence[BadRow]) -> BadRow:
    column = left_out[0].column if left_out else "responses"
    return BadRow(column, "fewer than 2 responses that can be used", left_out=left_out)


def _note_bad_row(problem: BadRow, place: str, rules: Rules, report: DataReport) -> None:
    """Count a row or pair that gives nothing: dropped, or a fault that stops the run."""
    for response in problem.left_out:
        report.note_bad_row("left_out", response, place)
    stops = problem.stops
    if not stops and rules.bad_rows == "error" and not problem.by_choice:
        problem.remedy, stops = problem.remedy or LEAVE_OUT, True
    report.note_bad_row("faults" if stops else "dropped", problem, place)


# -- pairs of a row ----------------------------------------------------------------------------------------------------


def _pairs(judged: Judged, rules: Rules, row_format: RowFormat, place: str, report: DataReport) -> Iterator[Pair]:
    """Yield the pairs of a row.

    Raises:
        BadRow: the row gives no pair.
    """
    if judged.uses_tools and not rules.tool_turns:
        raise BadRow("chosen, rejected", "tool calls, which need a chat template that renders them")
    if judged.prompt_id is not None and type(judged.prompt_id) is not row_format.id_type:
        raise BadRow("prompt_id", "an id of another type than in the first row", judged.prompt_id)
    rules.filters.check_prompt(judged)
    if not rules.relabelling.takes(judged.history):
        reason = f"not in the half of the prompts that relabel half uses (seed {rules.relabelling.seed})"
        raise BadRow("prompt", reason, by_choice=True)
    on_scale, off_scale = _on_scale(judged, rules, place, report)
    responses, filtered = rules.filters.responses(on_scale)
    left_out = [*judged.left_out, *off_scale, *filtered]
    if len(responses) < 2:
        raise _too_few(left_out)
    for problem in left_out:
        report.note_bad_row("left_out", problem, place)
    problems = []
    selected = _selected(judged, responses, rules)
    for first, second in selected:
        pair = make_pair(judged, first, second, place)
        try:
            yield _checked(pair, *((second, first) if second.reward > first.reward else (first, second)), rules, report)
        except BadRow as problem:
            problems.append(problem)
    last = problems.pop() if len(problems) == len(selected) else None
    for other in problems:
        _note_bad_row(other, place, rules, report)
    if last is not None:
        raise last


def _on_scale(judged: Judged, rules: Rules, place: str, report: DataReport) -> tuple[list[Response], list[BadRow]]:
    """Return the responses with rewards on the goal's scale, and why others are left out."""
    if rules.goal is None:
        return judged.responses, []
    good, bad, (low, high) = list[Response](), list[BadRow](), rules.goal.scale.judge_range
    for response in judged.responses:
        reward, column = response.reward, f"score_{response.column}" if judged.paired else response.column
        if reward in rules.goal.scale:
            good.append(response)
        elif rules.outside_scale == "clip":
            reason = f"{OUTSIDE}, clipped to its end"
            report.note("repaired", reason, place, column, f"{reward:g}", (reward, reward))
            good.append(replace(response, reward=min(max(reward, low), high)))
        else:
            stops = rules.outside_scale == "error"
            remedy = (
                f"The declared scale is from {low:g} to {high:g}. Declare the judge's own (goal.scale.low and .high), "
                "map it with a LinearScale, correct the scores, or leave such pairs out with outside_scale drop."
            )
            problem = BadRow(column, OUTSIDE, reward, stops=stops, by_choice=True, remedy=remedy, span=(reward, reward))
            if stops or judged.paired:
                raise problem
            bad.append(problem)
    return good, bad


def _selected(judged: Judged, responses: list[Response], rules: Rules) -> list[tuple[Response, Response]]:
    if judged.paired:
        return [(responses[0], responses[1])]
    texts = "".join(sorted(response.text for response in responses))
    key = f"{hash_turns(judged.history)} {hash_text(texts)}"
    selection = rules.selection or BestVsRandom()
    same_goal = lambda a, b: is_tie(rules.goal, (a.reward, b.reward), (a.attributes, b.attributes))  # noqa: E731
    selected = selection.select(responses, same_goal, key)
    if not selected:
        raise BadRow(responses[0].column, f"{TIE}, for all responses", by_choice=True)
    return selected


def _checked(pair: Pair, better: Response, worse: Response, rules: Rules, report: DataReport) -> Pair:
    """Apply the filters and the rule for ties to a pair."""
    rules.filters.check_pair(better, worse)
    if rules.goal is not None and is_tie(rules.goal, pair.rewards, pair.attributes):
        equal = " (equal)" if pair.rewards[0] == pair.rewards[1] else ""
        reason = f"{TIE}{equal}{TIE_RULES[rules.ties]}"
        if rules.ties != "chosen":
            raise BadRow(SCORES, reason, stops=rules.ties == "error", by_choice=True)
        report.note("noted", reason, pair.place, SCORES)
        pair = replace(pair, tie=True)
    elif rules.goal is not None:
        if rules.relabelling.best_goal and repeats_best(pair, rules.goal, rules.relabelling):
            report.note("noted", BEST_ALREADY, pair.place, SCORES)
        for reason in draw_goals(pair, rules.goal, rules.relabelling).left_out:
            report.note("noted", reason, pair.place, SCORES)
    if pair.exchanged:
        report.note("repaired", EXCHANGED if rules.rewards is None else CONTRADICTED, pair.place, SCORES)
    for text, side in zip(pair.responses, (better, worse), strict=True):
        if "\0" in text:
            report.note("noted", "U+0000 in the text, which is kept", pair.place, side.column)
    return pair
