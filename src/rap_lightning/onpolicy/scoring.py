"""Rewards for responses, and the file that training reads: on each line a prompt with its scored responses.

:func:`score_file` reads the responses (:func:`read_prompt_groups`), has a judge rate the unrated ones
(:func:`judge_items`), and writes the prompts with their scores (:func:`_write`).
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.engines.base import prompt_id_of
from rap_lightning.onpolicy.jsonl_ledger import (
    Ledger,
    Row,
    digest_of,
    file_digest,
    list_failed,
    meta_path,
    parts_of,
    plain_values,
    read_meta,
    read_rows,
    write_json,
    write_lines,
)
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.prompt_set import rows_of
from rap_lightning.preferences.formats.completions import TEXT_NAMES
from rap_lightning.preferences.formats.context_columns import with_context
from rap_lightning.preferences.formats.scored_pairs import as_turns, tools_of
from rap_lightning.preferences.judge import Item
from rap_lightning.preferences.pairs import BadRow, Message, carried, carrying, is_blank, read_messages
from rap_lightning.preferences.sources import local_path
from rap_lightning.progress_bar import progress

KEPT = ("model", "goal", "sample", "finish", "tokens")
"""Columns of a response that are copied to the output."""


@dataclass
class PromptGroup:
    """A prompt and its responses in order, each with the columns that are kept."""

    prompt_id: str
    history: list[Message]
    responses: list[tuple[Item, dict[str, Any]]] = field(default_factory=list)


@dataclass
class ScoreSummary:
    """How many responses there are, and how many of them have no reward."""

    responses: int
    failed: int


def score_file(source: str, output: Path, judge: Judge, split: str | None = None) -> ScoreSummary:
    """Judge the responses without a verdict, then write all of them as training data.

    Verdicts are appended to ``OUTPUT.verdicts.jsonl`` as they come; the output itself appears at the end.
    """
    counts: Counter[str] = Counter()
    groups = read_prompt_groups(source, split, counts)
    _check_output(output, judge)
    items = {item.id: item for group in groups for item, _ in group.responses}
    verdicts, before, failed = judge_items(items, output.with_name(output.name + ".verdicts.jsonl"), judge)
    list_failed(output, failed)
    counts.update(judge.counts)
    counts.update(f"failed: {row['error'][:200]}" for row in failed)
    rewards = _write(output, groups, verdicts, judge, counts)
    responses = sum(len(group.responses) for group in groups)
    print(f"{output}: {responses:,} responses to {len(groups):,} prompts, {before:,} judged before")
    if rewards:
        print(f"  rewards from {min(rewards):.4g} to {max(rewards):.4g}, mean {fmean(rewards):.4g}")
    for what, count in counts.most_common():
        print(f"  {count:,}: {what}")
    if failed:
        print(f"  {len(failed):,} have no reward and are written as null; the same command retries them")
    sys.stdout.flush()
    return ScoreSummary(responses, len(failed))


def expected_responses(source: str) -> int | None:
    """Return how many responses ``generate`` set out to write; None for other files."""
    for part in _written_parts(source):
        if "responses" in (meta := read_meta(part)):
            return int(meta["responses"])
    return None


def read_prompt_groups(source: str, split: str | None, counts: Counter[str]) -> list[PromptGroup]:
    """Read the prompts and responses of a file: rows of ``generate``, or prompts with ``completions``."""
    groups: dict[str, PromptGroup] = {}
    for row, place in _rows(source, split):
        try:
            history, responses = _responses(row)
            history = carrying(history, tools_of(row))
        except BadRow as problem:
            if problem.stops:
                raise DataError(f"{place}, column {problem.column}: {problem.reason}.") from problem
            counts[f"dropped: {problem.reason}"] += 1
            continue
        prompt_id = prompt_id_of(history)
        group = groups.setdefault(prompt_id, PromptGroup(prompt_id, history))
        for text, columns in responses:
            kept = {name: columns[name] for name in KEPT if columns.get(name) is not None}
            group.responses.append((Item(digest_of(prompt_id, text), tuple(history), text), kept))
    if not groups:
        raise DataError(f"{source}: no response to score.")
    return list(groups.values())


def _written_parts(source: str) -> list[Path]:
    """Return the files that ``generate`` wrote for an output of this name; none for a folder, which is that folder."""
    path = local_path(source) or Path(os.path.expanduser(source))
    return [] if path.is_dir() else parts_of(path)


def _rows(source: str, split: str | None) -> Iterator[tuple[Row, str]]:
    parts = _written_parts(source)
    if parts and split is None and (len(parts) > 1 or read_meta(parts[0]) or local_path(source) is None):
        for part in parts:
            for number, row in enumerate(read_rows([part]), 1):
                yield row, f"{part.name} line {number}"
        return
    for found, place in rows_of(source, split):
        if isinstance(found, BadRow):
            raise DataError(f"{place}: {found.reason}.")
        yield found, place


def _responses(row: Row) -> tuple[list[Message], list[tuple[str, Row]]]:
    """Return the conversation and (text, columns) of each response."""
    prompt = row.get("prompt", row.get("instruction"))
    if isinstance(row.get("response"), str):
        history = read_messages(row["messages"], "messages") if row.get("messages") else as_turns(prompt)
        return with_context(history, row), [(row["response"], row)]
    if isinstance(row.get("completions"), list):
        found = []
        for one in row["completions"]:
            text = next((one[n] for n in TEXT_NAMES if isinstance(one, dict) and isinstance(one.get(n), str)), None)
            if text is None:
                raise BadRow("completions", "an entry without a response", one, stops=True)
            found.append((text, one))
        return with_context(as_turns(prompt), row), found
    expected = "expected messages and response (as generate writes them), or prompt and completions [{response}]"
    raise BadRow(", ".join(row), expected, stops=True)


def _check_output(output: Path, judge: Judge) -> None:
    """Raise ConfigError if the output exists and isn't what this judge wrote."""
    if not output.is_file():
        return
    record = read_meta(output)
    if record.get("judge") != plain_values(judge.settings()):
        why = "is scored by another judge or scale" if record else "no record says by whom"
        raise ConfigError(f"{output} exists, and {why}: one file never mixes them. Name another output, or remove it.")
    if record.get("digest") != file_digest(output):
        raise ConfigError(f"{output} was edited, and scoring again would overwrite that. Name another output.")


def judge_items(items: Mapping[str, Item], path: Path, judge: Judge) -> tuple[dict[str, Row], int, list[Row]]:
    """Judge the items that ``path`` has no verdict for, and append their verdicts as they come.

    Returns:
        All verdicts by item id, how many were there before, and a row for each failure.
    """
    failed: list[Row] = []
    judge.counts.clear()
    with Ledger(path, judge.settings()) as ledger:
        left = [item for item in items.values() if item.id not in ledger.done]
        before = len(items) - len(left)
        with progress(total=len(items), initial=before, desc="score") as bar:
            for verdicts in judge.judge(left) if left else ():
                rows = [
                    {"id": v.id, "overall_score": v.overall, "scores": v.attributes}
                    | ({"notes": v.notes} if v.notes else {})
                    for v in verdicts if not v.error
                ]  # fmt: skip
                if rows:
                    ledger.append(rows)
                failed += [
                    {"id": v.id, "response": items[v.id].response, "error": v.error} for v in verdicts if v.error
                ]
                bar.update(len(rows))
    return {row["id"]: row for row in read_rows([path])}, before, failed


def _write(
    output: Path, groups: list[PromptGroup], verdicts: dict[str, Row], judge: Judge, counts: Counter[str]
) -> list[float]:
    """Write the prompts with their scores and the record beside them; return the rewards."""
    rows: list[Row] = []
    rewards: list[float] = []
    attributes: dict[str, list[float]] = {}
    for group in groups:
        completions = []
        for item, kept in group.responses:
            row = {**kept, "response": item.response, "overall_score": None}
            if (found := verdicts.get(item.id)) is not None:
                rewards.append(found["overall_score"])
                row["overall_score"] = found["overall_score"]
                if found["scores"]:
                    row["scores"] = found["scores"]
                for name, value in found["scores"].items():
                    attributes.setdefault(name, []).append(value)
            if is_blank(item.response):
                counts["an empty response; training leaves it out"] += 1
            completions.append(row)
        turns, tools = carried(group.history)
        prompt: Any = turns[0]["content"] if len(turns) == 1 else turns
        own = {} if tools is None else {"tools": json.loads(tools)}
        rows.append({"prompt": prompt, **own, "prompt_id": group.prompt_id, "completions": completions})
    write_lines(output, rows)
    seen = _range(rewards)
    scale = {"declared": judge.scale, "seen": seen, "attributes": {name: _range(v) for name, v in attributes.items()}}
    record = {"judge": plain_values(judge.settings()), "scale": scale, "counts": dict(counts), "package": __version__}
    write_json(meta_path(output), record | {"digest": file_digest(output)})
    return rewards


def _range(values: list[float]) -> dict[str, float]:
    return {"low": min(values), "high": max(values), "mean": fmean(values), "count": len(values)} if values else {}
