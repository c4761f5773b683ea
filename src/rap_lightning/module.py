"""The system: a policy, a frozen reference, a preference loss and its metrics."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rap_lightning.batches.types import Batch, PairLogps, PairRewards, PromptBatch, TokenLogps
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.distributed.deepspeed_checks import refuse_in_trainer
from rap_lightning.distributed.fsdp2 import Sharding, reshard
from rap_lightning.distributed.sharded_load import load_sharded
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import DPO, SFT, PreferenceLoss
from rap_lightning.losses.base import over_ranks
from rap_lightning.losses.contract import check_loss
from rap_lightning.models.adapters import adapter_digest
from rap_lightning.models.digests import base_digest, same_base
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy import Policy, of_adapter
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import NoReference, Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.policy_copy import AdapterAsLoaded
from rap_lightning.models.references.post_warmup import Warmed
from rap_lightning.preferences.relabelling import UNCONDITIONED
from rap_lightning.training import out_of_memory as memory
from rap_lightning.training.metrics import PairMetrics
from rap_lightning.training.run_state import random_state, recount, set_random_state, settle
from rap_lightning.training.schedules import CosineWithWarmup, Schedule
from rap_lightning.training.warm_up import WarmUp, check_strategy

IMITATION = SFT()
"""What a warm-up trains on."""
AGREEMENT = 1e-3
"""Nats: in float32 a policy and the reference it starts from may differ by rounding, not by more."""


def adamw(params: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW at 5e-7, no weight decay."""
    return torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0, fused=True)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a forward pass gave, for callbacks that look at pairs; a step's stand in ``PreferenceModule.passes``.

    Attributes:
        batch: what went in.
        losses: [B], without gradient.
        policy, reference: log-probabilities, without gradient.
    """

    batch: Batch
    losses: Tensor
    policy: PairLogps
    reference: PairLogps | None


class PreferenceModule(pl.LightningModule):
    """Direct alignment of a policy on pairs of responses.

    To change what is optimised, write a :class:`PreferenceLoss`; to change the step itself, override
    :meth:`pair_losses`.

    Args:
        policy: which model is trained, and how it is loaded.
        loss: a PreferenceLoss.
        reference: where reference log-probabilities come from. By default AdaptersOff with a new LoRA adapter,
            AdapterAsLoaded with one that is continued, Frozen without, and none where the loss needs none.
        optimizer: makes the optimizer from the trainable parameters.
        schedule: makes the learning-rate schedule.
        generation: how ``predict`` and sampling callbacks generate.
        warm_up: optimizer steps of SFT before the loss begins; with both halves, on each response under its own goal.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        loss: PreferenceLoss = DPO(),  # noqa: B008 (jsonargparse makes a new one)
        reference: Reference | None = None,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = CosineWithWarmup(),  # noqa: B008
        generation: Generation = Generation(),  # noqa: B008
        warm_up: WarmUp | None = None,
    ) -> None:
        super().__init__()
        policy.check_trainable()
        self.policy_config, self.loss = policy, loss
        self.optimizer, self.schedule, self.generation = optimizer, schedule, generation
        if warm_up is not None:
            reference = warm_up.reference(reference, loss)
        elif isinstance(reference, Warmed):
            raise ConfigError("reference Warmed comes with --model.warm_up.steps N; leave --model.reference out.")
        self.warm_up = warm_up
        self.reference = _resolve_reference(reference, loss, policy)
        if type(self).pair_losses is PreferenceModule.pair_losses:  # else it may give the loss something of its own
            check_loss(loss)
        self.policy: Policy | None = None
        terms = tuple(loss.term_names())
        self.metrics = torch.nn.ModuleDict({name: PairMetrics(terms) for name in ("fit", "val", "test")})
        self.last_logged: tuple[int, dict[str, float]] = (0, {})
        self.run_key: str | None = None  # the command line sets it, and finds a run's checkpoints by it
        self.passes: list[Pass] = []
        self._clock = self._pause = 0.0
        self._grad_norm = self._lr = float("nan")
        self._norm: Tensor | None = None
        self._checked = self._restored = self._trained = self._updating = False
        self._digests: dict[str, str] = {}
        self._whole_step: dict[str, Any] = {}  # of the last one: sums for the log, random numbers
        self._resumed: dict[str, Any] | None = None
        self._validated = -1  # the step of the last validation
        self._steps_done = 0  # also known in validate and test, where the trainer counts no steps

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.policy_config.load_tokenizer()

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the weights at hand have taken; the trainer counts none in validate and test."""
        return self.global_step if self.trainer.state.fn == TrainerFn.FITTING else self._steps_done

    @property
    def warming_up(self) -> bool:
        """Whether the next step is one of the warm-up's."""
        return self.warm_up is not None and self._steps_done < self.warm_up.steps

    @property
    def active_loss(self) -> PreferenceLoss:
        """What the next step trains on: SFT during the warm-up, else the loss."""
        return IMITATION if self.warming_up else self.loss

    # -- building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load policy and reference, once, on every rank; shard them where the strategy brings a device mesh."""
        # "-true" precisions would round a batch's rewards and weights, if Lightning could take its classes apart: it
        # refuses frozen ones. Token ids need no converting.
        self.trainer.precision_plugin.convert_input = _as_it_is  # type: ignore[method-assign, assignment]
        if self.policy is not None:
            return
        self._check_data()
        dtype, sharding = self.policy_config.resolve_dtype(), self._sharding()
        self.policy = self._load_policy(dtype, sharding)
        if self.policy.has_adapter:
            self._digests["base"] = base_digest(self.policy)
        if (adapter := self.policy_config.adapter) is not None:
            self._digests["adapter"] = adapter_digest(adapter, self.policy_config.adapter_revision)
        difference = check_head(self.policy)
        if reason := check_sharing(self.policy):
            rank_zero_info(
                f"{self.policy_config.path} shares no prefixes and packs nothing: {reason}. With the layouts "
                "packed and tree, sequences go through it one at a time."
            )
        if sharding is not None:
            reshard(self.policy)
            self.reference.shard(sharding)
        self._describe(self.policy, dtype, difference)
        self.reference.load(self.policy_config, dtype)
        self.reference.follow(self.policy, 0)

    def _load_policy(self, dtype: torch.dtype, sharding: Sharding | None) -> Policy:
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, HalfPrecision) and dtype != plugin._desired_input_dtype:
            raise ConfigError(
                f"--model.policy.dtype {self.policy_config.dtype} has no effect with --trainer.precision "
                f"{plugin.precision}, which converts all weights. Remove one of the two."
            )
        if sharding is not None:
            policy, whole = load_sharded(self.policy_config, dtype, sharding, trained=True)
            if whole:
                rank_zero_info(f"{self.policy_config.path} is loaded whole by each process, then sharded: {whole}.")
            return policy
        policy = self.policy_config.build(dtype)
        if isinstance(plugin, HalfPrecision):  # Lightning converts later, and references copy the policy now
            plugin.convert_module(policy)
        return policy

    def _describe(self, policy: Policy, dtype: torch.dtype, difference: float) -> None:
        """Say what is trained; ``difference`` is the head's from the model's own, in nats."""
        total = sum(p.numel() for p in policy.parameters())
        trainable = [p for p in policy.parameters() if p.requires_grad]
        rank_zero_info(
            f"policy: {self.policy_config.path}, {total:,} parameters, "
            f"{sum(p.numel() for p in trainable):,} trainable, {dtype}; head checked to {difference:.1e} nats\n"
            f"loss: {self.loss}{'' if self.warm_up is None else f', after {self.warm_up.steps} steps of SFT'}; "
            f"reference: {type(self.reference).__name__}"
        )
        if any(p.dtype == torch.bfloat16 for p in trainable):
            rank_zero_warn(
                "Trainable weights are bfloat16: updates smaller than 1/256 of a weight are rounded away, so small "
                "learning rates train nothing. Use --trainer.precision bf16-mixed, which keeps them in float32."
            )

    def _sharding(self) -> Sharding | None:
        """How the strategy wants weights sharded; None where every process holds them whole."""
        if self.device_mesh is None:
            return None
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise ConfigError(
                "tensor parallelism isn't there: the head computes log-probabilities from its whole weight. Set "
                f"--trainer.strategy.tensor_parallel_size 1 and --trainer.strategy.data_parallel_size "
                f"{self.trainer.world_size}, or use the strategy FSDP2."
            )
        # of a strategy that says more than sizes (rap_lightning.strategies)
        asked = getattr(self.trainer.strategy, "sharding", None)
        return asked if isinstance(asked, Sharding) else Sharding(self.device_mesh["data_parallel"])

    def _check_data(self) -> None:
        """Refuse data on which the loss would not mean what it says, before anything is loaded."""
        refuse_in_trainer(self.trainer)
        data, name = getattr(self.trainer, "datamodule", None), type(self.loss).__name__
        size = getattr(data, "batch_size", None)
        if size is not None and size < self.loss.least_pairs:
            raise ConfigError(
                f"{name} needs at least {self.loss.least_pairs} pairs in a batch: {self.loss.batch_level}. "
                f"Found --data.batch_size {size}."
            )
        if self.loss.batch_level and getattr(data, "token_budget", None) is not None:
            raise ConfigError(
                f"{name} looks at all pairs of a batch together ({self.loss.batch_level}), and --data.token_budget "
                "takes a batch apart. Remove it, or set a smaller --data.batch_size."
            )
        weight = getattr(data, "rejected_weight", 1.0)
        if self.loss.batch_level and weight != 1:
            raise ConfigError(
                f"--data.rejected_weight {weight:g} weighs single pairs, and {name} has no loss of single pairs "
                f"({self.loss.batch_level}). Remove it, or choose another loss."
            )
        if self.loss.needs_rewards and not getattr(data, "has_rewards", True):
            raise ConfigError(
                f"{name} needs the judge's rewards, and the data have none. Use another loss, or scored data."
            )

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the trainable parameters, the schedule stepping with it."""
        assert self.policy is not None, "configure_model comes first"
        try:
            optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        except ValueError as error:  # torch checks its options only here
            raise ConfigError(f"--model.optimizer: {error}") from error
        # Lightning won't clip the gradients of an optimizer that could unscale them itself, as fused ones say they can.
        # Told that this one can't, it unscales them before clipping (and before their norm is looked at) where there is
        # a scaler (16-mixed), and has nothing to unscale elsewhere
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 0:  # Lightning says -1 of a stream
            raise ConfigError(
                "the schedule needs to know how long the run is: set --trainer.max_steps, or --trainer.max_epochs "
                "where the data are not streamed."
            )
        if self.warm_up is not None and (self.warming_up or self._restored):
            check_strategy(self.trainer)
            scheduler = self.warm_up.scheduler(self.schedule, optimizer, int(steps))
        else:
            scheduler = self.schedule(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- the step -------------------------------------------------------------------------------------------------

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of each pair, [B], and the implicit rewards of chosen and rejected, each [B]."""
        loss = self.active_loss
        losses = loss.per_pair(policy, reference, rewards)
        with torch.no_grad():
            implicit = loss.implicit_rewards(policy, reference)
        return losses, implicit

    def _step(self, batch: Batch, metrics: PairMetrics) -> Tensor:
        assert self.policy is not None, "configure_model comes first"
        loss = self.active_loss
        other = unrelated(batch) if loss.needs_unrelated else None
        policy = self._policy_logps(batch, other)
        reference = self._reference_logps(batch, other) if loss.needs_reference else None
        rewards = PairRewards(batch.rewards[:, 0], batch.rewards[:, 1], batch.origin != UNCONDITIONED)
        if loss.needs_rewards and not batch.rewards.isfinite().all():
            raise DataError(f"{type(loss).__name__} needs the judge's rewards; a pair of {batch.pair_ids} has none.")
        losses, implicit = self.pair_losses(policy, reference, rewards)
        if metrics is self.metrics["fit"]:
            self.passes.append(Pass(batch, losses.detach(), _detached(policy), reference))
        metrics.update(losses, implicit, policy, batch.origin, batch.weights, batch.tokens, loss.terms())
        if reference is not None and metrics is self.metrics["fit"]:
            self._check_agreement(policy, reference, losses, batch)
        return losses

    def _policy_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """The policy's log-probabilities with what the loss asks for; of ``other`` without gradient."""
        assert self.policy is not None, "configure_model comes first"
        with torch.no_grad():
            more = None if other is None else self.policy.logps(other)
        if self.active_loss.needs_collisions:
            token_logps, collisions = self.policy(batch, collisions=True)
            return self._pair_logps(batch, token_logps, more, collisions.detach())
        return self._pair_logps(batch, self.policy(batch), more)

    def _reference_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """The same of the reference, whose tokens are only asked for where the loss needs them."""
        assert self.policy is not None, "configure_model comes first"
        more = None if other is None else self.reference.logps(self.policy, other)
        if self.active_loss.needs_tokens:
            return self._pair_logps(batch, self.reference.token_logps(self.policy, batch), more)
        logps = self.reference.logps(self.policy, batch)
        return PairLogps.from_segments(logps, batch.lengths, weights=batch.weights, unrelated=more)

    def _pair_logps(
        self, batch: Batch, token_logps: Tensor, other: Tensor | None, collisions: Tensor | None = None
    ) -> PairLogps:
        sums = sum_by_segment(token_logps, batch.segment, len(batch.lengths))
        tokens = TokenLogps.of(token_logps, batch.segment, collisions) if self.active_loss.needs_tokens else None
        return PairLogps.from_segments(sums, batch.lengths, weights=batch.weights, tokens=tokens, unrelated=other)

    def training_step(self, batch: tuple[Batch, ...], batch_idx: int) -> Tensor:
        """The mean over the pairs of the whole optimizer step, over all ranks and accumulated batches.

        A batch comes as its forward passes; all but the last leave their gradients behind at once, and with them the
        memory they took.
        """
        trainer = self.trainer
        if batch_idx % trainer.accumulate_grad_batches == 0:
            trainer.optimizers[0].zero_grad()
            self.passes, self._norm = [], None
        self._batch = batch
        *first, last = batch
        for part in first:
            with memory.explained(self._where("forward pass")):
                loss = self._share_of_step(part)
            with torch.autocast(self.device.type, enabled=False):
                trainer.strategy.backward(loss, None)
        # Lightning divides what is returned by the accumulated batches
        with memory.explained(self._where("forward pass")):
            return self._share_of_step(last) * trainer.accumulate_grad_batches

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, but out of memory is explained."""
        with memory.explained(self._where("backward pass")):
            super().backward(loss, *args, **kwargs)

    def _where(self, what: str) -> Callable[[], str]:
        """Says what ran out of memory, and what would take less."""

        def text() -> str:
            config, data = self.policy_config, getattr(self.trainer, "datamodule", None)
            help_ = []
            if (
                getattr(data, "token_budget", 0) is None
                and not getattr(data, "streaming", False)
                and not self.loss.batch_level
            ):
                help_.append("--data.token_budget N, at least the longest pair (the same gradients in smaller passes)")
            elif getattr(data, "batch_size", 1) > 1:
                help_.append("a smaller --data.batch_size with more --trainer.accumulate_grad_batches")
            if not config.gradient_checkpointing and self.policy is not None and not self.policy.checkpoints:
                help_.append("--model.policy.gradient_checkpointing true")
            if isinstance(self.reference, Frozen):
                help_.append("--model.reference Stored (no second model beside the policy)")
            if not config.adapts:
                help_.append("--model.policy.lora.r 16 (optimizer state for an adapter only)")
            help_.append("a smaller --data.max_length")
            return (
                f"in the {what} of step {self.global_step + 1}: {memory.described(self._batch)}. "
                f"What takes less memory: {'; '.join(help_)}"
            )

        return text

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the loss and the reference follow, before a checkpoint can be written."""
        assert self.policy is not None, "configure_model comes first"
        self._trained = True  # a new trainer counts from 0, so its step says nothing
        with memory.explained(self._where("optimizer's update")):
            super().optimizer_step(*args, **kwargs)
        self.active_loss.after_step()
        self._steps_done += 1
        self.reference.follow(self.policy, self._steps_done)
        if self.warm_up is not None and self._steps_done == self.warm_up.steps:
            self.warm_up.end(self.trainer)
            rank_zero_info(
                f"the warm-up of {self._steps_done} steps is over: {type(self.loss).__name__} begins"
                + (", with the policy as it is now for its reference" if self.loss.needs_reference else "")
            )
        self._updating = False
        self._keep_whole_step()

    def skip_step(self) -> None:
        """Leave weights, optimizer, loss and log as if this step's batches had not been; to be called on all ranks.

        For callbacks, in ``on_before_optimizer_step``.
        """
        for p in self.parameters():
            p.grad = None  # optimizers leave such parameters alone, their moments and counts too
        self._norm = None
        self.active_loss.forget_step()
        self._metrics("fit").go_on_from(self._whole_step["window"])

    @property
    def updating(self) -> bool:
        """Whether the optimizer is changing weights: what is saved now would be half a step."""
        return self._updating

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping, [] float32, computed once a step; all ranks must call it."""
        if self._norm is None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norm: Any = torch.nn.utils.get_total_norm(grads)
            self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self._norm

    def _keep_whole_step(self) -> None:
        self._whole_step = {
            "window": self._metrics("fit").sums_so_far(),
            "seconds": time.perf_counter() - self._clock,
            "grad_norm": self._grad_norm,
            "lr": self._lr,
            "random": random_state(self.device),
        }

    def _share_of_step(self, part: Batch) -> Tensor:
        losses = self._step(part, self._metrics("fit"))
        # the strategy divides gradients by the ranks: undo that
        return (losses * part.loss_weights).sum() * (self.trainer.world_size / part.step_weight)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Done in ``training_step``: here the gradients of its first forward passes are already there."""

    def validation_step(self, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Adds to the epoch's metrics."""
        for part in batch:
            self._step(part, self._metrics("val"))

    def test_step(self, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Adds to the epoch's metrics."""
        for part in batch:
            self._step(part, self._metrics("test"))

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response for each prompt, beside the prompt's record."""
        assert self.policy is not None, "configure_model comes first"
        texts = generate(self.policy, self.tokenizer, batch, self.generation)
        return [{**record, "response": text} for record, text in zip(batch.records, texts, strict=True)]

    # -- numbers --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Start the clock of the throughput."""
        batches, accumulate = self.trainer.num_training_batches, self.trainer.accumulate_grad_batches
        epoch = sized_len(self.trainer.train_dataloader)  # a stream has no length
        cut = math.isfinite(batches) and (epoch is None or batches < epoch)
        if cut and batches % accumulate:
            raise ConfigError(
                f"--trainer.limit_train_batches ends an epoch after {batches} batches, in the middle of an optimizer "
                f"step of {accumulate}. Use a multiple of accumulate_grad_batches."
            )
        self._clock = time.perf_counter()
        if self.global_rank > 0:  # weights began alike; dropout must not
            torch.manual_seed(torch.initial_seed() + self.global_rank)
        if self._resumed is not None:
            self._go_on(self._resumed)
            self._resumed = None
        self._keep_whole_step()

    def _go_on(self, saved: dict[str, Any]) -> None:
        """Take up the random numbers and the sums for the log of the run that this one goes on from."""
        ranks, rank = saved["random"], self.global_rank
        if len(ranks) == self.trainer.world_size:
            set_random_state(ranks[rank], self.device)
        else:
            rank_zero_warn(
                f"the checkpoint is of a run on {len(ranks)} devices, and this one has {self.trainer.world_size}: "
                "random numbers (of dropout) begin anew."
            )
        window = saved["window"] if rank == 0 else {n: torch.zeros_like(v) for n, v in saved["window"].items()}
        try:
            self._metrics("fit").go_on_from(window)
        except ValueError as error:
            raise ConfigError(
                f"the checkpoint is of a run with another loss than {type(self.loss).__name__}: {error}. Go on with "
                "the loss that the run began with."
            ) from error
        self._clock -= saved["seconds"]
        self._grad_norm, self._lr = saved["grad_norm"], saved.get("lr", float("nan"))
        if self._logs_at(self.global_step) and float(saved["window"]["counts"].sum()):
            self._log_window(bar_too=False, norm_too=True)  # saved before the step could be logged

    def on_train_epoch_start(self) -> None:
        """Refuse another number of accumulated batches than the steps were planned with."""
        plan = getattr(self.trainer.train_dataloader, "plan", None)  # of the user's own loader there is none
        planned = getattr(plan, "accumulate", None)
        if planned is not None and planned != self.trainer.accumulate_grad_batches:
            raise ConfigError(
                f"the data were laid out for --trainer.accumulate_grad_batches {planned}, and something (a "
                f"GradientAccumulationScheduler?) has set {self.trainer.accumulate_grad_batches}: gradients would be "
                "multiplied. Use accumulate_grad_batches alone."
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the step's learning rate, and the gradient's norm before clipping, where they will be logged."""
        self._lr = optimizer.param_groups[0]["lr"]  # the scheduler has gone on when the step is logged
        if self._logs_at(self.global_step + 1):
            skipped = all(p.grad is None for p in self.parameters())
            self._grad_norm = float("nan") if skipped else float(self.gradient_norm())
        self._updating = True

    def on_train_batch_end(self, outputs: Any, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Log the means since the last log, over all ranks."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if stepped and self._logs_at(self.global_step):
            self._log_window()

    def on_train_end(self) -> None:
        """Log the steps since the last log."""
        if self.global_step > self.last_logged[0]:
            # Lightning takes nothing for the bar any more, and the norm kept is an earlier step's
            self._log_window(bar_too=False, norm_too=False)

    def _log_window(self, *, bar_too: bool = True, norm_too: bool = True) -> None:
        metrics = self._metrics("fit")
        values = metrics.compute()
        metrics.reset()
        if not values:
            return
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        values |= {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        values["lr"] = self._lr
        if norm_too:
            values["grad_norm"] = self._grad_norm
        self.last_logged = (self.global_step, values)
        self._log(values, prefix="", bar_too=bar_too)
        if self._whole_step:
            self._whole_step |= {"window": metrics.sums_so_far(), "seconds": 0.0}

    @contextmanager
    def not_training(self) -> Iterator[None]:
        """For callbacks: time spent within is no training time, as of validation."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - begin

    def on_validation_end(self) -> None:
        """Time spent on validation is no training time."""
        self._clock += time.perf_counter() - self._pause
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._validated = self.global_step

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's means as ``val/...``."""
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        """Log the epoch's means as ``test/...``."""
        self._log_epoch("test")

    def _metrics(self, name: str) -> PairMetrics:
        metrics = self.metrics[name]
        assert isinstance(metrics, PairMetrics)
        return metrics

    def _logs_at(self, step: int) -> bool:
        if self.warm_up is not None and step == self.warm_up.steps:
            return True  # no mean is of both losses
        return step == 1 or step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]

    def _log_epoch(self, name: str) -> None:
        metrics = self._metrics(name)
        values = metrics.compute()
        metrics.reset()
        values.pop("tokens", None)
        if not self.trainer.sanity_checking:
            self._log(values, prefix=f"{name}/")

    def _log(self, values: dict[str, float], prefix: str, *, bar_too: bool = True) -> None:
        named = {prefix + name: value for name, value in values.items()}
        bar = {
            n: v
            for n, v in named.items()
            if n.removeprefix(prefix) in ("loss", "rewards/margins", "rewards/accuracies")
        }
        if bar_too:
            self.log_dict(bar, prog_bar=True, logger=False)
            self.log_dict({n: v for n, v in named.items() if n not in bar}, logger=False)
        for logger in self.loggers:  # by hand: Lightning would number these by batches, one too low
            logger.log_metrics(named, step=self.steps_done)
            logger.save()

    def _check_agreement(self, policy: PairLogps, reference: PairLogps, losses: Tensor, batch: Batch) -> None:
        """On the first batch of a fresh run, a policy must agree with the reference it starts from (law 5)."""
        if self._checked:
            return
        self._checked = True
        first = 0 if self.warm_up is None else self.warm_up.steps
        if self.global_step != first or not self.reference.is_initial_policy or self.policy_config.dropout:
            return
        ratios = torch.cat([policy.chosen - reference.chosen, policy.rejected - reference.rejected])
        largest = float(ratios.detach().abs().max())
        rank_zero_info(
            f"first batch{' after the warm-up' if first else ''}: policy and reference differ by at most "
            f"{largest:.1e} nats; mean loss {float(losses.detach().mean()):.7f}"
        )
        exact = self.policy_config.resolve_dtype() == torch.float32 and "bf16" not in str(self.trainer.precision)
        if exact and not largest <= AGREEMENT:
            raise ConfigError(
                f"policy and reference should be equal before the first step{' after the warm-up' if first else ''}, "
                f"but a response of pair {batch.pair_ids[0]} differs by {largest:.3g} nats. Is dropout on, or has the "
                "policy been changed?"
            )

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Bring the reference to the policy's device."""
        if self.trainer.log_every_n_steps < 1:  # type: ignore[attr-defined]
            raise ConfigError("--trainer.log_every_n_steps must be at least 1")
        self.reference.to(self.device)
        self._prepare_reference("train_dataloader", "val_dataloader")

    def _prepare_reference(self, *loaders: str) -> None:
        """Show the reference the batches that it will be asked about, where it wants to see them first."""
        if not self.reference.wants_batches:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "streaming", False) and "train_dataloader" in loaders:
            raise ConfigError(
                f"reference {type(self.reference).__name__} looks at all data before the first step, and a stream is "
                "read while training on it: use Frozen, or AdaptersOff."
            )
        if data is None:
            name = type(self.reference).__name__
            raise ConfigError(f"reference {name} looks at all data before the first step: attach a data module.")
        assert self.policy is not None, "configure_model comes first"
        splits = [loader.whole() for name in loaders if (loader := getattr(data, name)())]
        with self.trainer.precision_plugin.train_step_context():
            self.reference.prepare(
                self.policy, itertools.chain(*splits), total=sum(map(len, splits)),
                fresh=not (self._restored or self._trained), precision=str(self.trainer.precision),
            )  # fmt: skip

    def on_validation_start(self) -> None:
        """Bring the reference to the policy's device (a no-op within fit)."""
        self._pause = time.perf_counter()
        self.reference.to(self.device)
        if self.trainer.state.fn != TrainerFn.FITTING:  # fit has prepared it for validation too
            self._prepare_reference("val_dataloader")

    on_test_start = on_validation_start

    def on_predict_start(self) -> None:
        """Refuse what can't work yet."""
        if self.device_mesh is not None:
            raise ConfigError("predict can't sample from a sharded policy yet: run it on one device, or with DDP.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count whole steps; record the policy's config; of an adapter's base, which never changes, keep nothing."""
        batches = self.trainer.num_training_batches
        settle(
            checkpoint, self.trainer.accumulate_grad_batches, batches,
            stream_over=not math.isfinite(batches) and self.trainer.is_last_batch,
            validates=self._validation_due(),
        )  # fmt: skip
        config = dataclasses.asdict(self.policy_config)
        for name in ("path", "adapter"):
            if config[name] is not None and Path(config[name]).is_dir():  # must be found from anywhere
                config[name] = str(Path(config[name]).resolve())
        checkpoint["rap_lightning"] = {
            "policy": config,
            "goal": self.goal_record(),
            "reference": self.reference.state_dict(),
            "digests": dict(self._digests),
            "validated": self._validated,
            "run_key": self.run_key,
            "step": self._step_size(),
        }
        if self._whole_step:
            whole = self._whole_step
            ranks: list[Any] = [whole["random"]]
            if self.trainer.world_size > 1:
                ranks *= self.trainer.world_size
                torch.distributed.all_gather_object(ranks, whole["random"])
            window = {name: over_ranks(value) for name, value in whole["window"].items()}
            checkpoint["rap_lightning"]["run"] = whole | {"random": ranks, "window": window}
        if "state_dict" in checkpoint:
            frozen = self._frozen()
            # 4-bit weights have scales and tables below their own name
            checkpoint["state_dict"] = {
                k: v for k, v in checkpoint["state_dict"].items()
                if k not in frozen and k.partition(".weight.")[0] + ".weight" not in frozen
            }  # fmt: skip

    def _validation_due(self) -> bool:
        """Whether a validation belongs after the batch at hand, and has not been finished."""
        trainer = self.trainer
        if self._validated == self.global_step or not trainer.enable_validation:
            return False
        every, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if interval is None or not math.isfinite(interval):
            return bool(trainer.is_last_batch)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        if every is None:
            return bool(progress.total.processed % int(interval) == 0)
        return bool((trainer.current_epoch + 1) % every == 0 and progress.current.processed % int(interval) == 0)

    def _step_size(self) -> dict[str, int] | None:
        """Pairs in an optimizer step, and batches of each rank in it; None of the user's own data."""
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            return None
        accumulate = self.trainer.accumulate_grad_batches
        return {"pairs": size * accumulate * self.trainer.world_size, "accumulate": accumulate}

    def goal_record(self) -> dict[str, Any] | None:
        """The data's goal template, with the numbers its scale was fitted to; None where there is none.

        ``trained`` is false in it where no training pair states a goal.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if getattr(data, "goal", None) is None:
            return None
        conditioned = getattr(getattr(data, "relabelling", None), "conditioned", True)
        record: dict[str, Any] = data.goal.record()
        return record | ({} if conditioned else {"trained": False})

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but a checkpoint of another model is the user's to mend."""
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            facts = " ".join(line.strip() for line in str(error).splitlines()[:4])[:600]
            raise ConfigError(f"the checkpoint doesn't fit the policy {self.policy_config.path}: {facts}") from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in the base model's weights, so that loading stays strict about everything else."""
        self._restored, self._steps_done = True, checkpoint["global_step"]
        ours = checkpoint.get("rap_lightning", {})
        for name, what in (("base", "over another base model than"), ("adapter", "from another adapter than")):
            then, now = ours.get("digests", {}).get(name), self._digests.get(name)
            if then is not None and now is not None and not (same_base(then, now) if name == "base" else then == now):
                config = self.policy_config
                raise ConfigError(
                    f"the checkpoint's adapter was trained {what} {config.path if name == 'base' else config.adapter}, "
                    "or that has changed since. Go on with what the run began with: "
                    f"{ours['policy']['path']}, adapter {ours['policy'].get('adapter')}."
                )
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = ours.get("run")
            self._validated = ours.get("validated", -1)
        if "state_dict" in checkpoint:
            checkpoint["state_dict"] = {**self._frozen(), **checkpoint["state_dict"]}
        state = checkpoint.get("rap_lightning", {}).get("reference", {})
        old, new = checkpoint.get("rap_lightning", {}).get("step"), self._step_size()
        if old and new and self.trainer.state.fn == TrainerFn.FITTING:
            recount(checkpoint, old, new)
        keeps_none = type(self.reference).load_state_dict is Reference.load_state_dict
        if state and keeps_none and self.trainer.state.fn == TrainerFn.FITTING:
            raise ConfigError(
                f"the checkpoint's run had a reference that changes with the policy; {type(self.reference).__name__} "
                "doesn't. Go on with the reference that the run began with."
            )
        if self.warm_up is not None and self.loss.needs_reference and bool(state) is self.warming_up:
            raise ConfigError(
                f"the checkpoint is of step {self._steps_done}, and its run had "
                f"{'ended' if state else 'not ended'} a warm-up by then; here --model.warm_up.steps is "
                f"{self.warm_up.steps}. Go on with the one that the run began with."
            )
        self.reference.load_state_dict(state)

    def _frozen(self) -> dict[str, Tensor]:
        """An adapter's base model, as named in the state dict; nothing where a strategy writes sharded checkpoints."""
        if self.policy is None or not self.policy.has_adapter or self.device_mesh is not None:
            return {}
        named = self.policy.named_parameters(remove_duplicate=False)  # a tied head has two names
        return {f"policy.{name}": p.detach() for name, p in named if not (p.requires_grad or of_adapter(name))}


def _as_it_is(batch: Any) -> Any:
    return batch


def _detached(logps: PairLogps) -> PairLogps:
    return dataclasses.replace(
        logps, chosen=logps.chosen.detach(), rejected=logps.rejected.detach(), tokens=None, unrelated=None
    )


def _resolve_reference(reference: Reference | None, loss: PreferenceLoss, policy: PolicyConfig) -> Reference:
    name = type(loss).__name__
    if not loss.needs_reference:
        if reference is not None and not isinstance(reference, NoReference):
            raise ConfigError(f"{name} needs no reference, so --model.reference has no effect; leave it out.")
        if type(loss).implicit_rewards is PreferenceLoss.implicit_rewards:
            raise ConfigError(f"{name} needs no reference, so it must say what its implicit_rewards are.")
        return NoReference()
    if isinstance(reference, NoReference):
        raise ConfigError(f"{name} needs a reference: use Frozen or AdaptersOff, or leave --model.reference out.")
    if reference is None:
        reference = AdapterAsLoaded() if policy.adapter else AdaptersOff() if policy.lora is not None else Frozen()
    tokens = loss.needs_tokens and not reference.gives_tokens
    if tokens or (loss.needs_unrelated and not (reference.gives_tokens and reference.gives_any_response)):
        raise ConfigError(
            f"{name} looks at more than the sums of the data's responses, which is all that "
            f"{type(reference).__name__} has for it: use Frozen or AdaptersOff."
        )
    reference.check(policy)
    return reference
