"""Detection of losses, gradients and weights that are not finite, before an optimizer step spreads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError, NotFinite
from rap_lightning.losses.base import over_ranks
from rap_lightning.models.digests import not_finite
from rap_lightning.module import Pass, PreferenceModule

SHOWN = 3
"""Number of pairs that a message names."""


class Guard(pl.Callback):
    """Checks the losses and the gradient of each optimizer step before it is taken; all ranks decide the same.

    Args:
        non_finite: what to do where one is infinite or nan. stop: end the run, naming the pairs, with a checkpoint of
            the step before. skip: leave that step out (weights, optimizer and log stay as they were, the schedule
            advances), count it as ``guard/skipped_steps``, and continue; weights that are not finite themselves always
            stop.
        limit: steps in a row that may be skipped (by default 10); more of them end the run.
    """

    def __init__(self, non_finite: Literal["stop", "skip"] = "stop", limit: int | None = None) -> None:
        if limit is not None and non_finite != "skip":
            raise ConfigError("--guard.limit has no effect without --guard.non_finite skip; remove it.")
        if limit is not None and limit < 1:
            raise ConfigError(f"--guard.limit must be at least 1, found {limit}")
        self.non_finite, self.limit = non_finite, 10 if limit is None else limit
        self.skipped = self._in_a_row = 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the step; stop, or leave it out.

        Raises:
            NotFinite: the run must stop.
        """
        if not isinstance(pl_module, PreferenceModule) or not pl_module.passes:
            return
        bad_losses = torch.stack([~_finite(one).all() for one in pl_module.passes]).any()
        # a gradient scaler (16-mixed) produces infinite gradients now and then, and skips such steps by itself
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        bad_gradient = torch.zeros_like(bad_losses) if scaled else ~pl_module.gradient_norm().isfinite()
        # a plain step's one wait for the device: before the weights change, which could not be taken back
        losses, gradient = over_ranks(torch.stack((bad_losses, bad_gradient)).float()).tolist()
        if not losses and not gradient:
            self._in_a_row = 0
            return
        message, broken = self._message(trainer, pl_module)
        self._in_a_row += 1
        if self.non_finite == "stop" or broken or self._in_a_row > self.limit:
            if self._in_a_row > self.limit:
                message += f" {self.limit} steps in a row have been skipped, the --guard.limit."
            error = NotFinite(message)
            error.saves, error.on_all_ranks = not broken, True
            raise error
        self.skipped += 1
        pl_module.skip_step()
        rank_zero_warn(f"skipped ({self.skipped} so far): {message}")
        for logger in trainer.loggers:
            logger.log_metrics({"guard/skipped_steps": float(self.skipped)}, step=trainer.global_step + 1)

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _message(self, trainer: pl.Trainer, module: PreferenceModule) -> tuple[str, bool]:
        """Return what is not finite, and whether that includes weights; the same text on every rank."""
        assert module.policy is not None, "training builds the policy"
        found = gathered((not_finite(module.policy, trained=True), _offending(module.passes), _names(module)))
        step = trainer.global_step + 1
        weights = sorted({text for texts, _, _ in found for text in texts})
        if weights:
            more = f" and {len(weights) - SHOWN} more parameters" if len(weights) > SHOWN else ""
            return (
                f"step {step}: weights of the policy are not finite: {', '.join(weights[:SHOWN])}{more}. They are not "
                "saved: resume from the checkpoint before. If it happens again at the same step, try a smaller "
                "learning rate or --trainer.gradient_clip_val; if not, check the machine's memory.",
                True,
            )
        pairs = [text for _, texts, _ in found for text in texts]
        if pairs:
            more = f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else ""
            return (
                f"step {step}: the loss is not finite for {'; '.join(pairs[:SHOWN])}{more}. Check those rows "
                "(rap-lightning inspect), or set --guard.non_finite skip to leave such steps out.",
                False,
            )
        names = sorted({text for _, _, texts in found for text in texts})
        ids = [pair for one in module.passes for pair in one.batch.pair_ids]
        return (
            f"step {step}: all losses are finite, but the gradient is not, of {', '.join(names[:SHOWN])} "
            f"({len(names)} parameters), in a step of pairs {', '.join(ids[:SHOWN])} and {max(0, len(ids) - SHOWN)} "
            "more. Try a smaller --model.loss.beta or learning rate; --guard.non_finite skip leaves such steps out.",
            False,
        )


def _finite(one: Pass) -> torch.Tensor:
    """Return whether each loss is finite, [B]; true for fillers."""
    return one.losses.isfinite() | (one.batch.weights == 0)


def _offending(passes: Sequence[Pass]) -> list[str]:
    """Describe the pairs whose loss is not finite: id, goal, lengths, log-probabilities, rewards."""
    texts = []
    for one in passes:
        for i in (~_finite(one)).nonzero()[:, 0].tolist():
            batch, policy, reference = one.batch, one.policy, one.reference
            logps = f"policy {float(policy.chosen[i]):.4g} and {float(policy.rejected[i]):.4g}"
            if reference is not None:
                logps += f", reference {float(reference.chosen[i]):.4g} and {float(reference.rejected[i]):.4g}"
            lengths, rewards = batch.lengths.tolist()[2 * i : 2 * i + 2], batch.rewards.tolist()[i]
            texts.append(
                f"pair {batch.pair_ids[i]} (goal {batch.goals[i]}; chosen and rejected: {lengths[0]} and {lengths[1]} "
                f"tokens, log-probabilities of the {logps} nats, rewards {rewards[0]:g} and {rewards[1]:g}; loss "
                f"{float(one.losses[i]):g})"
            )
    return texts


def _names(module: PreferenceModule) -> list[str]:
    """Return the parameters whose gradient is not finite on this rank."""
    assert module.policy is not None, "training builds the policy"
    grads = [(name, p.grad) for name, p in module.policy.named_parameters() if p.grad is not None]
    local = [(name, grad.to_local() if hasattr(grad, "to_local") else grad) for name, grad in grads]
    return [name for name, grad in local if not grad.isfinite().all()]
