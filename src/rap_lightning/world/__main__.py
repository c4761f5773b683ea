"""``python -m rap_lightning.world FOLDER``: make the small world, its base model among it, for anything but fit."""

import sys

from jsonargparse import auto_cli

from rap_lightning.world.data import BEST, FAMILIES_BY_DEFAULT
from rap_lightning.world.make import make_world


def world(
    root: str,
    train_pairs: int = 2000,
    test_pairs: int = 200,
    base_steps: int = 600,
    seed: int = 0,
    families: list[str] = list(FAMILIES_BY_DEFAULT),  # noqa: B006 (the command line makes a new one)
    lean: float = 0.3,
    best: float = BEST,
    contrast: float = 0.0,
    judge_noise: float = 0.0,
    on_policy: float = 0.0,
    goal_share: float = 0.7,
    goal_noise: float = 2.5,
) -> None:
    """Make the small world: scored pairs, a rule that judges them, a tiny chat model.

    For example: python -m rap_lightning.world runs/noisy --judge_noise 2 --families [words,numbers,words-backwards]

    Args:
        root: folder to make.
        train_pairs: number of pairs to train on, ties included.
        test_pairs: number of pairs to test on.
        base_steps: optimizer steps of the base model, 32 examples each.
        seed: decides prompts, pairs and base model.
        families: kinds of prompts: words, numbers, words-backwards, numbers-backwards.
        lean: how far qualities lean low, above -1; below 0 they lean high.
        best: the highest quality of a response, 0 to 1: the lower, the rarer top scores (docs/world.md has shares).
        contrast: how far a pair's responses are drawn apart, 0 to 1: the higher, the fewer good losers and bad winners.
        judge_noise: standard deviation, in points, of the noise in the data's scores.
        on_policy: part of the pairs that the base model itself wrote, 0 to 1.
        goal_share: part of the base model's training examples that state a goal; at 0 it has never seen one.
        goal_noise: by how many points (standard deviation) the last of these goals are off; the less, the better the
            base knows goals.
    """
    make_world(
        root, train_pairs=train_pairs, test_pairs=test_pairs, base_steps=base_steps, seed=seed, families=families,
        lean=lean, best=best, contrast=contrast, judge_noise=judge_noise, on_policy=on_policy,
        goal_share=goal_share, goal_noise=goal_noise,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        auto_cli(world, as_positional=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
