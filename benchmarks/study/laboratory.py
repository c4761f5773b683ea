"""Where arms are compared: a base model, scored pairs, held-out prompts and a judge that anyone can check.

:func:`world` is the embedded one, :func:`real` a real instruct model with a judge of :mod:`benchmarks.study.judges`.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.judges import TASKS
from benchmarks.study.settings import Size
from benchmarks.study.topics import TOPICS

from rap_lightning.world.make import make_world
from rap_lightning.world.rule import score


@dataclass(frozen=True)
class Laboratory:
    """What a run needs to know of the place.

    Attributes:
        base: the model's folder.
        train: file of scored pairs.
        prompts: held out.
        pairs: held-out scored pairs that don't tie.
        judge: score of (prompt, response), 1 to 10.
        max_new_tokens: of a sample.
        neutral: the goal at which an adapter that knows no goals is asked at strength 0.
    """

    base: str
    train: Path
    prompts: list[str]
    pairs: list[dict[str, Any]]
    judge: Callable[[str, str], float]
    max_new_tokens: int
    neutral: float = 5.5


def make(root: Path, seed: int, size: Size) -> Laboratory:
    """The one of a size, for a seed."""
    if size.task is None or size.model is None:
        return world(root, seed, size)
    return real(root, size.task, size.model, tune=seed in size.tuning)


def world(root: Path, seed: int, size: Size) -> Laboratory:
    """The embedded world of a seed; it is made if it isn't there."""
    folder = root / "worlds" / str(seed)
    make_world(folder, train_pairs=size.train_pairs, test_pairs=size.test_pairs, base_steps=size.base_steps, seed=seed)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    pairs = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    prompts = sorted({row["prompt"] for row in rows})
    return Laboratory(str(folder / "base"), folder / "train.jsonl", prompts, pairs, score, max_new_tokens=48)


def real(root: Path, task: str, model: str, *, tune: bool) -> Laboratory:
    """A real instruct model and the pairs of :func:`prepare`; tuning and figures have other held-out prompts."""
    _, tuning, figures = _topics()
    one = TASKS[task]
    prompts = [one.ask(topic) for topic in (tuning if tune else figures)]
    train = root / task / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    mean = statistics.fmean(row[side] for row in rows for side in ("score_chosen", "score_rejected"))
    return Laboratory(model, train, prompts, [], one.judge, max_new_tokens=64, neutral=mean)


def prepare(root: Path, task: str, model: str) -> None:
    """Let the model answer a task's training prompts, six times each, and pair its judged responses.

    The command is the package's own, and continues where it was stopped.
    """
    one, folder = TASKS[task], root / task
    folder.mkdir(parents=True, exist_ok=True)
    asked = "".join(json.dumps({"prompt": one.ask(topic)}) + "\n" for topic in _topics()[0])
    (folder / "prompts.jsonl").write_text(asked)
    subprocess.run([
        sys.executable, "-m", "rap_lightning.cli.main", "generate", "--prompts", str(folder / "prompts.jsonl"),
        "--model", model, "--output", str(folder / "responses.jsonl"), "--samples", "6", "--max_new_tokens", "64",
        "--engine.batch_size", "96",
    ], check=True)  # fmt: skip
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for line in (folder / "responses.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, text = row["messages"][-1]["content"], row["response"]
        by_prompt.setdefault(prompt, []).append((round(one.judge(prompt, text), 1), text))
    pairs = [row for prompt in sorted(by_prompt) for row in pair(prompt, by_prompt[prompt])]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))


def pair(prompt: str, answers: list[tuple[float, str]]) -> list[dict[str, Any]]:
    """Rows of the best (score, response) against the worst, the second best against the second worst, and so on."""
    answers = sorted(answers)
    rows = []
    for i in range(len(answers) // 2):
        (low, rejected), (high, chosen) = answers[i], answers[-1 - i]
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        rows.append({**row, "score_chosen": high, "score_rejected": low})
    return rows


def _topics() -> tuple[list[str], list[str], list[str]]:
    """Of training, of tuning, and of the figures."""
    shuffled = random.Random(0).sample(TOPICS, len(TOPICS))
    return shuffled[:160], shuffled[160:184], shuffled[184:]
