"""What ``inspect --model`` adds: whether a model reads goals, before it is trained on them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.read_pairs import fit_scale, read_pairs
from rap_lightning.preferences.reading_options import ReadingOptions
from rap_lightning.preferences.sources import having
from rap_lightning.progress_bar import progress

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.training.goal_probe import GoalProbe

PAIRS = 32
"""Pairs that are probed by default."""


def check_options(model: str | None, goals: Sequence[GoalTemplate] | None, count: int | None, goal: Any) -> None:
    """Refuse options without effect, and a probe without goals."""
    if model is None:
        for option, value in (("goals", goals), ("probe_pairs", count)):
            if value is not None:
                raise ConfigError(f"--{option} has no effect without --model, whose reading of goals it probes.")
        return
    from rap_lightning.models.adapters import is_adapter

    if is_adapter(model) or model.endswith(".ckpt"):
        raise ConfigError(
            f"--model {model} is {'a checkpoint' if model.endswith('.ckpt') else 'an adapter'}, and the probe adds an "
            "adapter of its own. Name the base model, or write a whole model first (rap-lightning export --merge true)."
        )
    if goal is None:
        raise ConfigError("--model probes how a model reads goals, and --goal null states none. Name a goal template.")
    if goals is not None and not goals:
        raise ConfigError("--goals is an empty list. Name goal templates, or leave it out to probe that of --goal.")
    for other in goals or ():
        if not other.needs_fit:
            other.check_differ()
    if count is not None and count < 2:
        raise ConfigError(f"--probe_pairs must be at least 2, found {count}")


def probe_goals(
    model: str, goals: Sequence[GoalTemplate] | None, count: int | None, read: ReadingOptions, split: str,
    encoder: Encoder,
) -> list[GoalProbe]:  # fmt: skip
    """Measure each goal template on the same pairs of a split.

    Raises:
        DataError: the split has fewer than two scored pairs that differ.
        ConfigError: a template needs attributes that ``--goal`` doesn't name, or prints nothing.
    """
    from rap_lightning.training import goal_probe

    assert read.goal is not None, "check_options comes first"
    templates = [read.goal] if goals is None else list(goals)
    for other in templates:
        if other.attributes not in ((), read.goal.attributes):
            raise ConfigError(
                f"--goals: {type(other).__name__} states {', '.join(other.attributes)}, which are read only where "
                "--goal states them too. Set --goal to it."
            )
    sources = having(read.sources, split)
    reports = [DataReport(one.path, split) for one in sources]
    rows = (
        read_pairs(one, split, read.rules, report, num_proc=read.num_proc, progress=False)
        for one, report in zip(sources, reports, strict=True)
    )
    pairs = goal_probe.sample_pairs(chain.from_iterable(rows), count or PAIRS, read.seed)
    if len(pairs) < 2:
        raise DataError(
            f"split {split}: probing goals needs at least 2 pairs with a winner and a loser by score, found "
            f"{len(pairs)}."
        )
    for other in templates:
        if other is not read.goal:
            fit_scale(replace(read.rules, goal=other), sources, split, num_proc=read.num_proc)
    policy = goal_probe.load_policy(model)
    with progress(desc="probing goals", total=len(pairs) * len(templates), unit=" pairs") as bar:
        return [
            goal_probe.probe_goal(policy, one, pairs, encoder.tokenizer, encoder.max_length, bar.update)
            for one in templates
        ]


def print_probes(found: Sequence[GoalProbe]) -> None:
    """Print a line for each template, and what to do."""
    from rich.console import Console
    from rich.table import Table

    from rap_lightning.training.goal_probe import advice

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"how the model reads goals, {found[0].pairs} pairs with wide gaps", box=None)
    for name in ("goal", "margin shift (nats)", "95% interval", "gradient left, per pair", "agreement of pairs"):
        table.add_column(name, justify="left" if name == "goal" else "right")
    for one in found:
        low, high = one.shift.low, one.shift.high
        between = "" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
        table.add_row(one.goal, f"{one.shift.value:+.2f}", between, f"{one.left:.1%}", f"{one.agreement:+.3f}")
    console.print(table)
    console.print(advice(found), soft_wrap=True)
