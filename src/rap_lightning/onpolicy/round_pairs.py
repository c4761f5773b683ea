"""Stages "select" and "relabel" of a round: scored responses become pairs; goal.yaml says how to relabel them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rap_lightning.atomic_write import atomic_file
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.jsonl_ledger import write_atomically, write_json, write_lines
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import goal_config
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.read_pairs import fit_scale, read_pairs, rewards_of
from rap_lightning.preferences.relabel_export import has_tools, relabelled_batch, schema, write_parquet
from rap_lightning.preferences.rendering import resolve_placement, shows_system
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.sources import Source

REPORT = "select_report.json"


def fit_scale_to(scored: Path, rules: Rules) -> None:
    """Fit the open numbers of the goal's scale to the scored responses."""
    source = Source(str(scored))
    if len(set(rewards_of(source, "train", rules))) < 2:
        raise DataError(
            f"{scored}: all rewards are the same, so no response is better than another. Sample with a higher "
            "temperature, or more; or use a judge that tells them apart. What is finished is kept."
        )
    fit_scale(rules, [source], "train")


def write_pairs(scored: Path, rules: Rules, output: Path) -> None:
    """Write the selected pairs in the format of scored pairs, with a report of the rows beside them."""
    report = DataReport(scored.name, "train")
    try:
        rows = [_row(pair, rules.goal) for pair in read_pairs(Source(str(scored)), "train", rules, report)]
    except DataError as error:
        if report.pairs or not report.read:
            raise
        raise DataError(
            f"{error}\nNo two responses to a prompt have goals that differ. Sample with a higher temperature, or more; "
            "or print goals with more decimals. What is finished is kept."
        ) from error
    finally:
        write_json(output.with_name(REPORT), report.as_dict())
    write_lines(output, rows)
    print("\n".join(report.lines()))


def _row(pair: Pair, goal: GoalTemplate | None) -> dict[str, Any]:
    names = goal.attributes if goal is not None else ()
    row: dict[str, Any] = {"pair_id": pair.id, "place": pair.place}
    for side, text, reward, attributes in zip(
        ("chosen", "rejected"), pair.responses, pair.rewards, pair.attributes, strict=True
    ):
        row[side] = [*map(dict, pair.history), {"role": "assistant", "content": text}]
        row[f"score_{side}"] = reward
        if names:
            row[f"scores_{side}"] = dict(zip(names, attributes, strict=True))
    return row if pair.tools is None else {**row, "tools": json.loads(pair.tools)}


def write_goal(rules: Rules, output: Path) -> None:
    """Write how pairs are relabelled, as :func:`relabel_options`."""
    assert rules.goal is not None, "rounds are about goals"
    best = rules.goal.write(rules.goal.best, rules.goal.best_attributes)
    head = ["# How this round's pairs are relabelled; may be edited. At its best the goal reads:", "#"]
    head += [f"#   {line}" for line in best.splitlines()]
    body = yaml.safe_dump(relabel_options(rules), sort_keys=False, allow_unicode=True)
    write_atomically(output, "\n".join(head) + "\n\n" + body)


def relabel_options(rules: Rules) -> dict[str, Any]:
    """Return how pairs are relabelled, as options of the data section: goal with its fitted scale, halves, ties."""
    assert rules.goal is not None, "rounds are about goals"
    made = rules.relabelling
    return {
        "goal": goal_config(rules.goal), "relabel": made.mode, "keep_original": made.keep_original,
        "best_goal": made.best_goal, "goals_per_pair": made.goals_per_pair, "ties": rules.ties,
    }  # fmt: skip


def parse_goal(config: dict[str, Any]) -> GoalTemplate:
    """Instantiate the goal template of a config, which may name its class by a short name."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_argument("--goal", type=GoalTemplate)
    made: GoalTemplate = parser.instantiate(parser.parse_object({"goal": config})).goal
    return made


def read_goal(path: Path) -> dict[str, Any]:
    """Read the options of :func:`write_goal`, which may have been edited."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict) or "goal" not in found:
        raise ConfigError(f"{path}: expected goal, relabel, keep_original, best_goal, goals_per_pair and ties")
    return found


def write_view(pairs: Path, rules: Rules, policy: ModelSource, output: Path) -> None:
    """Write the relabelled pairs as training sees them, for inspection: messages, goals, origins."""
    tokenizer = policy.tokenizer()
    placement = resolve_placement(tokenizer, rules.goal.placement if rules.goal is not None else "auto")
    read = list(read_pairs(Source(str(pairs)), "train", rules, DataReport(pairs.name, "train"), progress=False))
    tools = any(map(has_tools, read))
    with atomic_file(output, "wb") as file:
        columns = schema(tools, weights=False)
        write_parquet(file, [relabelled_batch(read, rules, placement, shows_system(tokenizer), columns)], columns)
