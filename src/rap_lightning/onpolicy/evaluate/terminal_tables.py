"""The tables and lines of an evaluation on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rap_lightning.onpolicy.evaluate.evaluation_parts import GOAL_COLUMNS

if TYPE_CHECKING:
    from rich.table import Table

Figures = list[dict[str, Any]]
CONDITIONS = {"none": "no goal", "best": "best goal", "worst": "worst goal", "own": "its own goal"}


def show(document: dict[str, Any]) -> None:
    """Print a document of evaluation.json."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if not {"controllability", "length", "extrapolation"}.isdisjoint(document):
        console.print(_table_by_goal(document))
    for line in _lines_of_samples(document):
        console.print(line, soft_wrap=True)
    if "unlearning" in document:
        console.print(_table_of_unlearning(document))
    if "discrimination" in document:
        console.print(_line_of_discrimination(document["discrimination"]), soft_wrap=True)
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def _figures_by_column(document: dict[str, Any]) -> list[tuple[str, int, Figures]]:
    """Return title, decimals and figures of each column; a figure without a goal comes first."""
    found = []
    for column in GOAL_COLUMNS:
        figures = column.of(document)
        if figures is not None:
            without = column.of(document.get("without_goal", {}))
            title = column.title.format_map(document)
            found.append((title, column.decimals, [*([] if without is None else [without]), *figures]))
    return found


def _is_missing(figures: Figures) -> bool:
    return all(figure["value"] is None for figure in figures)


def _table_by_goal(document: dict[str, Any]) -> Table:
    from rich.table import Table

    prompts, samples = document["prompts"], document["samples_per_prompt"]
    table = Table(
        title=f"Asked for a goal, what comes back: {prompts:,} prompts, {samples} samples each",
        caption="mean [95% interval over prompts]; judge: " + str(document["judge"]), caption_justify="left",
    )  # fmt: skip
    table.add_column("goal", justify="right")
    columns = [column for column in _figures_by_column(document) if not _is_missing(column[2])]
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    labels = [*(["none"] if "without_goal" in document else []), *(f"{goal:g}" for goal in document["goals"])]
    for number, label in enumerate(labels):
        table.add_row(label, *(one(figures[number], decimals) for _, decimals, figures in columns))
    return table


def _lines_of_samples(document: dict[str, Any]) -> list[str]:
    lines = []
    for name, part in document.get("controllability", {}).items():
        if part["argmax"] is None:
            lines.append(f"{name}: no curve: {part['spearman'].get('why', '')}")
            continue
        peak = part["argmax"]["goal"]
        share = part["argmax"]["shares"][document["goals"].index(peak)]
        lines.append(
            f"{name}: Spearman of goal and mean score {one(part['spearman'], 2)}, of single scores "
            f"{one(part['spearman_samples'], 2)}; slope {one(part['slope'], 2)}; highest at goal {peak:g}"
            + (f" (in {share:.0%} of resamples)" if share is not None else "")
        )
    if "length" in document:
        lines.append(f"a response twice as long scores {one(document['length']['slope'], 2, sign=True)} within a goal")
    if "extrapolation" in document:
        beyond = [column.of(document) for column in GOAL_COLUMNS if column.path[0] == "extrapolation"]
        lines += sorted({f"not shown: {figures[0]['why']}" for figures in beyond if figures and _is_missing(figures)})
    return lines


def _table_of_unlearning(document: dict[str, Any]) -> Table:
    from rich.table import Table

    part = document["unlearning"]
    table = Table(
        title=f"Change of log-probability against {document['base']}, nats a response (nats a token)",
        caption="good rejected responses far below 0: unlearnt; bad chosen ones above 0: imitated. Both prompts alike.",
        caption_justify="left",
    )
    table.add_column("reward")
    table.add_column("role")
    for condition in part["conditions"]:
        table.add_column(CONDITIONS[condition], justify="right")
    table.add_column("prompts", justify="right")
    for number, (low, high) in reversed(list(enumerate(part["bins"]))):
        for role in ("chosen", "rejected"):
            cells = []
            for condition, by_role in part["conditions"].items():
                per_token = part["per_token"][condition][role][number]["value"]
                cell = one(by_role[role][number], 1, sign=True)
                cells.append(cell + (f" ({per_token:+.2f})" if per_token is not None else ""))
            n = part["conditions"]["none"][role][number]["n"]
            table.add_row(f"{low:.3g} to {high:.3g}" if role == "chosen" else "", role, *cells, f"{n:,}")
    return table


def _line_of_discrimination(part: dict[str, Any]) -> str:
    centred = part["centred"]
    return (
        f"scores read off the policy (likeliest of {len(part['goals'])} goals): Spearman with the judge's "
        f"{one(part['spearman'], 2)}, pairs ranked correctly {one(part['pair_accuracy'], 2)}; "
        f"centred {one(centred['spearman'], 2)} and {one(centred['pair_accuracy'], 2)}"
    )


def one(figure: dict[str, Any], decimals: int, *, sign: bool = False) -> str:
    """Return a figure with its interval, if they are known.

    >>> one({"value": 1.234, "low": 1.0, "high": 2.0}, 1), one({"value": None}, 2)
    ('1.2 [1.0, 2.0]', '-')
    """
    if figure["value"] is None:
        return "-"
    text = f"{figure['value']:{'+' if sign else ''}.{decimals}f}"
    if figure["low"] is None:
        return text
    return f"{text} [{figure['low']:.{decimals}f}, {figure['high']:.{decimals}f}]"
