"""From rows to scored pairs: read, judge, select, filter, count. The one road that every command and every run takes.

Rows are taken apart in chunks, each on its own, so that processes can share the work; what needs all rows (repeats,
contradictions, ids that stand for two prompts) is looked at afterwards, in order. The result depends neither on the
number of processes nor on the size of chunks.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences import codekeys
from rap_lightning.preferences.columns import PairColumns, fits, surely_good
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.formats import FORMATS, Adapted, RowFormat, ScoredPairs
from rap_lightning.preferences.formats.base import Row, call_adapter
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.hashing import Hashes, hash_text, hash_turns, hash_unordered
from rap_lightning.preferences.pairs import BadRow, Judged, Pair, Response, make_pair
from rap_lightning.preferences.parallel import in_order
from rap_lightning.preferences.readers import Chunk, an_object
from rap_lightning.preferences.relabel import Relabelling, is_tie
from rap_lightning.preferences.report import DataReport, Tally, at
from rap_lightning.preferences.rewards import CONTRADICTED, RewardTable
from rap_lightning.preferences.seen import Seen
from rap_lightning.preferences.select import BestVsRandom, Selection
from rap_lightning.preferences.sources import Source, chunks_of

T = TypeVar("T")
EXCHANGED = "score_chosen below score_rejected, exchanged so that the higher reward wins"
LOOK = 1000  # rows that the format is found by
TIE = "tie: both scores print as the same goal"
TIE_RULES = {"drop": "", "chosen": "; kept under the chosen response's goal", "error": ", and ties are an error"}
OUTSIDE = "score outside the declared scale"
CONTRADICTION = "the same two responses to the same prompt, the other way round"
REPEAT = "a pair that was read before"
OTHER_PROMPT = "a prompt_id that stands for another prompt as well"
SCORE_COLUMNS = {"score_chosen", "score_rejected"}


@dataclass(frozen=True)
class Rules:
    """What is done with rows on the way to pairs.

    Args:
        goal: the goal template; None for plain pairs, which need no scores.
        relabelling: what each pair becomes.
        ties: a pair whose goals print the same: ``drop`` it, keep its ``chosen`` half, or stop with an ``error``.
        selection: of pairs from several responses; None is best against random.
        filters: what is left out on purpose.
        outside_scale: scores outside the goal's scale: stop with an ``error``, ``drop`` such pairs or responses, or
            ``clip`` them to the nearest end.
        bad_rows: rows that can't be used (an empty response, a missing score): ``drop`` and count them, or stop with an
            ``error``. A file that is broken or not what its first rows say stops in either case.
        format: of the rows: ``auto``, the name of a format, or the import path of a function that turns a row into one
            of a known format.
        columns: new names for columns: {theirs: ours}.
        tool_turns: keep conversations with tool calls; without a chat template that shows them they can't be used.
        rewards: a judge's, in the place of the scores that the data have or lack.
        blind: scores are not looked at, whatever stands there: for a judge that is yet to give its own.
    """

    goal: GoalTemplate | None = field(default_factory=OverallGoal)
    relabelling: Relabelling = field(default_factory=Relabelling)
    ties: Literal["drop", "chosen", "error"] = "drop"
    selection: Selection | None = None
    filters: Filters = field(default_factory=Filters)
    outside_scale: Literal["error", "drop", "clip"] = "error"
    bad_rows: Literal["drop", "error"] = "drop"
    format: str = "auto"
    columns: dict[str, str] | None = None
    tool_turns: bool = False
    rewards: RewardTable | None = None
    blind: bool = False

    def __post_init__(self) -> None:
        for option, least in (("outside_scale", "error"), ("ties", "drop")):
            if self.goal is None and getattr(self, option) != least:
                raise ConfigError(
                    f"{option} {getattr(self, option)} has no effect without a goal; remove one of the two."
                )
        if self.goal is None and self.relabelling.conditioned:
            raise ConfigError(
                f"relabel {self.relabelling.mode} needs a goal; use relabel none, or name a goal template."
            )
        if self.ties == "chosen" and not self.relabelling.of_ties:
            raise ConfigError(f"ties chosen has no effect with relabel {self.relabelling.mode}; remove one of the two.")
        if self.goal is not None and self.outside_scale != "error" and self.goal.scale.judge_range[0] == float("-inf"):
            raise ConfigError(
                f"outside_scale {self.outside_scale} has no effect with {type(self.goal.scale).__name__}, which states "
                "every reward by its nearest end; remove it."
            )

    @property
    def scored(self) -> bool:
        """Whether rows must have scores."""
        return self.goal is not None and self.rewards is None

    def unscored(self) -> Rules:
        """The same rows, whatever scores they have: nothing is selected, filtered or relabelled."""
        return Rules(
            None, Relabelling("none"), bad_rows=self.bad_rows, format=self.format, columns=self.columns,
            tool_turns=self.tool_turns, blind=True,
        )  # fmt: skip

    def describe(self) -> str:
        """Everything that changes the pairs, for cache keys."""
        goal = self.goal.describe() if self.goal is not None else None
        selection = codekeys.describe(self.selection or BestVsRandom())
        known = self.format in ("auto", *(kind.name for kind in FORMATS))
        adapter = self.format if known else codekeys.code_of(_import(self.format))
        options = (
            self.relabelling, self.ties, selection, self.filters.describe(), self.outside_scale, self.bad_rows, adapter,
            self.columns, self.tool_turns,
        )  # fmt: skip
        if self.rewards is not None:
            return repr((goal, options, self.rewards.describe()))
        if self.blind:
            return repr((goal, options, "blind"))
        return repr((goal, options))


@dataclass
class Ingested:
    """What became of one chunk."""

    report: DataReport
    pairs: list[Pair] = field(default_factory=list)
    columns: PairColumns | None = None
    """The pairs, where all of them could be taken a column at a time."""
    ids: list[tuple[int, str, str, str]] = field(default_factory=list)
    """(number, prompt_id, prompt, place) of kept rows that have an id."""
    outside: list[tuple[float, str]] = field(default_factory=list)
    """(reward, place) of rewards outside the scale."""


@dataclass(frozen=True)
class _Rows:
    """Rows that were taken apart already, with their numbers."""

    name: str
    unit: str
    numbered: list[tuple[int, Row | BadRow]]

    def place(self, number: int) -> str:
        return f"{self.name} {self.unit} {number}"

    def rows(self) -> Iterator[tuple[int, Row | BadRow]]:
        return iter(self.numbered)


# -- all rows ---------------------------------------------------------------------------------------------------------


def read_pairs(source: Source, split: str, rules: Rules, report: DataReport, **options: Any) -> Iterator[Pair]:
    """The scored pairs of a split, one by one; see :func:`read_blocks`."""
    for block in read_blocks(source, split, rules, report, **options):
        yield from block.pairs() if isinstance(block, PairColumns) else block


def read_blocks(
    source: Source, split: str, rules: Rules, report: DataReport, *,
    num_proc: int | None = None, streaming: bool = False, collect_faults: bool = False, progress: bool = True,
) -> Iterator[PairColumns | list[Pair]]:  # fmt: skip
    """The scored pairs of a split, in order and some at a time, counted into ``report`` as they are read.

    Args:
        source: where from.
        split: which.
        rules: what is done with rows.
        report: gets the counts.
        num_proc: processes that share the work; by default one.
        streaming: look at each row alone, so that memory does not grow at all: repeats and contradictions are not
            looked for.
        collect_faults: count faults too, instead of stopping at the first.
        progress: show a bar where it takes longer than two seconds.

    Raises:
        DataError: a source that can't be read, rows of no known format, a fault, scores outside the declared scale, or
            no pair left at the end.
    """
    from tqdm import tqdm

    row_format, chunks = _opened(source, split, rules, streaming=streaming)
    across = _AcrossRows(rules, report)
    bar = tqdm(desc=f"reading {split}", unit=" rows", delay=2, disable=not progress or None)
    with bar:
        for part in in_order(partial(ingest, rules=rules, row_format=row_format), chunks, num_proc):
            report.add(part.report)
            bar.update(part.report.read)
            if not collect_faults:
                refuse_faults(report)
                refuse_outside(part.outside, rules, report)
            elif part.outside:
                _count_outside(part.outside, report)
            kept = part.columns if part.columns is not None else part.pairs
            if not streaming:
                kept = across.check(part)
                if not collect_faults:
                    refuse_faults(report)
            if not len(kept):
                continue
            ties = int(kept.tie.sum()) if isinstance(kept, PairColumns) else sum(pair.tie for pair in kept)
            report.pairs += len(kept)
            report.relabelled += (len(kept) - ties) * len(rules.relabelling.origins)
            report.relabelled += ties * len(rules.relabelling.of_ties)
            yield kept
    if not report.pairs and not collect_faults:
        raise DataError(f"{source.path} (split {split}): no pair is left to train on.\n" + "\n".join(report.lines()))


def _opened(
    source: Source, split: str, rules: Rules, *, streaming: bool = False
) -> tuple[RowFormat, Iterator[Chunk | _Rows]]:
    """The format of a source's rows, and its chunks."""
    chunks = chunks_of(source, split, streaming=streaming)
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{source.path} (split {split}) has no rows.")
    row_format = find_format(first, rules, source)
    return row_format, _whole_groups(chain([first], chunks), row_format, rules.columns)


def find_format(chunk: Chunk, rules: Rules, source: Source) -> RowFormat:
    """The format of the first rows, or the one that is named.

    Raises:
        DataError: their columns are of no known format, or lack the scores.
        ConfigError: the named format does not exist, or an option has no effect on it.
    """
    chunk = chunk.head(LOOK)
    rows = [row for _, row in chunk.rows() if isinstance(row, dict)]
    _check_renaming(rows, rules, source)
    rows = [_renamed(row, rules.columns) for row in rows]
    if not rows:
        problems = {problem.reason: n for n, problem in reversed(list(chunk.rows())) if isinstance(problem, BadRow)}
        facts = "; ".join(f"{chunk.place(number)}: {reason}" for reason, number in problems.items())
        raise DataError(f"{source.path}: no row can be read. {facts}")
    name = source.format or rules.format
    attributes = rules.goal.attributes if rules.goal is not None else ()
    scored = rules.scored
    if name not in ("auto", *(kind.name for kind in FORMATS)):
        adapt = _import(name)
        try:
            adapted = [row for row in (call_adapter(adapt, row) for row in rows) if row]
        except BadRow as problem:
            raise DataError(f"{chunk.place(chunk.first)} and following: {problem.reason}") from problem
        if not adapted:
            raise DataError(f"{source.path}: your adapter {name} left out all of the first {len(rows):,} rows.")
        inner = _detected(adapted, source, rules, attributes, scored)
        if _grouping(inner):
            raise ConfigError(f"format: {name} gives rows in groups ({inner.name}); give completions, a prompt a row.")
        found: RowFormat = Adapted(adapt, inner)
    elif name == "auto":
        found = _detected(rows, source, rules, attributes, scored)
    else:
        found = next(kind for kind in FORMATS if kind.name == name)(attributes, scored)
        found.look(rows)
    found.blind = rules.blind or rules.rewards is not None
    if found.paired and rules.selection is not None:
        raise ConfigError(f"selection has no effect on {source.path}: its rows are pairs already; remove it.")
    if found.paired and rules.filters.near_duplicates is not None:
        raise ConfigError(f"filters.near_duplicates has no effect on {source.path}: its rows are pairs; remove it.")
    return found


def _check_renaming(rows: Sequence[Row], rules: Rules, source: Source) -> None:
    there = {name for row in rows for name in row}
    renamed = rules.columns or {}
    for theirs, ours in renamed.items():
        if theirs not in there:
            found = ", ".join(sorted(there))
            raise ConfigError(f"columns: {source.path} has no column {theirs!r} to rename; found {found}.")
        if ours in there and ours not in renamed:
            raise ConfigError(f"columns: {source.path} has a column {ours!r} already; {theirs!r} can't take its name.")


def _detected(rows: Sequence[Row], source: Source, rules: Rules, attributes: Sequence[str], scored: bool) -> RowFormat:
    columns = set().union(*(row.keys() for row in rows)) if rows else set()
    kind = next((kind for kind in FORMATS if kind.fits(columns)), None)
    found = ", ".join(sorted(map(str, columns))) or "none"
    if kind is None:
        known = "\n".join(f"  {kind.name}: {kind.expects}" for kind in FORMATS)
        raise DataError(
            f"{source.path}: expected the columns of a known format; found the columns {found}."
            f"{_hint(columns, {'prompt', 'chosen', 'rejected', *SCORE_COLUMNS})}\n"
            f"Rename columns with columns, or name a function that makes one of these of a row with format:\n{known}"
        )
    row_format = kind(attributes, scored)
    if kind.paired and scored:
        missing = SCORE_COLUMNS - columns
        by_attribute = attributes and {"scores_chosen", "scores_rejected"} <= columns
        if missing and not by_attribute:
            raise DataError(
                f"{source.path}: expected {kind.expects}; missing {', '.join(sorted(missing))}; found the columns "
                f"{found}.{_hint(columns, missing)} Goals state the judge's score of each response; unscored pairs can "
                "only be trained on without goals (goal null, relabel none)."
            )
    row_format.look(rows)
    return row_format


def _hint(columns: set[str], wanted: set[str]) -> str:
    if "scores_chosen" in columns:
        return " scores_chosen and scores_rejected hold scores of attributes: ask for them with an AttributeGoal."
    hints = []
    for name in sorted(wanted - columns):
        words = set(name.split("_"))
        near = next((c for c in sorted(columns - wanted) if set(c.lower().replace("-", "_").split("_")) == words), None)
        near = near or next(iter(get_close_matches(name, sorted(columns - wanted), 1, 0.8)), None)
        if near is not None:
            hints.append(f"{near} -> {name}")
    return f" Did you mean {', '.join(hints)}? Rename with columns." if hints else ""


def refuse_faults(report: DataReport) -> None:
    """Raise DataError where rows were found that make the whole file doubtful, or any bad row if that is asked for."""
    faults = dict(report.faults)
    if faults:
        lines = [f"  {tally.first}: {reason} ({tally.count:,} so far)" for reason, tally in faults.items()]
        raise DataError(
            f"{report.source} (split {report.split}): {sum(t.count for t in faults.values())} faults found:\n"
            + "\n".join(lines)
        )


def refuse_outside(outside: Sequence[tuple[float, str]], rules: Rules, report: DataReport) -> None:
    """Raise DataError where rewards lie outside the declared scale."""
    if not outside or rules.goal is None:
        return
    low, high = rules.goal.scale.judge_range
    rewards = [reward for reward, _ in outside]
    places = "; ".join(f"{place} = {reward:g}" for reward, place in outside[:5]) + ("; ..." if len(outside) > 5 else "")
    raise DataError(
        f"{report.source} (split {report.split}): expected scores from {low:g} to {high:g}, the declared scale; found "
        f"{len(outside):,} outside among {report.read:,} rows, from {min(rewards):g} to {max(rewards):g}: "
        f"{places}. Declare the judge's scale (goal.scale.low and .high), map another one onto it (a LinearScale), "
        "mend the scores, or leave such pairs out with outside_scale drop."
    )


def _count_outside(outside: Sequence[tuple[float, str]], report: DataReport) -> None:
    for reward, place in outside:
        report.note("faults", OUTSIDE, place, "", f"{reward:g}")


class _AcrossRows:
    """What only shows when rows are held against each other."""

    def __init__(self, rules: Rules, report: DataReport) -> None:
        self.rules, self.report = rules, report
        self.kind = "faults" if rules.bad_rows == "error" else "dropped"
        self.seen_pairs, self.seen_ids = Seen(), Seen()

    def check(self, part: Ingested) -> PairColumns | list[Pair]:
        """The pairs to keep."""
        wrong = self._check_ids(part)
        if part.columns is not None:
            return self._check_columns(part.columns, wrong)
        pairs = [pair for pair in part.pairs if pair.place not in wrong]
        histories = [hash_turns(pair.history) for pair in pairs]
        texts = [[hash_text(text) for text in pair.responses] for pair in pairs]
        keys = [hash_unordered(turns, *both) for turns, both in zip(histories, texts, strict=True)]
        mask = self._mask(_uints(keys), _uints([int(pair.id, 16) for pair in pairs]), [pair.place for pair in pairs])
        kept = [pair for pair, keep in zip(pairs, mask, strict=True) if keep]
        self.report.kept -= len({pair.place for pair in part.pairs} - {pair.place for pair in kept})
        return kept

    def _check_columns(self, columns: PairColumns, wrong: set[str]) -> PairColumns:
        kept = columns
        if wrong:
            kept = kept.take(np.array([place not in wrong for place in columns.places()]))
        kept = kept.take(self._mask(kept.keys, kept.ids, kept))
        self.report.kept -= len(columns) - len(kept)
        return kept

    def _mask(self, keys: Hashes, ids: Hashes, places: PairColumns | list[str]) -> NDArray[np.bool_]:
        known, before = self.seen_pairs.add(keys, ids)
        keep = np.ones(len(keys), dtype=bool)
        for index in np.flatnonzero(known).tolist():
            place = places.place(index) if isinstance(places, PairColumns) else places[index]
            if before[index] != ids[index]:
                self.report.note(self.kind, CONTRADICTION, place, "chosen, rejected")
                keep[index] = False
            elif self.rules.filters.repeats == "drop":
                self.report.note("dropped", REPEAT, place, "chosen, rejected")
                keep[index] = False
            else:
                self.report.note("noted", REPEAT, place, "chosen, rejected")
        return keep

    def _check_ids(self, part: Ingested) -> set[str]:
        """The places of rows whose prompt_id stood for another prompt before."""
        if not part.ids:
            return set()
        part.ids.sort(key=lambda found: found[0])
        keys, values = (
            _uints([hash_text(text) for text in column]) for column in list(zip(*part.ids, strict=True))[1:3]
        )
        known, before = self.seen_ids.add(keys, values)
        wrong = [part.ids[index][3] for index in np.flatnonzero(known & (before != values)).tolist()]
        for place in wrong:
            self.report.note(self.kind, OTHER_PROMPT, place, "prompt_id")
        return set(wrong)


# -- one chunk --------------------------------------------------------------------------------------------------------


def ingest(chunk: Chunk | _Rows, rules: Rules, row_format: RowFormat) -> Ingested:
    """The pairs of a chunk, looked at alone: a column at a time where that can be done, the others row by row."""
    out = Ingested(DataReport("", ""))
    if not isinstance(chunk, Chunk) or not _fast_lane(chunk, rules, row_format) or rules.goal is None:
        for number, rows in _groups(chunk, rules, row_format):
            _ingest_row(number, rows, chunk, rules, row_format, out)
        return out
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
    return out


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
    found = np.flatnonzero(columns.exchanged).tolist()
    if found:
        place = at(columns.place(found[0]), "score_chosen, score_rejected")
        number = int(columns.numbers[found[0]])
        out.report.repaired.setdefault(EXCHANGED, Tally()).add(place, len(found), number)
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
        found = np.flatnonzero(mask).tolist()
        if found:
            place = at(columns.place(found[0]), "score_chosen, score_rejected")
            tally = out.report.tallies(kind).setdefault(f"{reason}{TIE_RULES[rules.ties]}", Tally())
            tally.add(place, len(found), int(columns.numbers[found[0]]))
    return ~columns.tie if rules.ties != "chosen" else np.ones(len(columns), dtype=bool)


def _ingest_row(
    number: int, rows: list[Row] | BadRow, chunk: Chunk | _Rows, rules: Rules, row_format: RowFormat, out: Ingested
) -> None:
    place = out.report.row = chunk.place(number)
    out.report.number = number
    out.report.read += 1 if isinstance(rows, BadRow) else len(rows)
    try:
        if isinstance(rows, BadRow):
            raise rows
        judged = _read(rows, rules, row_format)
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
            out.outside.append((response.reward, f"{place}, column {column}"))
        elif rules.outside_scale == "clip":
            clipped = min(max(response.reward, low_high[0]), low_high[1])
            out.report.note("repaired", f"{OUTSIDE}, clipped to its end", place, column, f"{response.reward:g}")
            good.append(replace(response, reward=clipped))
        elif judged.paired:
            raise BadRow(column, OUTSIDE, response.reward, by_choice=True)
        else:
            judged.left_out.append(BadRow(column, OUTSIDE, response.reward, by_choice=True))
    stopped = rules.outside_scale == "error" and len(good) < len(judged.responses)
    return None if stopped else good


def _same_goal(a: Response, b: Response, goal: GoalTemplate | None) -> bool:
    if goal is None or a.reward == b.reward:
        return a.reward == b.reward
    return goal.write(*goal.goal_of(a.reward, a.attributes)) == goal.write(*goal.goal_of(b.reward, b.attributes))


def _problem(out: Ingested, problem: BadRow, place: str, rules: Rules, kind: str) -> None:
    stops = problem.stops or (rules.bad_rows == "error" and not problem.by_choice)
    out.report.problem("faults" if stops else kind, problem, place)


def _groups(chunk: Chunk | _Rows, rules: Rules, row_format: RowFormat) -> Iterator[tuple[int, list[Row] | BadRow]]:
    group: list[Row] = []
    start, key = 0, None
    for number, row in chunk.rows():
        if isinstance(row, BadRow):
            yield number, row
            continue
        row = _renamed(row, rules.columns)
        own = row_format.group_key(row)
        if own is None:
            yield number, [row]
            continue
        if group and own != key:
            yield start, group
            group = []
        if not group:
            start, key = number, own
        group.append(row)
    if group:
        yield start, group


def _whole_groups(
    chunks: Iterable[Chunk], row_format: RowFormat, columns: dict[str, str] | None
) -> Iterator[Chunk | _Rows]:
    """Chunks that no group of rows straddles."""
    held: list[tuple[int, Row | BadRow]] = []
    last: Chunk | None = None
    for chunk in chunks:
        if not _grouping(row_format):
            yield chunk
            continue
        if last is not None and last.name != chunk.name and held:
            yield _Rows(last.name, last.unit, held)
            held = []
        last = chunk
        held += [(n, row if isinstance(row, BadRow) else _renamed(row, columns)) for n, row in chunk.rows()]
        keys = [None if isinstance(row, BadRow) else row_format.group_key(row) for _, row in held]
        cut = next((i for i in range(len(keys) - 1, 0, -1) if keys[i] != keys[i - 1]), 0)
        if cut:
            yield _Rows(chunk.name, chunk.unit, held[:cut])
            held = held[cut:]
    if held and last is not None:
        yield _Rows(last.name, last.unit, held)


def _grouping(row_format: RowFormat) -> bool:
    return type(row_format).group_key is not RowFormat.group_key


def _renamed(row: Row, columns: dict[str, str] | None) -> Row:
    return row if not columns else {columns.get(name, name): value for name, value in row.items()}


def _uints(values: Sequence[int]) -> Hashes:
    return np.array(values, dtype=np.uint64)


def _import(path: str) -> Callable[[Row], Row | None]:
    module, _, name = path.rpartition(".")
    known = ", ".join(kind.name for kind in FORMATS)
    if not module:
        raise ConfigError(f"format: expected auto, {known}, or the import path of a function; found {path!r}.")
    try:
        function: Callable[[Row], Row | None] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"format: {path} can't be imported: {error}") from error
    if not callable(function):
        raise ConfigError(f"format: {path} is not a function of a row.")
    return function


def fit_scale(rules: Rules, sources: Sequence[Source], split: str, *, num_proc: int | None = None) -> bool:
    """Take the open numbers of the goal's scale from a split of the sources; whether there were any."""
    if rules.goal is None or not rules.goal.scale.needs_fit:
        return False
    rules.goal.scale.fit([r for source in sources for r in rewards_of(source, split, rules, num_proc=num_proc)])
    return True


def rewards_of(source: Source, split: str, rules: Rules, *, num_proc: int | None = None) -> list[float]:
    """The rewards of all responses that can be used, to fit a scale on; in the judge's units."""
    open_scale = replace(
        rules, goal=None, relabelling=Relabelling("none"), ties="drop", outside_scale="error", bad_rows="drop"
    )
    parts = _each(source, split, rules, partial(_taken, rules=open_scale, take=_rewards), num_proc)
    rewards = [reward for part in parts for reward in part]
    if not rewards:
        raise DataError(f"{source.path} (split {split}): no reward to fit the scale on.")
    return rewards


def read_judged(source: Source, split: str, rules: Rules, *, num_proc: int | None = None) -> Iterator[Judged]:
    """The conversations of a split with all responses that can be used, in order, before anything is selected.

    Raises:
        DataError: a source that can't be read, rows of no known format, or a fault.
    """
    for part in _each(source, split, rules, partial(_taken, rules=rules, take=_whole), num_proc):
        yield from part


def _each(
    source: Source, split: str, rules: Rules, work: Callable[..., tuple[DataReport, list[T]]], num_proc: int | None
) -> Iterator[list[T]]:
    """What is made of each chunk of a split; raises at the first fault."""
    report = DataReport(source.path, split)
    row_format, chunks = _opened(source, split, rules)
    for part, found in in_order(partial(work, row_format=row_format), chunks, num_proc):
        report.add(part)
        refuse_faults(report)
        yield found


def _taken(
    chunk: Chunk | _Rows, rules: Rules, row_format: RowFormat, take: Callable[[Judged], list[T]]
) -> tuple[DataReport, list[T]]:
    """What is wanted of each conversation: processes hand over no more than that."""
    report, found = DataReport("", ""), list[T]()
    for number, rows in _groups(chunk, rules, row_format):
        try:
            if isinstance(rows, BadRow):
                raise rows
            found += take(_read(rows, rules, row_format))
        except BadRow as problem:
            if problem.stops or (rules.bad_rows == "error" and not problem.by_choice):
                report.problem("faults", problem, chunk.place(number))
    return report, found


def _rewards(judged: Judged) -> list[float]:
    return [response.reward for response in judged.responses]


def _whole(judged: Judged) -> list[Judged]:
    return [judged]


def _read(rows: list[Row], rules: Rules, row_format: RowFormat) -> Judged:
    """A row's conversation and responses, with the rewards that count."""
    judged = row_format.read(rows)
    return judged if rules.rewards is None else rules.rewards.rate(judged)


def key_of(rules: Rules, prints: Sequence[str]) -> str:
    """Digest of everything that changes the pairs made of sources with these fingerprints."""
    return hashlib.sha256(json.dumps([rules.describe(), *prints]).encode()).hexdigest()[:16]
