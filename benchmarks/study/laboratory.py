"""Where arms are compared: a base model, scored pairs, held-out prompts and a judge that anyone can check.

``world`` is the embedded one. ``reading`` is a real instruct model whose own responses to "Explain X in two
or three sentences." are judged by reading ease: see :func:`reading`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Size

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
        target_modules: what the adapter is put on.
    """

    base: Path
    train: Path
    prompts: list[str]
    pairs: list[dict[str, Any]]
    judge: Callable[[str, str], float]
    max_new_tokens: int
    target_modules: str = "all-linear"


def world(root: Path, seed: int, size: Size) -> Laboratory:
    """The embedded world of a seed; it is made if it isn't there."""
    folder = root / "worlds" / str(seed)
    make_world(folder, train_pairs=size.train_pairs, test_pairs=size.test_pairs, base_steps=size.base_steps, seed=seed)
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    pairs = [row for row in rows if row["score_chosen"] > row["score_rejected"]]
    prompts = sorted({row["prompt"] for row in rows})
    return Laboratory(folder / "base", folder / "train.jsonl", prompts, pairs, score, max_new_tokens=48)


def reading_ease(prompt: str, response: str) -> float:
    """Flesch's reading ease (1948), 206.835 - 1.015 words/sentence - 84.6 syllables/word, from 0-100 to 1-10.

    Syllables are groups of vowels, a silent e at the end left out. Below 15 words the score is 1, because the shortest
    texts would be the easiest.

    >>> reading_ease("", "The cat sat on the mat. " * 4), reading_ease("", "Too short.")
    (10.0, 1.0)
    """
    words = re.findall(r"[a-z']+", response.lower())
    if len(words) < 15:
        return 1.0
    sentences = max(1, len(re.findall(r"[.!?]+", response)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", word.removesuffix("e")))) for word in words)
    ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)
    return 1 + 9 * min(1.0, max(0.0, ease / 100))


def reading(root: Path, model: Path, scored: Path, prompts: Path) -> Laboratory:
    """An instruct model, its own responses scored by :func:`reading_ease`, and held-out prompts.

    Args:
        root: folder of the study's work.
        model: the instruct model.
        scored: json lines of ``prompt`` and ``completions``, as ``rap-lightning generate`` writes them.
        prompts: json lines of ``prompt``.
    """
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for line in scored.read_text().splitlines():
        row = json.loads(line)
        for text in (one["response"] for one in row["completions"]):
            by_prompt.setdefault(row["prompt"], []).append((reading_ease(row["prompt"], text), text))
    train = root / "reading-pairs.jsonl"
    train.parent.mkdir(parents=True, exist_ok=True)
    with train.open("w") as file:
        for prompt, answers in by_prompt.items():
            answers.sort()  # the easiest against the hardest, and so on towards the middle
            for i in range(len(answers) // 2):
                (low, rejected), (high, chosen) = answers[i], answers[-1 - i]
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps({**row, "score_chosen": round(high, 1), "score_rejected": round(low, 1)}) + "\n")
    held_out = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    upper = r".*layers\.(1\d|2\d)\..*(_proj)"
    return Laboratory(model, train, held_out, [], reading_ease, max_new_tokens=64, target_modules=upper)
