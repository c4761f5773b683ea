"""Samples at goals, and the judge's scores of them, in files that survive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rap_lightning.evaluation import Samples
from rap_lightning.onpolicy.asked_goals import Asked
from rap_lightning.onpolicy.evaluate.evaluation_data import shown_prompt
from rap_lightning.onpolicy.jsonl_ledger import digest_of, parts_of, read_rows
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.judges.base import Item
from rap_lightning.onpolicy.requests import prompt_id_of
from rap_lightning.onpolicy.response_generator import Generator
from rap_lightning.onpolicy.scoring import judged
from rap_lightning.preferences.pairs import Message

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

Goal = float | None


@dataclass
class Sampled:
    """Judged samples, in the order of prompts, goals and their numbers.

    Attributes:
        rows: of samples.jsonl.
        missing: how many responses could not be generated or judged.
        counts: what happened on the way, in words.
    """

    rows: list[dict[str, Any]]
    missing: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def part(self, *, greedy: bool) -> Samples:
        """Those with a score that were sampled, or picked greedily."""
        rows = [row for row in self.rows if row["greedy"] is greedy and row["score"] is not None]
        return Samples(
            [row["prompt_id"] for row in rows], [row["goal"] for row in rows], [row["score"] for row in rows],
            [row["tokens"] for row in rows],
        )  # fmt: skip


def sample(
    generator: Generator,
    histories: Sequence[Sequence[Message]],
    goals: Sequence[Goal],
    asked: Sequence[Asked],
    sampling: Generation,
    samples: int,
    greedy: bool,
    judge: Judge,
    folder: Path,
    seed: int,
) -> Sampled:
    """Generate and judge what isn't there yet.

    Args:
        generator: of the model.
        histories: the prompts.
        goals: what is asked for, and ``asked``, how.
        sampling: how to sample.
        samples: responses for each prompt at each goal.
        greedy: also the greedy response of each.
        judge: scores them.
        folder: of the files.
        seed: of the sampling.
    """
    runs = [("sampled.jsonl", sampling, samples)]
    if greedy:
        floor = sampling.plausibility if sampling.guidance else None  # alone it never excludes the likeliest
        runs.append(("greedy.jsonl", replace(sampling, temperature=0.0, top_p=1.0, plausibility=floor), 1))
    missing, counts, drawn = 0, Counter[str](), []
    for name, generation, count in runs:
        outcome = generator.run(histories, folder / name, asked, generation, count, seed)
        missing += outcome.failed
        found = _wanted(folder / name, histories, asked, count)
        drawn += [(row, generation.temperature == 0) for row in found]
    by_printed = {one.printed: goal for one, goal in zip(asked, goals, strict=True)}
    of_prompt = {prompt_id_of(history): tuple(history) for history in histories}
    items: dict[str, Item] = {}
    for row, _ in drawn:
        one = Item(_item_id(row), of_prompt[row["prompt_id"]], row["response"])
        items.setdefault(one.id, one)
    verdicts, _, failed = judged(items, folder / "verdicts.jsonl", judge)
    counts.update(judge.counts)
    counts.update(f"not judged: {lost['error'][:200]}" for lost in failed)
    rows = []
    for row, is_greedy in drawn:
        verdict = verdicts.get(_item_id(row))
        missing += verdict is None
        rows.append(
            {
                "prompt": shown_prompt(of_prompt[row["prompt_id"]]), "prompt_id": row["prompt_id"],
                "goal": by_printed[row["goal"]], "response": row["response"],
                "score": None if verdict is None else verdict["overall_score"], "tokens": row["tokens"],
                "greedy": is_greedy, "sample": row["sample"], "finish": row["finish"],
            }
        )  # fmt: skip
    return Sampled(rows, missing, counts)


def _item_id(row: dict[str, Any]) -> str:
    return digest_of(row["prompt_id"], row["response"])


def _wanted(
    path: Path, histories: Sequence[Sequence[Message]], asked: Sequence[Asked], count: int
) -> list[dict[str, Any]]:
    """The rows of a file that this run asks for, in order; it may hold those of other prompts, goals and numbers."""
    order = {prompt_id_of(history): i for i, history in enumerate(histories)}
    place = {goal.printed: i for i, goal in enumerate(asked)}
    rows = [
        row for row in read_rows(parts_of(path))
        if row["prompt_id"] in order and row["goal"] in place and row["sample"] < count
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (order[row["prompt_id"]], place[row["goal"]], row["sample"]))
