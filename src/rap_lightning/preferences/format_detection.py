"""Detect the format of rows by their columns, and explain what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.data_report import describe_place
from rap_lightning.preferences.formats import FORMATS, Adapted, RowFormat
from rap_lightning.preferences.formats.base import Row, call_adapter
from rap_lightning.preferences.formats.context_columns import CONTEXT_COLUMNS
from rap_lightning.preferences.pairs import BadRow
from rap_lightning.preferences.readers import Chunk
from rap_lightning.preferences.rows_to_pairs import rename_columns
from rap_lightning.preferences.rules import Rules, adapter_of
from rap_lightning.preferences.sources import Source

LOOK = 1000  # rows from which the format is detected
SCORE_COLUMNS = {"score_chosen", "score_rejected"}
SIDE_SCORES = {"scores_chosen", "scores_rejected"}  # of attributes
OURS = {
    *SCORE_COLUMNS, "prompt", "prompt_id", "chosen", "rejected", "scores_chosen", "scores_rejected", "tools",
    "completions", "responses", "scores", "instruction", "response", "helpfulness", "answers", "conversations",
    *CONTEXT_COLUMNS,
}  # fmt: skip
"""Columns of the known formats. As keys of the option ``columns`` they show that the map is the wrong way round."""


def find_format(chunk: Chunk, rules: Rules, source: Source) -> RowFormat:
    """Return the format of the first rows, or the one that the options name."""
    chunk = chunk.head(LOOK)
    numbered = [(number, row) for number, row in chunk.rows() if isinstance(row, dict)]
    if not numbered:
        problems = {problem.reason: n for n, problem in reversed(list(chunk.rows())) if isinstance(problem, BadRow)}
        facts = "; ".join(f"{chunk.place(number)}: {reason}" for reason, number in problems.items())
        raise DataError(f"{source.path}: no row can be read. {facts}")
    rows = [row for _, row in numbered]
    _check_renaming(rows, rules, source)
    rows = [rename_columns(row, rules.columns) for row in rows]
    name = source.format or rules.format
    if name == "auto":
        found = _detected(rows, source, rules)
    elif kind := next((kind for kind in FORMATS if kind.name == name), None):
        found = _new(kind, rows, source, rules)
    else:
        found = _adapted(name, chunk, numbered, source, rules)
    if found.paired and rules.selection is not None:
        raise ConfigError(f"selection has no effect on {source.path}: its rows are pairs already; remove it.")
    if found.paired and rules.filters.near_duplicates is not None:
        raise ConfigError(f"filters.near_duplicates has no effect on {source.path}: its rows are pairs; remove it.")
    return found


def _new(kind: type[RowFormat], rows: Sequence[Row], source: Source, rules: Rules) -> RowFormat:
    attributes = rules.goal.attributes if rules.goal is not None else ()
    weights = rules.weight_column
    if weights is not None and not any(weights in row for row in rows):
        found = ", ".join(sorted({str(name) for row in rows for name in row}))
        raise ConfigError(f"weight_column: {source.path} has no column {weights!r}; found {found}.")
    made = kind(attributes, rules.scored, rules.blind or rules.rewards is not None, weights)
    made.look(rows)
    return made


def _adapted(name: str, chunk: Chunk, numbered: Sequence[tuple[int, Row]], source: Source, rules: Rules) -> RowFormat:
    """Return the format of rows that a user's function converts."""
    if rules.columns:
        raise ConfigError(
            f"columns has no effect beside an adapter ({name}), which reads {_listed(rules.columns)} by the file's own "
            "names. Rename the columns in the adapter, and remove the option columns."
        )
    adapt = adapter_of(name)
    adapted, failed = list[Row](), ""
    for number, row in numbered:
        try:
            made = call_adapter(adapt, row)
        except BadRow as problem:  # each failure is counted when the row is read
            place = describe_place(chunk.place(number), problem.column, problem.found)
            failed = failed or f"{place}: {problem.reason}"
            continue
        if made:
            adapted.append(made)
    if not adapted:
        raise DataError(
            failed or f"{source.path}: your adapter {name} left out all of the first {len(numbered):,} rows."
        )
    inner = _detected(adapted, source, rules)
    if inner.grouped:
        raise ConfigError(
            f"format: {name} returns grouped rows ({inner.name}). Return completions, one prompt per row."
        )
    return Adapted(adapt, inner)


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


def _detected(rows: Sequence[Row], source: Source, rules: Rules) -> RowFormat:
    columns = {name for row in rows for name in row}
    kind = next((kind for kind in FORMATS if any(wanted <= columns for wanted in kind.columns)), None)
    found = ", ".join(sorted(map(str, columns))) or "none"
    if kind is None:
        known = "\n".join(f"  {kind.name}: {kind.expects}" for kind in FORMATS)
        raise DataError(
            f"{source.path}: expected the columns of a known format; found the columns {found}."
            f"{_hint(columns, {'prompt', 'chosen', 'rejected', *SCORE_COLUMNS})}\n"
            "Rename them (columns {theirs: ours}), or write a function that converts a row into one of these formats "
            f"(format my_rows.adapt):\n{known}"
        )
    if kind.paired and rules.scored:
        missing = SCORE_COLUMNS - columns
        by_attribute = rules.goal is not None and rules.goal.attributes and columns >= SIDE_SCORES
        if missing and not by_attribute:
            raise DataError(
                f"{source.path}: expected {kind.expects}; missing {', '.join(sorted(missing))}; found the columns "
                f"{found}.{_hint(columns, missing)} Goals need a score of each response; unscored pairs can only be "
                "trained on without goals (goal null, relabel none)."
            )
    return _new(kind, rows, source, rules)


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
