"""Detect the format of rows by their columns, and explain what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.data_report import describe_place
from rap_lightning.preferences.formats import FORMATS, Adapted, RowFormat
from rap_lightning.preferences.formats.base import Row, call_adapter
from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.readers import Chunk
from rap_lightning.preferences.rows_to_pairs import rename_columns
from rap_lightning.preferences.rules import Rules, adapter_of
from rap_lightning.preferences.sources import Source

LOOK = 1000  # rows from which the format is detected
SCORE_COLUMNS = {"score_chosen", "score_rejected"}
OURS = {
    *SCORE_COLUMNS, "prompt", "prompt_id", "chosen", "rejected", "scores_chosen", "scores_rejected", "tools",
    "completions", "responses", "scores", "instruction", "response", "helpfulness", "answers", "conversations",
}  # fmt: skip
"""Columns of the known formats. As keys of the option ``columns`` they show that the map is the wrong way round."""


def find_format(chunk: Chunk, rules: Rules, source: Source) -> RowFormat:
    """Return the format of the first rows, or the one that the options name.

    Raises:
        DataError: the columns are of no known format, or there are no scores.
        ConfigError: the named format does not exist, or an option has no effect on it.
    """
    chunk = chunk.head(LOOK)
    numbered = [(number, row) for number, row in chunk.rows() if isinstance(row, dict)]
    rows = [row for _, row in numbered]
    _check_renaming(rows, rules, source)
    rows = [rename_columns(row, rules.columns) for row in rows]
    if not rows:
        problems = {problem.reason: n for n, problem in reversed(list(chunk.rows())) if isinstance(problem, BadRow)}
        facts = "; ".join(f"{chunk.place(number)}: {reason}" for reason, number in problems.items())
        raise DataError(f"{source.path}: no row can be read. {facts}")
    name = source.format or rules.format
    attributes = rules.goal.attributes if rules.goal is not None else ()
    scored = rules.scored
    if name not in ("auto", *(kind.name for kind in FORMATS)):
        adapt = adapter_of(name)
        if rules.columns:
            raise ConfigError(
                f"columns has no effect beside an adapter ({name}), which reads {_listed(rules.columns)} by the file's "
                "own names. Rename the columns in the adapter, and remove the option columns."
            )
        adapted, problem = _adapted(adapt, numbered, chunk)
        if not adapted:
            raise DataError(
                problem or f"{source.path}: your adapter {name} left out all of the first {len(rows):,} rows."
            )
        inner = _detected(adapted, source, rules, attributes, scored)
        if inner.grouped:
            raise ConfigError(
                f"format: {name} returns grouped rows ({inner.name}). Return completions, one prompt per row."
            )
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


def _adapted(
    adapt: Callable[[Row], Row | None], numbered: Sequence[tuple[int, Row]], chunk: Chunk
) -> tuple[list[Row], str | None]:
    """Return the adapted rows, and a message for the first one that failed; each failure is counted when it is read."""
    adapted, first = list[Row](), None
    for number, row in numbered:
        try:
            made = call_adapter(adapt, row)
        except BadRow as problem:
            first = first or f"{describe_place(chunk.place(number), problem.column, problem.found)}: {problem.reason}"
            continue
        if made:
            adapted.append(made)
    return adapted, first


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _check_renaming(rows: Sequence[Row], rules: Rules, source: Source) -> None:
    there = {name for row in rows for name in row}
    renamed = rules.columns or {}
    if renamed and set(renamed) <= OURS and not there & set(renamed) and there >= set(renamed.values()):
        turned = ", ".join(f"{ours}: {theirs}" for theirs, ours in renamed.items())
        raise ConfigError(
            f"columns is a map of {{theirs: ours}}, and this one is the other way round: {source.path} has the columns "
            f"{_listed(renamed.values())}, and none named {_listed(renamed)}. Write {{{turned}}}."
        )
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
            "Rename them (columns {theirs: ours}), or write a function that converts a row into one of these formats "
            f"(format my_rows.adapt):\n{known}"
        )
    row_format = kind(attributes, scored)
    if kind.paired and scored:
        missing = SCORE_COLUMNS - columns
        by_attribute = attributes and {"scores_chosen", "scores_rejected"} <= columns
        if missing and not by_attribute:
            raise DataError(
                f"{source.path}: expected {kind.expects}; missing {', '.join(sorted(missing))}; found the columns "
                f"{found}.{_hint(columns, missing)} Goals need a score of each response; unscored pairs can only be "
                "trained on without goals (goal null, relabel none)."
            )
    row_format.look(rows)
    return row_format


def _hint(columns: set[str], wanted: set[str]) -> str:
    if "scores_chosen" in columns:
        return " scores_chosen and scores_rejected are scores of attributes: use an AttributeGoal."
    hints = []
    for name in sorted(wanted - columns):
        words = set(name.split("_"))
        near = next((c for c in sorted(columns - wanted) if set(c.lower().replace("-", "_").split("_")) == words), None)
        near = near or next(iter(get_close_matches(name, sorted(columns - wanted), 1, 0.8)), None)
        if near is not None:
            hints.append((near, name))
    if not hints:
        return ""
    asked = ", ".join(f"{near} -> {name}" for near, name in hints)
    given = ", ".join(f"{near}: {name}" for near, name in hints)
    return f" Did you mean {asked}? Then use columns {{{given}}}."
