"""Rewards for responses, and the file that training reads: a prompt with its scored responses on each line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rap_lightning import __version__
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy.jsonl_ledger import (
    Ledger,
    digest_of,
    file_digest,
    meta_path,
    parts_of,
    read_meta,
    read_rows,
    write_json,
    write_lines,
)
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.judges.base import Item
from rap_lightning.onpolicy.request_progress import Progress
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.preferences.formats.completions import TEXT_NAMES
from rap_lightning.preferences.formats.scored_pairs import as_turns
from rap_lightning.preferences.pairs import BadRow, Message, is_blank, read_messages
from rap_lightning.preferences.sources import Source, chunks_of, splits_of

KEPT = ("model", "goal", "sample", "finish", "tokens")


@dataclass
class Candidate:
    """A response of a prompt, with what is known of it."""

    item: Item
    facts: dict[str, Any]


@dataclass
class Group:
    """A prompt and its responses, in order."""

    prompt_id: str
    history: list[Message]
    candidates: list[Candidate] = field(default_factory=list)


@dataclass
class Scored:
    """What became of a run."""

    prompts: int
    responses: int
    judged_before: int
    failed: int
    rewards: list[float]
    counts: Counter[str]
    finished: bool = True

    def lines(self, path: Path) -> list[str]:
        """For people."""
        lines = [
            f"{path}: {self.responses:,} responses to {self.prompts:,} prompts, {self.judged_before:,} judged before"
        ]
        if self.rewards:
            low, high = min(self.rewards), max(self.rewards)
            lines.append(f"  rewards from {low:.4g} to {high:.4g}, mean {fmean(self.rewards):.4g}")
        lines += [f"  {count:,}: {what}" for what, count in self.counts.most_common()]
        if self.failed:
            lines.append(f"  {self.failed:,} have no reward and stand as null; the same command judges them again")
        return lines


def read_groups(source: str, split: str | None, counts: Counter[str]) -> list[Group]:
    """The prompts and responses of a file: lines of ``generate``, or prompts with ``completions``.

    Raises:
        DataError: rows of another form.
    """
    groups: dict[str, Group] = {}
    for row, place in _rows(source, split):
        try:
            history, entries = _entries(row)
        except BadRow as problem:
            if problem.stops:
                raise DataError(f"{place}, column {problem.column}: {problem.reason}.") from problem
            counts[f"dropped: {problem.reason}"] += 1
            continue
        prompt_id = prompt_id_of(history)
        group = groups.setdefault(prompt_id, Group(prompt_id, history))
        for text, facts in entries:
            item = Item(digest_of(prompt_id, text), tuple(history), text)
            group.candidates.append(Candidate(item, facts))
    if not groups:
        raise DataError(f"{source}: no response to score.")
    return list(groups.values())


def _rows(source: str, split: str | None) -> Iterator[tuple[dict[str, Any], str]]:
    path = Path(source).expanduser()
    parts = parts_of(path)
    if parts and split is None and (len(parts) > 1 or not path.is_file() or read_meta(path)):
        for part in parts:
            for number, row in enumerate(read_rows([part]), 1):
                yield row, f"{part.name} line {number}"
        return
    one = Source(source)
    available = splits_of(one)
    for chunk in chunks_of(one, split or ("train" if "train" in available else available[0])):
        for number, found in chunk.rows():
            if isinstance(found, BadRow):
                raise DataError(f"{chunk.place(number)}: {found.reason}.")
            yield found, chunk.place(number)


def _entries(row: dict[str, Any]) -> tuple[list[Message], list[tuple[str, dict[str, Any]]]]:
    if isinstance(row.get("response"), str) and row.get("messages"):
        turns = read_messages(row["messages"], "messages")
        return turns, [(row["response"], {name: row[name] for name in KEPT if row.get(name) is not None})]
    prompt = row.get("prompt", row.get("instruction"))
    if isinstance(row.get("response"), str):
        return as_turns(prompt), [(row["response"], {name: row[name] for name in KEPT if row.get(name) is not None})]
    if isinstance(row.get("completions"), list):
        entries = []
        for one in row["completions"]:
            text = next((one[n] for n in TEXT_NAMES if isinstance(one, dict) and isinstance(one.get(n), str)), None)
            if text is None:
                raise BadRow("completions", "an entry without a response", one, stops=True)
            entries.append((text, {name: one[name] for name in KEPT if one.get(name) is not None}))
        return as_turns(prompt), entries
    raise BadRow(
        ", ".join(row), "expected messages and response (as generate writes them), or prompt and completions "
        "[{response}]",
        stops=True,
    )  # fmt: skip


def expected(source: str) -> int | None:
    """How many responses generate said that there would be; None for other files."""
    for part in parts_of(Path(source).expanduser()):
        if "responses" in (meta := read_meta(part)):
            return int(meta["responses"])
    return None


def score_file(source: str, output: Path, judge: Judge, split: str | None = None, quiet: bool = False) -> Scored:
    """Judge what isn't judged yet, then write all of it in the form that training reads.

    The verdicts stand in ``OUTPUT.verdicts.jsonl`` as they come; the output itself appears when all are there.

    Raises:
        ConfigError: the verdicts there are another judge's.
        DataError: rows that can't be read.
    """
    counts: Counter[str] = Counter()
    groups = read_groups(source, split, counts)
    own = read_meta(output)
    if output.is_file() and (not own or own.get("judge") != _plain(judge.settings())):
        raise ConfigError(
            f"{output} is there already, and "
            f"{'is scored by another judge or scale' if own else 'no record says by whom'}: one "
            "file never mixes them. Name another output, or remove it."
        )
    if output.is_file() and own.get("digest") != file_digest(output):
        raise ConfigError(
            f"{output} was changed since it was written, and scoring again would write over that. Name another output."
        )
    items = {c.item.id: c.item for group in groups for c in group.candidates}
    verdicts, before, failed = judged(items, output.with_name(output.name + ".verdicts.jsonl"), judge, quiet)
    lost = output.with_name(output.name + ".failed.jsonl")
    if failed:
        write_lines(lost, failed)
    else:
        lost.unlink(missing_ok=True)
    return _write(output, groups, verdicts, judge, counts, before, failed, quiet)


def judged(
    items: Mapping[str, Item], path: Path, judge: Judge, quiet: bool = False
) -> tuple[dict[str, dict[str, Any]], int, list[dict[str, Any]]]:
    """Verdicts by the items' ids, those of earlier runs among them; how many were there; what could not be judged.

    Args:
        items: by their ids.
        path: json lines of verdicts, appended as they come.
        judge: who judges what isn't there yet.
        quiet: show no progress.

    Raises:
        ConfigError: the verdicts there are another judge's.
    """
    failed: list[dict[str, Any]] = []
    judge.counts.clear()
    with Ledger(path, _plain(judge.settings())) as ledger:
        left = [item for item in items.values() if item.id not in ledger.done]
        before = len(items) - len(left)
        with Progress("score", len(items), before, shown=not quiet) as progress:
            for verdicts in judge.judge(left) if left else ():
                good = [v for v in verdicts if not v.error]
                rows = [
                    {"id": v.id, "overall_score": v.overall, "scores": v.attributes}
                    | ({"notes": v.notes} if v.notes else {})
                    for v in good
                ]  # fmt: skip
                if rows:
                    ledger.append(rows)
                failed += [
                    {"id": v.id, "response": items[v.id].response, "error": v.error} for v in verdicts if v.error
                ]
                progress.add([0] * len(good))
    return {row["id"]: row for row in read_rows([path])}, before, failed


def _write(
    output: Path, groups: list[Group], verdicts: dict[str, Any], judge: Judge, counts: Counter[str], before: int,
    failed: list[dict[str, Any]], quiet: bool,
) -> Scored:  # fmt: skip
    rows, rewards = [], []
    names: dict[str, list[float]] = {}
    for group in groups:
        completions = []
        for candidate in group.candidates:
            found = verdicts.get(candidate.item.id)
            if found is not None:
                rewards.append(found["overall_score"])
                for name, value in found["scores"].items():
                    names.setdefault(name, []).append(value)
            if is_blank(candidate.item.response):
                counts["an empty response; training leaves it out"] += 1
            scores = {"scores": found["scores"]} if found is not None and found["scores"] else {}
            reward = found["overall_score"] if found is not None else None
            completions.append(
                {**candidate.facts, "response": candidate.item.response, "overall_score": reward, **scores}
            )
        single = len(group.history) == 1
        prompt: Any = group.history[0]["content"] if single else group.history
        rows.append({"prompt": prompt, "prompt_id": group.prompt_id, "completions": completions})
    counts.update(judge.counts)
    counts.update(f"failed: {row['error'][:200]}" for row in failed)
    retries = getattr(getattr(judge, "connection", None), "retries", 0)
    if retries:
        counts["requests tried again"] += retries
    record = {
        "judge": _plain(judge.settings()),
        "scale": {
            "declared": judge.scale, "seen": _range(rewards), "attributes": {n: _range(v) for n, v in names.items()}
        },
        "counts": dict(counts), "package": __version__,
    }  # fmt: skip
    write_lines(output, rows)
    write_json(meta_path(output), record | {"digest": file_digest(output)})
    scored = Scored(len(groups), sum(len(g.candidates) for g in groups), before, len(failed), rewards, counts)
    if not quiet:
        print("\n".join(scored.lines(output)), flush=True)
    return scored


def _range(values: list[float]) -> dict[str, float]:
    return {"low": min(values), "high": max(values), "mean": fmean(values), "count": len(values)} if values else {}


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found
