"""One line before the first step: whether the policy reads the goals it is about to be trained on."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from rap_lightning.callbacks.goal_sampling import parts_of_fit
from rap_lightning.errors import ConfigError
from rap_lightning.preferences.relabelling import CHOSEN_GOAL, REJECTED_GOAL
from rap_lightning.training.goal_probe import AMONG, encode_halves, mean_shift, measure_margins, sample_pairs


class GoalMargins(pl.Callback):
    """Prints how far the policy's margins move between a pair's two goals, in nats, before the first step.

    The figure of ``rap-lightning inspect --model``, without its gradients: on training pairs with wide gaps, with two
    forward passes each. Around 0, the policy doesn't read the goals yet, and the two halves of a pair nearly cancel. A
    new adapter that goals scale changes nothing before it is trained, so its line says 0. A run that is resumed after
    its first step prints nothing. Neither random numbers nor weights change.

    Args:
        pairs: how many pairs, those with the widest gaps of four times as many.
        seed: of the draw.
    """

    def __init__(self, pairs: int = 8, seed: int = 0) -> None:
        if pairs < 2:
            raise ConfigError(f"GoalMargins: pairs must be at least 2, found {pairs}")
        self.pairs, self.seed = pairs, seed

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raise ConfigError where a pair has no two goals to compare, before the policy is loaded."""
        if stage != "fit":
            return
        _, data = parts_of_fit(trainer, pl_module, "GoalMargins")
        if not {CHOSEN_GOAL, REJECTED_GOAL} <= set(data.relabelling.origins):
            raise ConfigError(
                f"GoalMargins compares a pair's two goals, and relabel {data.relabelling.mode} doesn't train on both. "
                "Use relabel both, or remove it."
            )
        if data.streaming:
            raise ConfigError(
                "GoalMargins reads training pairs before the first step, and a stream is read during training. Remove "
                "it, or --data.streaming."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure on every rank, as a sharded policy needs, and print on rank zero."""
        if trainer.global_step > 0:
            return
        module, data = parts_of_fit(trainer, pl_module, "GoalMargins")
        assert module.policy is not None, "fit builds the policy"
        with module.step_logger.pause(), trainer.precision_plugin.forward_context():
            drawn = data.scored_pairs(data.train_split, self.pairs * AMONG, self.seed)
            halves = encode_halves(sample_pairs(drawn, self.pairs, self.seed), data.encoder)
            shift = mean_shift(measure_margins(module.policy, halves, data.pad_id))
        low, high = shift.low, shift.high
        between = "" if low is None or high is None else f" (95% interval {low:+.2f} to {high:+.2f})"
        rank_zero_info(
            f"goals: the margin moves by {shift.value:+.2f} nats{between} between the two goals of {shift.n} pairs; "
            "inspect --model says how much of plain DPO's gradient is left"
        )
