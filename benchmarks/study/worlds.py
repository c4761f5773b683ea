"""The worlds of the study, each made once, and the files that some arms need beside a world's own."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.study.settings import Size
from transformers import AutoModelForCausalLM, AutoTokenizer

from rap_lightning.world.base_model import sampler
from rap_lightning.world.make import make_world, pair_figures
from rap_lightning.world.world_data import GOAL_MESSAGE, make_pairs, make_prompts

#: Settings of the dose-response: name -> knobs of make_world. The first is the world of all other runs.
KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "noise 1": {"judge_noise": 1.0},
    "noise 2": {"judge_noise": 2.0},
    "noise 3": {"judge_noise": 3.0},
    "qualities lean high": {"lean": -0.7},
    "frequent top scores": {"best": 1.0},
    "base that knows goals": {"goal_noise": 0.5},
    "base without goals": {"goal_share": 0.0},
    "on-policy pairs": {"on_policy": 1.0},
    "four times the pairs and steps": {"times": 4},
    "hardly any good losers": {"contrast": 1.0},
    "rarer top scores": {"best": 0.6},
    "four families": {"families": ["words", "numbers", "words-backwards", "numbers-backwards"]},
    "some good losers": {"contrast": 0.6},
}


#: Knobs that the base model doesn't hang on: their worlds take the default one's base of the same seed.
OF_PAIRS = ("lean", "best", "contrast", "judge_noise", "on_policy", "times")


def times(knobs: str) -> int:
    """By how much a setting multiplies pairs and steps."""
    return int(KNOBS[knobs].get("times", 1))


def world(root: Path, knobs: str, seed: int, size: Size) -> Path:
    """The folder of a world; it is made if it isn't there."""
    folder = root / "worlds" / f"{knobs.replace(' ', '-')}-{seed}"
    if knobs != "default" and set(KNOBS[knobs]) <= set(OF_PAIRS):
        if not (folder / "world.json").is_file():
            _with_other_pairs(world(root, "default", seed, size), folder, knobs, seed, size)
        return folder
    make_world(
        folder, train_pairs=size.train_pairs, test_pairs=size.test_pairs, base_steps=size.base_steps, seed=seed,
        **KNOBS[knobs],
    )  # fmt: skip
    return folder


def _with_other_pairs(default: Path, folder: Path, knobs: str, seed: int, size: Size) -> None:
    """What make_world would make, with a base that is there already."""
    shutil.copytree(default / "base", folder / "base", dirs_exist_ok=True)
    options = {name: value for name, value in KNOBS[knobs].items() if name != "times"}
    if options.get("on_policy"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        options["sample"] = sampler(model, AutoTokenizer.from_pretrained(folder / "base"), seed)
    figures = {}
    for name, prompts, count in zip(
        ("train", "test"), make_prompts(seed), (size.train_pairs * times(knobs), size.test_pairs), strict=True
    ):
        pairs = make_pairs(prompts, count, seed, **options)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        figures[name] = pair_figures(pairs)
    (folder / "world.json").write_text(json.dumps({"figures": figures}))


Row = dict[str, Any]


def derived(folder: Path, name: str, make: Callable[[Iterable[Row]], Iterable[Row]]) -> Path:
    """A file of pairs made of a world's training pairs, beside them; found if it is there."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        rows = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
        temporary = path.with_suffix(f".{os.getpid()}")  # another process may be at it
        temporary.write_text("".join(json.dumps(row) + "\n" for row in make(rows)))
        temporary.replace(path)
    return path


def good_winners(rows: Iterable[Row]) -> Iterable[Row]:
    """Pairs whose chosen response has 7 or more."""
    return (row for row in rows if row["score_chosen"] >= 7)


def never_swapped(rows: Iterable[Row]) -> Iterable[Row]:
    """What the paper's code wrote where there is a system message: both goals, and the winner chosen under both.

    The goal stands in the history, so that the package, which would swap, takes these for plain pairs.
    """
    for row in rows:
        if row["score_chosen"] == row["score_rejected"]:
            continue  # both goals read the same: left out, as in every relabelled arm
        for goal in (row["score_chosen"], row["score_rejected"]):
            system = {"role": "system", "content": GOAL_MESSAGE.format(goal=goal)}
            sides = {side: [system, *row[side]] for side in ("chosen", "rejected")}
            yield {**sides, "score_chosen": row["score_chosen"], "score_rejected": row["score_rejected"]}
