"""An evaluation for people: tables on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

Figures = Sequence[dict[str, Any]]


def show(document: dict[str, Any]) -> None:
    """Print the tables of a document."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if "controllability" in document or "length" in document or "extrapolation" in document:
        console.print(_by_goal(document))
    for line in _curve(document):
        console.print(line, soft_wrap=True)
    if "unlearning" in document:
        console.print(_unlearning(document))
    for line in _discrimination(document):
        console.print(line, soft_wrap=True)
    for warning in document["warnings"]:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)


def _by_goal(document: dict[str, Any]) -> Any:
    from rich.table import Table

    columns: list[tuple[str, Figures, int]] = []
    for title, path, places in (
        (f"score at temperature {document['temperature']:g}", ("controllability", "sampled", "mean"), 2),
        ("greedy", ("controllability", "greedy", "mean"), 2),
        ("score at one length", ("length", "controlled"), 2),
        ("tokens", ("length", "tokens"), 1),
        ("reach best seen", ("extrapolation", "best_seen"), 2),
        ("reach best known", ("extrapolation", "best_known"), 2),
        (
            f"above {document['extrapolation']['p99']['score']:.3g} (p99)" if "extrapolation" in document else "",
            ("extrapolation", "p99", "share"),
            2,
        ),
    ):
        figures = _at(document, path)
        without = _at(document.get("without_goal", {}), path)
        if figures is not None:
            columns.append((title, ([] if without is None else [without]) + figures, places))
    prompts, samples = document["prompts"], document["samples_per_prompt"]
    table = Table(
        title=f"Asked for a goal, what comes back: {prompts:,} prompts, {samples} samples each",
        caption="mean [95% interval over prompts]; judge: " + str(document["judge"]), caption_justify="left",
    )  # fmt: skip
    table.add_column("goal", justify="right")
    shown = [column for column in columns if any(figure["value"] is not None for figure in column[1])]
    for name, _, _ in shown:
        table.add_column(name, justify="right")
    labels = [*(["none"] if "without_goal" in document else []), *(f"{goal:g}" for goal in document["goals"])]
    for number, label in enumerate(labels):
        table.add_row(label, *(one(figures[number], places) for _, figures, places in shown))
    return table


def _at(document: dict[str, Any], path: Sequence[str]) -> Any:
    found: Any = document
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _curve(document: dict[str, Any]) -> list[str]:
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
    beyond = [_at(document, ("extrapolation", *path)) or [] for path in (("best_seen",), ("best_known",))]
    beyond.append(_at(document, ("extrapolation", "p99", "share")) or [])
    missing = {figures[0]["why"] for figures in beyond if figures and all(f["value"] is None for f in figures)}
    return lines + [f"not shown: {why}" for why in sorted(missing)]


def _unlearning(document: dict[str, Any]) -> Any:
    from rich.table import Table

    part = document["unlearning"]
    table = Table(
        title=f"Change of log-probability against {document['base']}, nats a response (nats a token)",
        caption="good rejected responses far below 0: unlearnt; bad chosen ones above 0: imitated. Both prompts alike.",
        caption_justify="left",
    )
    table.add_column("reward")
    table.add_column("role")
    names = {"none": "no goal", "best": "best goal", "worst": "worst goal", "own": "its own goal"}
    for condition in part["conditions"]:
        table.add_column(names[condition], justify="right")
    table.add_column("prompts", justify="right")
    for number, (low, high) in reversed(list(enumerate(part["bins"]))):
        for role in ("chosen", "rejected"):
            cells = []
            for condition in part["conditions"]:
                a_token = part["per_token"][condition][role][number]["value"]
                cell = one(part["conditions"][condition][role][number], 1, sign=True)
                cells.append(cell + (f" ({a_token:+.2f})" if a_token is not None else ""))
            n = part["conditions"]["none"][role][number]["n"]
            table.add_row(f"{low:.3g} to {high:.3g}" if role == "chosen" else "", role, *cells, f"{n:,}")
    return table


def _discrimination(document: dict[str, Any]) -> list[str]:
    part = document.get("discrimination")
    if part is None:
        return []
    centred = part["centred"]
    return [
        f"scores read off the policy (likeliest of {len(part['goals'])} goals): Spearman with the judge's "
        f"{one(part['spearman'], 2)}, pairs told apart {one(part['pair_accuracy'], 2)}; "
        f"centred {one(centred['spearman'], 2)} and {one(centred['pair_accuracy'], 2)}"
    ]


def one(figure: dict[str, Any], places: int, *, sign: bool = False) -> str:
    """A figure with its interval, as far as they are known.

    >>> one({"value": 1.234, "low": 1.0, "high": 2.0}, 1), one({"value": None}, 2)
    ('1.2 [1.0, 2.0]', '-')
    """
    if figure["value"] is None:
        return "-"
    plus = "+" if sign else ""
    text = f"{figure['value']:{plus}.{places}f}"
    if figure["low"] is None:
        return text
    return f"{text} [{figure['low']:.{places}f}, {figure['high']:.{places}f}]"
