"""From a source to scored pairs. Every command and every run reads its data through this file.

Each chunk of rows is processed alone, so that processes can share the work (``rows_to_pairs.py``); checks across rows
follow in order (``cross_row_checks.py``). The result does not depend on the number of processes or the size of chunks.

:func:`read_pairs` yields pairs, :func:`read_judged` all responses before selection, and :func:`fit_scale` fits a scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from rap_lightning.errors import DataError
from rap_lightning.preferences.cross_row_checks import CrossRowChecks
from rap_lightning.preferences.data_report import DataReport, merge_spans
from rap_lightning.preferences.format_detection import find_format
from rap_lightning.preferences.formats import RowFormat
from rap_lightning.preferences.pairs import Judged, Pair
from rap_lightning.preferences.process_pool import map_in_order
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rows_to_pairs import Rows, in_groups, judged_rows, rows_to_pairs
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.scales import RewardScale
from rap_lightning.preferences.sources import Source, chunks_of
from rap_lightning.progress_bar import progress as progress_bar


def read_pairs(
    source: Source, split: str, rules: Rules, report: DataReport, *,
    num_proc: int | None = None, streaming: bool = False, collect_faults: bool = False, progress: bool = True,
) -> Iterator[Pair]:  # fmt: skip
    """Yield the scored pairs of a split in order, and count rows in ``report`` as they are read.

    Args:
        source: where to read from.
        split: name of the split.
        rules: the options of reading.
        report: gets the counts.
        num_proc: processes that share the work; by default one.
        streaming: look at each row alone, in constant memory: repeats and contradictions are not detected.
        collect_faults: count faults, instead of stopping at the first chunk that has some.
        progress: show progress if reading takes more than a few seconds.

    Raises:
        DataError: a source that can't be read, rows of no known format, a fault, scores outside the declared scale, or
            no pair at the end.
    """
    row_format, chunks = _open(source, split, rules, streaming=streaming)
    report.names = rules.names
    work = partial(rows_to_pairs, rules=rules, row_format=row_format, log_rows=report.rows is not None)
    across = CrossRowChecks(rules, report)
    with progress_bar(desc=f"reading {split}", unit=" rows", delay=2, disable=not progress) as bar:
        for part in map_in_order(work, chunks, num_proc):
            report.add(part.report)
            bar.update(part.report.read)
            pairs = part.pairs if streaming else across.keep(part)
            if not collect_faults:
                raise_faults(report)
            for pair in pairs:
                made = rules.relabelling.made_of(pair, rules.goal)
                report.count_pair(pair, len(made), rules.weight_column is not None)
            yield from pairs
    if not report.pairs and not collect_faults:
        raise DataError(f"{source.path} (split {split}): no pair is left to train on.\n" + "\n".join(report.lines()))


def read_judged(source: Source, split: str, rules: Rules, *, num_proc: int | None = None) -> Iterator[Judged]:
    """Yield the conversations of a split with all responses that can be used, before any selection."""
    report = DataReport(source.path, split)
    row_format, chunks = _open(source, split, rules)
    for part, judged in map_in_order(partial(_judged, rules=rules, row_format=row_format), chunks, num_proc):
        report.add(part)
        raise_faults(report)
        yield from judged


def _judged(rows: Rows, rules: Rules, row_format: RowFormat) -> tuple[DataReport, list[Judged]]:
    report = DataReport("", "", names=rules.names)
    return report, [judged for _, _, judged in judged_rows(rows, rules, row_format, report)]


def _open(source: Source, split: str, rules: Rules, *, streaming: bool = False) -> tuple[RowFormat, Iterator[Rows]]:
    chunks = chunks_of(source, split, streaming=streaming)
    first = next(chunks, None)
    if first is None:
        raise DataError(f"{source.path} (split {split}) has no rows.")
    row_format = find_format(first, rules, source)
    return row_format, in_groups(chain([first], chunks), row_format, rules.columns)


def raise_faults(report: DataReport) -> None:
    """Raise DataError with all faults counted so far, if there are any."""
    if report.faults:
        lines = [f"  {t.first}: {reason}{t.range_text} ({t.count:,} so far)" for reason, t in report.faults.items()]
        lines += [f"  {remedy}" for remedy in report.remedies()]
        count = sum(tally.count for tally in report.faults.values())
        found = f"{count:,} fault{'' if count == 1 else 's'} found"
        raise DataError(f"{report.source} (split {report.split}): {found}:\n" + "\n".join(lines))


# -- the goal's scale and the rewards ----------------------------------------------------------------------------------


def fit_scale(rules: Rules, sources: Sequence[Source], split: str, *, num_proc: int | None = None) -> bool:
    """Fit the open numbers of the goal's scale to a split of the sources; return whether there were any."""
    if rules.goal is None or not rules.goal.needs_fit:
        return False
    rules.goal.fit([r for source in sources for r in rewards_of(source, split, rules, num_proc=num_proc)])
    rules.goal.check_differ()
    return True


def rewards_of(source: Source, split: str, rules: Rules, *, num_proc: int | None = None) -> list[float]:
    """Return the rewards of all responses that can be used, in the judge's units."""
    any_scale = replace(
        rules, goal=None, relabelling=Relabelling("none"), ties="drop", outside_scale="error", bad_rows="drop"
    )
    judged = read_judged(source, split, any_scale, num_proc=num_proc)
    rewards = [response.reward for one in judged for response in one.responses]
    if not rewards:
        raise DataError(f"{source.path} (split {split}): no reward to fit the scale to.")
    return rewards


def unreached_goal_note(rules: Rules, reports: Sequence[DataReport]) -> str | None:
    """Return a note if no pair of the training split states the best goal, which is the one asked for at inference.

    The declared scale is then probably wider than the judge's. Fitted scales always reach their best goal.
    """
    goal, span = rules.goal, None
    for report in reports:
        span = merge_spans(span, report.rewards)
    if goal is None or span is None or type(goal.scale) is not RewardScale or not rules.relabelling.conditioned:
        return None
    if rules.relabelling.best_goal or rules.relabelling.goals_per_pair:
        return None  # goals that no response has are stated too
    low, high, scale = *span, goal.scale
    if goal.state(scale.goal(high), goal.best_attributes) == goal.state_best:
        return None
    best, highest = scale.printed(goal.best), scale.printed(high)
    return (
        f"note: no reward is above {high:g} on the scale from {scale.low:g} to {scale.high:g} (the lowest is {low:g}), "
        f"so the best goal, {best}, is never trained on. If the judge's scale ends earlier, declare it with "
        f"goal.scale.high; if the judge only gives no more, ask for {highest} instead of {best}."
    )
