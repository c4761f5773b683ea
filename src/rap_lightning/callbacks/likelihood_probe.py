"""Log-probabilities of good and bad responses during fit, by reward: what training does to each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from rap_lightning.batches.at_goals import AtGoals, batch_of, in_passes
from rap_lightning.batches.dataset import Example
from rap_lightning.batches.types import split_segments
from rap_lightning.callbacks.goal_sampling import parts_of_fit
from rap_lightning.callbacks.intervals import AtIntervals, Row
from rap_lightning.datamodule import PreferenceDataModule
from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError
from rap_lightning.evaluation.response_figures import ROLES, bin_numbers, bins_of
from rap_lightning.models.policy import evaluating, most_on_any_rank
from rap_lightning.module import PreferenceModule
from rap_lightning.preferences.data_report import DataReport
from rap_lightning.preferences.pairs import Pair

BUDGET = 4096  # tokens in a forward pass without gradients


class LikelihoodProbe(AtIntervals):
    """Follows the log-probability of validation responses by role and reward, into ``likelihood.jsonl``.

    A line is ``{"step", "condition", "role", "low", "high", "n", "change_nats"}``: the mean change since before the
    first step, in nats, of the log-probability of the n chosen (higher reward) or rejected responses with a reward from
    low to high: without a goal in the prompt (``none``), with the best one, or with each response's own. A good
    rejected response that falls is unlearnt, a bad chosen one that rises is imitated. Logged as
    ``likelihood/CONDITION/ROLE/LOW-HIGH``.

    Args:
        pairs: pairs of the validation split (the training split, where there is none), drawn by the seed.
        bins: bins of rewards, of equal width over the judge's scale.
        every_n_steps: optimizer steps between two measurements; also before the first step and after the last.
        seed: of the draw.
    """

    file: ClassVar[str] = "likelihood.jsonl"

    def __init__(self, pairs: int = 64, bins: int = 3, every_n_steps: int = 100, seed: int = 0) -> None:
        super().__init__(every_n_steps)
        if pairs < 1 or bins < 1:
            raise ConfigError(f"LikelihoodProbe needs at least one pair and one bin, found {pairs} and {bins}")
        self.pairs, self.bins, self.seed = pairs, bins, seed
        self._items: list[Example] = []
        self._drawn: list[Pair] = []
        self._keys: dict[str, list[tuple[str | None, str | None]]] = {}
        self._edges: list[tuple[float, float]] = []
        self._digest = ""
        self._base: list[list[float]] = []  # of each item, before the first step
        self._base_of = ""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise ConfigError where pairs have no rewards, before the policy is loaded."""
        if stage == "fit" and parts_of_fit(trainer, pl_module, "LikelihoodProbe")[1].goal is None:
            raise ConfigError(
                "LikelihoodProbe needs the judge's rewards, which are not read with --data.goal null. Use "
                "--data.relabel none to train on the plain pairs of scored data, or remove the callback."
            )

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw and encode the pairs; keep their log-probabilities before the first step."""
        ours, data = parts_of_fit(trainer, module, "LikelihoodProbe")
        self._draw(data)
        if self._base_of != self._digest:
            if trainer.global_step > 0:
                rank_zero_warn(
                    "LikelihoodProbe: the checkpoint has no log-probabilities of these pairs from before the first "
                    f"step; changes are since step {trainer.global_step}."
                )
            self._base, self._base_of = self._logps(trainer, ours, data), self._digest

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Row], dict[str, float]]:
        """Return the mean changes."""
        ours, data = parts_of_fit(trainer, module, "LikelihoodProbe")
        now = self._base if trainer.global_step == 0 else self._logps(trainer, ours, data)
        change = {
            (item.pair_id, item.goal): (two[0] - old[0], two[1] - old[1])
            for item, two, old in zip(self._items, now, self._base, strict=True)
        }
        rows, metrics = [], {}
        number = bin_numbers([reward for pair in self._drawn for reward in pair.rewards], self._edges)
        for condition, keys in self._keys.items():
            for side, role in enumerate(ROLES):
                values = np.asarray(
                    [change[pair.id, two[side]][side] for pair, two in zip(self._drawn, keys, strict=True)]
                )
                for place, (low, high) in enumerate(self._edges):
                    mine = values[number[side::2] == place]
                    if not len(mine):
                        continue
                    mean = float(mine.mean())
                    rows.append(
                        {
                            "condition": condition, "role": role, "low": low, "high": high, "n": len(mine),
                            "change_nats": mean,
                        }
                    )  # fmt: skip
                    metrics[f"likelihood/{condition}/{role}/{low:g}-{high:g}"] = mean
        return rows, metrics

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"base": self._base, "base_of": self._base_of}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._base, self._base_of = state_dict["base"], state_dict["base_of"]

    def _draw(self, data: PreferenceDataModule) -> None:
        goal = data.goal
        assert goal is not None, "setup refuses data without"
        split = data.validation_split() or data.train_split
        pairs = data.scored_pairs(split, self.pairs, self.seed)
        report = DataReport("LikelihoodProbe", split)
        none, best = goal.unstated, goal.state_at(goal.best)
        encode = AtGoals(data.encoder, [none, best], goal)
        self._items = encode.examples(pairs, report)
        encoded = {item.pair_id for item in self._items}
        self._drawn = kept = [pair for pair in pairs if pair.id in encoded]
        lost = f", {len(pairs) - len(kept)} can't be encoded" if len(kept) < len(pairs) else ""
        cut = sum(tally.count for tally in report.truncated.values())
        cuts = f", {cut:,} prompts or responses cut to max_length" if cut else ""
        rank_zero_info(f"LikelihoodProbe: {len(kept):,} pairs of the split {split}{lost}{cuts}")
        own = [goal.own_goals(pair.rewards, pair.attributes) for pair in self._drawn]
        self._keys = {
            "none": [(none.key, none.key)] * len(kept),
            "best": [(best.key, best.key)] * len(kept),
            "own": [(a.key, b.key) for a, b in own],
        }
        low, high = goal.scale.judge_range
        if not (np.isfinite(low) and np.isfinite(high)):
            rewards = [reward for pair in self._drawn for reward in pair.rewards]
            low, high = min(rewards), max(rewards)
        self._edges = bins_of(low, high, self.bins)
        keys = "\n".join(f"{item.pair_id} {item.goal}" for item in self._items)
        self._digest = hashlib.sha256(keys.encode()).hexdigest()[:16]

    def _logps(self, trainer: pl.Trainer, module: PreferenceModule, data: PreferenceDataModule) -> list[list[float]]:
        """Return both responses' log-probabilities of each item, in nats; the ranks share the work."""
        policy = module.policy
        assert policy is not None, "fit builds the policy"
        ranks, rank = trainer.world_size, trainer.global_rank
        numbered = {id(item): i for i, item in enumerate(self._items)}
        passes = in_passes(self._items[rank::ranks], data.layout, BUDGET)
        found: list[tuple[int, list[float]]] = []
        with torch.no_grad(), evaluating(policy), trainer.precision_plugin.forward_context():
            for items in self._as_many_on_every_rank(passes, module.device):
                logps = policy.logps(batch_of(items, data.layout, data.pad_id).to(module.device)).tolist()
                both = zip(*split_segments(logps), strict=True)
                found += [(numbered[id(item)], list(two)) for item, two in zip(items, both, strict=True)]
        everyone = {number: two for share in gathered(found) for number, two in share}
        return [everyone[number] for number in range(len(self._items))]

    def _as_many_on_every_rank(self, passes: list[list[Example]], device: torch.device) -> Iterator[list[Example]]:
        """Repeat a pass on ranks that have fewer: a sharded policy communicates in each."""
        yield from passes
        for _ in range(most_on_any_rank(len(passes), device) - len(passes)):
            yield passes[-1] if passes else self._items[:1]
