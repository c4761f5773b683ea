"""The system: a policy, a frozen reference, a preference loss and its metrics."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from rap_lightning.batches.types import Batch, PairLogps, PairRewards, PromptBatch, TokenLogps
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import DPO, PreferenceLoss
from rap_lightning.metrics import PairMetrics
from rap_lightning.models.generate import Generation, generate
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy import Policy, PolicyConfig, check_head, check_sharing
from rap_lightning.models.reference import AdaptersOff, Frozen, NoReference, Reference
from rap_lightning.models.sharded_load import load_sharded
from rap_lightning.models.sharding import Sharding
from rap_lightning.preferences.relabel import UNCONDITIONED
from rap_lightning.progress import close_epoch, recount, rewind_to_whole_step
from rap_lightning.schedules import CosineWithWarmup, Schedule

AGREEMENT = 1e-3
"""Nats: in float32 a policy and the reference it starts from may differ by rounding, not by more."""


def adamw(params: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW at 5e-7, no weight decay."""
    return torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0)


class PreferenceModule(pl.LightningModule):
    """Direct alignment of a policy on pairs of responses.

    To change what is optimised, write a :class:`PreferenceLoss`; to change the step itself, override
    :meth:`pair_losses`.

    Args:
        policy: which model is trained, and how it is loaded.
        loss: a PreferenceLoss.
        reference: where reference log-probabilities come from. By default AdaptersOff with LoRA, Frozen without, and
            none where the loss needs none.
        optimizer: makes the optimizer from the trainable parameters.
        schedule: makes the learning-rate schedule.
        generation: how ``predict`` and sampling callbacks generate.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        loss: PreferenceLoss = DPO(),  # noqa: B008 (jsonargparse makes a new one)
        reference: Reference | None = None,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = CosineWithWarmup(),  # noqa: B008
        generation: Generation = Generation(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.policy_config, self.loss = policy, loss
        self.optimizer, self.schedule, self.generation = optimizer, schedule, generation
        self.reference = _resolve_reference(reference, loss, policy)
        self.policy: Policy | None = None
        terms = tuple(loss.term_names())
        self.metrics = torch.nn.ModuleDict({name: PairMetrics(terms) for name in ("fit", "val", "test")})
        self.last_logged: tuple[int, dict[str, float]] = (0, {})
        self._clock = self._pause = 0.0
        self._grad_norm = float("nan")
        self._checked = self._restored = self._trained = False

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return self.policy_config.load_tokenizer()

    # -- building -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load policy and reference, once, on every rank; shard them where the strategy brings a device mesh."""
        if self.policy is not None:
            return
        self._check_data()
        dtype = self.policy_config.resolve_dtype()
        sharding = self._sharding()
        whole = ""
        if sharding is None:
            self.policy = self.policy_config.build(dtype)
        else:
            self.policy, whole = load_sharded(self.policy_config, dtype, sharding, trained=True)
        if whole:
            rank_zero_info(f"{self.policy_config.path} is loaded whole by each process, then sharded: {whole}.")
        difference = check_head(self.policy)
        if reason := check_sharing(self.policy):
            rank_zero_info(
                f"{self.policy_config.path} shares no prefixes and packs nothing: {reason}. With the layouts "
                "packed and tree, sequences go through it one at a time."
            )
        total = sum(p.numel() for p in self.policy.parameters())
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        rank_zero_info(
            f"policy: {self.policy_config.path}, {total:,} parameters, "
            f"{sum(p.numel() for p in trainable):,} trainable, {dtype}; head checked to {difference:.1e} nats\n"
            f"loss: {self.loss}; reference: {type(self.reference).__name__}"
        )
        if any(p.dtype == torch.bfloat16 for p in trainable):
            rank_zero_warn(
                "Trainable weights are bfloat16: updates smaller than 1/256 of a weight are rounded away, so small "
                "learning rates train nothing. Use --trainer.precision bf16-mixed, which keeps them in float32."
            )
        if sharding is not None:
            self.reference.shard(sharding)
        self.reference.load(self.policy_config, dtype)
        self.reference.follow(self.policy, 0)

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
        if self.loss.needs_rewards and not getattr(data, "has_rewards", True):
            raise ConfigError(
                f"{name} needs the judge's rewards, and the data have none. Use another loss, or scored data."
            )

    def configure_optimizers(self) -> Any:
        """The injected optimizer over the trainable parameters, the schedule stepping with it."""
        assert self.policy is not None, "configure_model comes first"
        optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 0:  # Lightning says -1 of a stream
            raise ConfigError(
                "the schedule needs to know how long the run is: set --trainer.max_steps, or --trainer.max_epochs "
                "where the data are not streamed."
            )
        scheduler = self.schedule(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- the step -------------------------------------------------------------------------------------------------

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss of each pair, [B], and the implicit rewards of chosen and rejected, each [B]."""
        losses = self.loss.per_pair(policy, reference, rewards)
        with torch.no_grad():
            implicit = self.loss.implicit_rewards(policy, reference)
        return losses, implicit

    def _step(self, batch: Batch, metrics: PairMetrics) -> Tensor:
        assert self.policy is not None, "configure_model comes first"
        other = unrelated(batch) if self.loss.needs_unrelated else None
        policy = self._policy_logps(batch, other)
        reference = self._reference_logps(batch, other) if self.loss.needs_reference else None
        rewards = PairRewards(batch.rewards[:, 0], batch.rewards[:, 1], batch.origin != UNCONDITIONED)
        if self.loss.needs_rewards and not batch.rewards.isfinite().all():
            raise DataError(
                f"{type(self.loss).__name__} needs the judge's rewards; a pair of {batch.pair_ids} has none."
            )
        losses, implicit = self.pair_losses(policy, reference, rewards)
        metrics.update(losses, implicit, policy, batch.origin, batch.weights, batch.tokens, self.loss.terms())
        if reference is not None and metrics is self.metrics["fit"]:
            self._check_agreement(policy, reference, losses, batch)
        return losses

    def _policy_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """The policy's log-probabilities with what the loss asks for; of ``other`` without gradient."""
        assert self.policy is not None, "configure_model comes first"
        with torch.no_grad():
            more = None if other is None else self.policy.logps(other)
        if self.loss.needs_collisions:
            token_logps, collisions = self.policy(batch, collisions=True)
            return self._pair_logps(batch, token_logps, more, collisions.detach())
        return self._pair_logps(batch, self.policy(batch), more)

    def _reference_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """The same of the reference, whose tokens are only asked for where the loss needs them."""
        assert self.policy is not None, "configure_model comes first"
        more = None if other is None else self.reference.logps(self.policy, other)
        if self.loss.needs_tokens:
            return self._pair_logps(batch, self.reference.token_logps(self.policy, batch), more)
        logps = self.reference.logps(self.policy, batch)
        return PairLogps.from_segments(logps, batch.lengths, weights=batch.weights, unrelated=more)

    def _pair_logps(
        self, batch: Batch, token_logps: Tensor, other: Tensor | None, collisions: Tensor | None = None
    ) -> PairLogps:
        sums = sum_by_segment(token_logps, batch.segment, len(batch.lengths))
        tokens = TokenLogps.of(token_logps, batch.segment, collisions) if self.loss.needs_tokens else None
        return PairLogps.from_segments(sums, batch.lengths, weights=batch.weights, tokens=tokens, unrelated=other)

    def training_step(self, batch: tuple[Batch, ...], batch_idx: int) -> Tensor:
        """The mean over the pairs of the whole optimizer step, over all ranks and accumulated batches.

        A batch comes as its forward passes; all but the last leave their gradients behind at once, and with them the
        memory they took.
        """
        trainer = self.trainer
        if batch_idx % trainer.accumulate_grad_batches == 0:
            trainer.optimizers[0].zero_grad()
        *first, last = batch
        for part in first:
            loss = self._share_of_step(part)
            with torch.autocast(self.device.type, enabled=False):
                trainer.strategy.backward(loss, None)
        # Lightning divides what is returned by the accumulated batches
        return self._share_of_step(last) * trainer.accumulate_grad_batches

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the loss and the reference follow, before a checkpoint can be written."""
        assert self.policy is not None, "configure_model comes first"
        self._trained = True  # a new trainer counts from 0, so its step says nothing
        super().optimizer_step(*args, **kwargs)
        self.loss.after_step()
        self.reference.follow(self.policy, self.global_step + 1)

    def _share_of_step(self, part: Batch) -> Tensor:
        losses = self._step(part, self._metrics("fit"))
        # the strategy divides gradients by the ranks: undo that
        return (losses * part.weights).sum() * (self.trainer.world_size / part.step_pairs)

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
        """Keep the gradient's norm before clipping, where it will be logged."""
        if self._logs_at(self.global_step + 1):
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            self._grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def on_train_batch_end(self, outputs: Any, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Log the means since the last log, over all ranks."""
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        if stepped and self._logs_at(self.global_step):
            self._log_window()

    def on_train_end(self) -> None:
        """Log the steps since the last log."""
        if self.global_step > self.last_logged[0]:
            self._log_window(bar_too=False)  # Lightning takes nothing for the bar any more

    def _log_window(self, *, bar_too: bool = True) -> None:
        metrics = self._metrics("fit")
        values = metrics.compute()
        metrics.reset()
        if not values:
            return
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        values |= {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        values["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if bar_too:  # at the end of training the norm kept is an earlier step's
            values["grad_norm"] = self._grad_norm
        self.last_logged = (self.global_step, values)
        self._log(values, prefix="", bar_too=bar_too)

    def on_validation_end(self) -> None:
        """Time spent on validation is no training time."""
        self._clock += time.perf_counter() - self._pause

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
            logger.log_metrics(named, step=self.global_step)
            logger.save()

    def _check_agreement(self, policy: PairLogps, reference: PairLogps, losses: Tensor, batch: Batch) -> None:
        """On the first batch of a fresh run, a policy must agree with the reference it starts from (law 5)."""
        if self._checked:
            return
        self._checked = True
        if self.global_step > 0 or not self.reference.is_initial_policy or self.policy_config.dropout:
            return
        ratios = torch.cat([policy.chosen - reference.chosen, policy.rejected - reference.rejected])
        largest = float(ratios.detach().abs().max())
        rank_zero_info(
            f"first batch: policy and reference differ by at most {largest:.1e} nats; "
            f"mean loss {float(losses.detach().mean()):.7f}"
        )
        exact = self.policy_config.resolve_dtype() == torch.float32 and "bf16" not in str(self.trainer.precision)
        if exact and not largest <= AGREEMENT:
            raise ConfigError(
                f"policy and reference should be equal before the first step, but a response of pair "
                f"{batch.pair_ids[0]} differs by {largest:.3g} nats. Is dropout on, or has the policy been changed?"
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
        if not math.isfinite(self.trainer.num_training_batches) and self.trainer.is_last_batch:
            close_epoch(checkpoint)  # a stream's length is known at its end only
        else:
            accumulate = self.trainer.accumulate_grad_batches
            rewind_to_whole_step(checkpoint, accumulate, self.trainer.num_training_batches)
        config = dataclasses.asdict(self.policy_config)
        if Path(config["path"]).is_dir():  # must be found from anywhere
            config["path"] = str(Path(config["path"]).resolve())
        checkpoint["rap_lightning"] = {
            "policy": config,
            "goal": self.goal_record(),
            "reference": self.reference.state_dict(),
            "step": self._step_size(),
        }
        if "state_dict" in checkpoint:
            frozen = self._frozen()
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}

    def _step_size(self) -> dict[str, int] | None:
        """Pairs in an optimizer step, and batches of each rank in it; None of the user's own data."""
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            return None
        accumulate = self.trainer.accumulate_grad_batches
        return {"pairs": size * accumulate * self.trainer.world_size, "accumulate": accumulate}

    def goal_record(self) -> dict[str, Any] | None:
        """The data's goal template, with the numbers its scale was fitted to; None where there is none."""
        goal = getattr(getattr(self.trainer, "datamodule", None), "goal", None)
        return None if goal is None else goal.record()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but a checkpoint of another model is the user's to mend."""
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            facts = " ".join(line.strip() for line in str(error).splitlines()[:4])[:600]
            raise ConfigError(f"the checkpoint doesn't fit the policy {self.policy_config.path}: {facts}") from error

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in the base model's weights, so that loading stays strict about everything else."""
        self._restored = True
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
        self.reference.load_state_dict(state)

    def _frozen(self) -> dict[str, Tensor]:
        """An adapter's base model, as named in the state dict; nothing where a strategy writes sharded checkpoints."""
        if self.policy is None or not self.policy.has_adapter or self.device_mesh is not None:
            return {}
        named = self.policy.named_parameters(remove_duplicate=False)  # a tied head has two names
        return {f"policy.{name}": p.detach() for name, p in named if not p.requires_grad}


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
        reference = AdaptersOff() if policy.lora is not None else Frozen()
    tokens = loss.needs_tokens and not reference.gives_tokens
    if tokens or (loss.needs_unrelated and not (reference.gives_tokens and reference.gives_any_response)):
        raise ConfigError(
            f"{name} looks at more than the sums of the data's responses, which is all that "
            f"{type(reference).__name__} has for it: use Frozen or AdaptersOff."
        )
    reference.check(policy)
    return reference
