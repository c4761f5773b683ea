"""Sampling and scoring at goals during fit, which leaves the run as it was; shared by GoalSamples and SteeringTable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from rap_lightning.callbacks.watchdog import Watchdog
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError
from rap_lightning.models.generation import generate
from rap_lightning.module import PreferenceModule

Goal = float | None
Judge = Callable[[str, str], float]
"""(prompt, response) -> reward on the goal template's scale"""


class JudgeFailed(ConfigError):
    """A user's judge raised an exception, or returned no finite number."""


@dataclass(frozen=True)
class Sample:
    """A response: its prompt's last turn, its text, and its number of tokens with the end of turn."""

    prompt: str
    text: str
    tokens: int


def parts_of_fit(
    trainer: pl.Trainer, module: pl.LightningModule, name: str
) -> tuple[PreferenceModule, PreferenceDataModule]:  # fmt: skip
    """Return our module and data module.

    Raises:
        ConfigError: the run has others.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, PreferenceDataModule) or not isinstance(module, PreferenceModule):
        raise ConfigError(f"{name} needs a PreferenceModule and a PreferenceDataModule; remove it from the callbacks.")
    return module, data


def check_goals(data: PreferenceDataModule, goals: Sequence[float], name: str) -> None:
    """Log a note for goals outside the scale that can be asked for.

    Raises:
        ConfigError: there is no goal template, or it can't state one of the goals.
    """
    if data.goal is None:
        raise ConfigError(f"{name}: goals have no effect with --data.goal null; remove one of the two.")
    for goal in goals:
        if note := data.goal.refuse_outside(float(goal), f"{name}: goals"):
            rank_zero_info(note)


def tell_watchdog(trainer: pl.Trainer, found: Mapping[Any, Sequence[Sample]]) -> None:
    """Give the watchdog, if there is one, the lengths of the samples."""
    lengths = [one.tokens for samples in found.values() for one in samples]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Watchdog):
            callback.saw_samples(lengths, trainer.global_step)


def log_now(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Log to every logger and save at once: the run may be killed before the next line."""
    for logger in trainer.loggers if metrics else ():
        logger.log_metrics(dict(metrics), step=trainer.global_step)
        logger.save()


def score(judge: Judge, sample: Sample, name: str) -> float:
    """Return the judge's reward for a sample.

    Raises:
        JudgeFailed: it raised, or returned no finite number.
    """
    try:
        reward = float(judge(sample.prompt, sample.text))
    except Exception as error:  # a user's judge may raise anything
        raise JudgeFailed(f"{name}: the judge raised {type(error).__name__}: {error}.") from error
    if not isfinite(reward):
        raise JudgeFailed(f"{name}: the judge gave {reward}, not a finite number.")
    return reward


def sample_at_goals(
    trainer: pl.Trainer, module: PreferenceModule, data: PreferenceDataModule, histories: Sequence[Any],
    goals: Sequence[Goal], seed: int, name: str,
) -> dict[Goal, list[Sample]]:  # fmt: skip
    """Return a response to each conversation at each goal, on every rank; the ranks share the work.

    The run's random numbers are left as they were. Texts depend on the seed and on the number of ranks.

    Raises:
        ConfigError: the policy is sharded.
    """
    assert module.policy is not None, "fit builds the policy"
    if module.device_mesh is not None:
        raise ConfigError(f"{name} can't sample from a sharded policy yet; remove it from the callbacks.")
    ranks, rank = trainer.world_size, trainer.global_rank
    mine = list(histories)[rank::ranks]
    found: dict[Goal, list[Sample]] = {}
    with isolate_rng():
        torch.manual_seed(seed + rank)
        for goal in goals:
            texts: list[str] = []
            for first in range(0, len(mine), data.batch_size):
                part = mine[first : first + data.batch_size]
                batch = data.prompt_batch(part, goal, module.generation).to(module.device)
                texts += generate(module.policy, module.tokenizer, batch, module.generation)
            # tokens of the text, and one for the end of turn, which a response cut at max_new_tokens lacks
            tokens = map(len, module.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
            longest = module.generation.max_new_tokens
            own = [
                Sample(history[-1]["content"], text, min(count + 1, longest))
                for history, text, count in zip(mine, texts, tokens, strict=True)
            ]
            shares = gathered(own)
            found[goal] = [shares[i % ranks][i // ranks] for i in range(len(histories))]
    return found
