"""From a source to scored pairs: the one road that every command and every run takes.

Rows are taken apart in chunks, each on its own, so that processes can share the work; what needs all rows (repeats,
contradictions, ids that stand for two prompts) is looked at afterwards, in order. The result depends neither on the
number of processes nor on the size of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from rap_lightning.errors import DataError
from rap_lightning.preferences.columns import PairColumns
from rap_lightning.preferences.cross_row_checks import AcrossRows
from rap_lightning.preferences.data_report import DataReport, at
from rap_lightning.preferences.format_detection import find_format
from rap_lightning.preferences.formats import RowFormat
from rap_lightning.preferences.ingest import OUTSIDE, RESCALE, ingest, judged_of, stops
from rap_lightning.preferences.pairs import BadRow, Judged, Pair
from rap_lightning.preferences.process_pool import in_order
from rap_lightning.preferences.readers import Chunk
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.row_groups import Rows, groups, whole_groups
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source, chunks_of

T = TypeVar("T")


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
    report.names = rules.names
    work = partial(ingest, rules=rules, row_format=row_format, listed=report.rows is not None)
    across = AcrossRows(rules, report)
    bar = tqdm(desc=f"reading {split}", unit=" rows", delay=2, disable=not progress or None)
    with bar:
        for part in in_order(work, chunks, num_proc):
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
            report.saw_rewards(*_lowest_and_highest(kept))
            report.pairs += len(kept)
            report.relabelled += (len(kept) - ties) * len(rules.relabelling.origins)
            report.relabelled += ties * len(rules.relabelling.of_ties)
            yield kept
    if not report.pairs and not collect_faults:
        raise DataError(f"{source.path} (split {split}): no pair is left to train on.\n" + "\n".join(report.lines()))


def _lowest_and_highest(kept: PairColumns | list[Pair]) -> tuple[float, float]:
    if isinstance(kept, PairColumns):
        return float(kept.rewards.min()), float(kept.rewards.max())
    return min(pair.rewards[1] for pair in kept), max(pair.rewards[0] for pair in kept)


def _opened(
    source: Source, split: str, rules: Rules, *, streaming: bool = False
) -> tuple[RowFormat, Iterator[Chunk | Rows]]:
    """The format of a source's rows, and its chunks."""
    chunks = chunks_of(source, split, streaming=streaming)
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{source.path} (split {split}) has no rows.")
    row_format = find_format(first, rules, source)
    return row_format, whole_groups(chain([first], chunks), row_format, rules.columns)


def refuse_faults(report: DataReport) -> None:
    """Raise DataError where rows were found that make the whole file doubtful, or any bad row if that is asked for."""
    faults = dict(report.faults)
    if faults:
        lines = [f"  {tally.first}: {reason} ({tally.count:,} so far)" for reason, tally in faults.items()]
        lines += [f"  {remedy}" for remedy in dict.fromkeys(t.remedy for t in faults.values() if t.remedy)]
        count = sum(tally.count for tally in faults.values())
        found = f"{count:,} fault{'' if count == 1 else 's'} found"
        raise DataError(f"{report.source} (split {report.split}): {found}:\n" + "\n".join(lines))


def refuse_outside(outside: Sequence[tuple[float, str, str]], rules: Rules, report: DataReport) -> None:
    """Raise DataError where rewards lie outside the declared scale."""
    if not outside or rules.goal is None:
        return
    low, high = rules.goal.scale.judge_range
    rewards = [reward for reward, _, _ in outside]
    places = "; ".join(f"{at(place, report.named(column))} = {reward:g}" for reward, place, column in outside[:5])
    places += "; ..." if len(outside) > 5 else ""
    raise DataError(
        f"{report.source} (split {report.split}): expected scores from {low:g} to {high:g}, the declared scale; found "
        f"{len(outside):,} outside among {report.read:,} rows, from {min(rewards):g} to {max(rewards):g}: "
        f"{places}. {RESCALE}"
    )


def _count_outside(outside: Sequence[tuple[float, str, str]], report: DataReport) -> None:
    for reward, place, column in outside:
        report.note("faults", OUTSIDE, place, column, f"{reward:g}").learn((reward, reward), RESCALE)


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
    chunk: Chunk | Rows, rules: Rules, row_format: RowFormat, take: Callable[[Judged], list[T]]
) -> tuple[DataReport, list[T]]:
    """What is wanted of each conversation: processes hand over no more than that."""
    report, found = DataReport("", "", names=rules.names), list[T]()
    for number, rows in groups(chunk, rules, row_format):
        try:
            if isinstance(rows, BadRow):
                raise rows
            found += take(judged_of(rows, rules, row_format))
        except BadRow as problem:
            if stops(problem, rules):
                report.problem("faults", problem, chunk.place(number))
    return report, found


def _rewards(judged: Judged) -> list[float]:
    return [response.reward for response in judged.responses]


def _whole(judged: Judged) -> list[Judged]:
    return [judged]
