"""Make the embedded world in a folder: scored pairs, base model, and a record of the settings and figures."""

import collections
import itertools
import json
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rap_lightning.world.world_data import (
    BEST,
    FAMILIES_BY_DEFAULT,
    HABIT,
    WorldPair,
    make_examples,
    make_pairs,
    make_prompts,
    vocabulary,
)

#: Incremented when the same settings make another world, so that an older folder is refused.
VERSION = 2
#: Lowest score of a top response and of a good loser, and highest score of a bad winner, in points.
TOP, GOOD, BAD = 9.0, 6.0, 4.0
#: What settings must be.
LIMITS: dict[str, tuple[tuple[str, ...], Callable[[float], bool]]] = {
    "at least 1": (("train_pairs", "test_pairs", "base_steps"), lambda value: value >= 1),
    "0 or above": (("judge_noise", "goal_noise"), lambda value: value >= 0),
    "from 0 to 1": (("best", "contrast", "on_policy", "goal_share", "habit"), lambda value: 0 <= value <= 1),
    "above -1": (("lean",), lambda value: value > -1),
}
#: Examples in an optimizer step of the base model.
BATCH = 32


def make_world(
    root: str | Path,
    *,
    train_pairs: int = 2000,
    test_pairs: int = 200,
    base_steps: int = 600,
    seed: int = 0,
    families: Sequence[str] = FAMILIES_BY_DEFAULT,
    lean: float = 0.3,
    best: float = BEST,
    contrast: float = 0.0,
    judge_noise: float = 0.0,
    on_policy: float = 0.0,
    goal_share: float = 0.7,
    goal_noise: float = 2.5,
    habit: float = HABIT,
) -> None:
    """Make the embedded world under `root`, unless it exists.

    It writes `train.jsonl` and `test.jsonl` (scored pairs on disjoint prompts), `base/` (model and tokenizer for
    `from_pretrained`) and `world.json` (settings and figures). The folder appears completely or not at all. An existing
    world with the same settings is left as it is. docs/world.md shows the effect of the settings.

    Args:
        root: folder to make. It must not exist, or be empty, or contain a world with these settings.
        train_pairs: number of training pairs, ties included.
        test_pairs: number of test pairs.
        base_steps: optimizer steps of the base model, 32 examples each. They take nearly all of the time.
        seed: seed of prompts, pairs and base model.
        families: kinds of prompts: words, numbers, words-backwards, numbers-backwards.
        lean: skew of the qualities towards low, above -1; negative values skew them towards high.
        best: the highest quality of a response, 0 to 1: how rare top scores are.
        contrast: how far the two responses of a pair are moved towards the ends of quality, 0 to 1: how few good losers
            and bad winners there are.
        judge_noise: standard deviation, in points, of the noise in the data's scores. The rule has none.
        on_policy: fraction of the pairs that the base model wrote, at temperature 1 and without a goal, 0 to 1.
        goal_share: fraction of the base model's training examples that state a goal; at 0 it has never seen one.
        goal_noise: standard deviation, in points, of the error of the last of these goals; the lower, the better the
            base model knows goals.
        habit: fraction of the base model's training responses that are one item short and end with the same stray, 0 to
            1: how far its own answers are from the best ones, at every temperature.

    """
    settings: dict[str, Any] = {"version": VERSION, **locals(), "families": list(families)}
    root = Path(settings.pop("root"))
    for words, (names, fits) in LIMITS.items():
        for name in names:
            if not fits(settings[name]):
                raise ValueError(f"{name} must be {words}; got {settings[name]}")
    make_prompts(seed, families=families)  # refuses an unknown family before a folder is made
    if _is_there(root, settings):
        print(f"world: {root} exists already, with these settings")
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the rename stays on one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        figures = _fill(work, settings)
        (work / "world.json").write_text(json.dumps({"settings": settings, "figures": figures}, indent=2) + "\n")
        work.chmod(0o755)
        try:
            work.replace(root)
        except OSError:
            if not _is_there(root, settings):
                raise
            print(f"world: another process has made {root} in the meantime, with these settings")
            return
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"world: wrote {root}")


def _is_there(root: Path, settings: dict[str, Any]) -> bool:
    record = root / "world.json"
    if record.is_file():
        found = json.loads(record.read_text())["settings"]
        if found != settings:
            raise ValueError(_other_settings(root, found, settings))
        return True
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ValueError(f"{root} exists and is not a world; choose another folder")
    return False


def options_for(settings: dict[str, Any], names: Iterable[str], fit: bool = False) -> str:
    """Return settings as options of ``python -m rap_lightning.world``, or of fit."""

    def flag(name: str) -> str:
        return f"--data.{'world_seed' if name == 'seed' else name}" if fit else f"--{name}"

    def shown(value: Any) -> str:
        return shlex.quote(f"[{','.join(value)}]" if isinstance(value, list | tuple) else str(value))

    return " ".join(f"{flag(name)} {shown(settings[name])}" for name in names)


def _other_settings(root: Path, there: dict[str, Any], asked: dict[str, Any]) -> str:
    """Return an error message with the differences, and the options with which fit uses the existing world."""
    names = [name for name in sorted(asked) if there.get(name) != asked[name]]
    shown = "; ".join(f"{name} is {there.get(name)} there, requested {asked[name]}" for name in names)
    other = "choose another folder (in fit: --data.source FOLDER --model.policy.path FOLDER/base)"
    use = f"use it as it is (in fit: {options_for(there, names, fit=True)}), or " if "version" not in names else ""
    return f"{root} contains a world with other settings: {shown}. To continue, {use}{other}."


def _fill(folder: Path, settings: dict[str, Any]) -> dict[str, object]:
    # Imported here: torch and transformers take seconds to import, and an existing world doesn't need them.
    from rap_lightning.world.base_model import new_model, sampler, train_base, train_tokenizer

    start = time.perf_counter()
    seed = settings["seed"]
    train_prompts, test_prompts = make_prompts(seed, families=settings["families"])
    tokenizer = train_tokenizer(vocabulary(train_prompts))
    model = new_model(tokenizer, seed)
    steps, goals = settings["base_steps"], {name: settings[name] for name in ("goal_share", "goal_noise", "habit")}
    examples = make_examples(train_prompts, (steps + 2) * BATCH, seed, **goals)
    loss = train_base(model, tokenizer, examples, steps=steps, batch_size=BATCH)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    print(f"world: base model of {model.num_parameters():,} weights, loss {loss:.2f}, in {seconds:.0f} s")

    knobs = {name: settings[name] for name in ("lean", "best", "contrast", "judge_noise", "on_policy")}
    sample = sampler(model, tokenizer, seed) if settings["on_policy"] > 0 else None
    train = make_pairs(train_prompts, settings["train_pairs"], seed, sample=sample, **knobs)
    test = make_pairs(test_prompts, settings["test_pairs"], seed, sample=sample, **knobs)
    for name, pairs in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"world: {len(train)} pairs to train on, {len(test)} to test on")
    return {
        "base_loss_nats_per_token": round(loss, 4),
        "base_parameters": model.num_parameters(),
        "base_seconds": round(seconds, 1),
        "tokens": len(tokenizer),
        "train": pair_figures(train),
        "test": pair_figures(test),
    }


def pair_figures(pairs: list[WorldPair]) -> dict[str, object]:
    """Return shares and counts of scores (chosen and rejected together) and of gaps, both in points."""
    scores = collections.Counter(itertools.chain.from_iterable((p["score_chosen"], p["score_rejected"]) for p in pairs))
    gaps = collections.Counter(pair["score_chosen"] - pair["score_rejected"] for pair in pairs)
    total = len(pairs)
    return {
        "prompts": len({pair["prompt_id"] for pair in pairs}),
        "mean_score": round(statistics.fmean(scores.elements()), 3),
        "top_scores": round(sum(scores[score] for score in scores if score >= TOP) / scores.total(), 4),
        "good_losers": round(sum(pair["score_rejected"] >= GOOD for pair in pairs) / total, 4),
        "bad_winners": round(sum(pair["score_chosen"] <= BAD for pair in pairs) / total, 4),
        "ties": round(gaps[0] / total, 4),
        "scores": {f"{score:g}": scores[score] for score in sorted(scores)},
        "gaps": {f"{gap:g}": gaps[gap] for gap in sorted(gaps)},
    }
