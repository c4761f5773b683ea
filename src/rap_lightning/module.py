"""PreferenceModule: a policy, a frozen reference and a preference loss, joined in one optimizer step.

One optimizer step, as Lightning calls it (A batches are accumulated; ``training_step`` takes relabelled pairs)::

    before_transfer(batch)                  each batch on the host; Lightning then copies it to the device
    for batch in the step's first A - 1 batches:
        training_step(batch)               gradients are zeroed at the first one; see "parts" there
            _share_of_step(part)           its share of the mean over all pairs of the step
                pair_step(part)            losses [B]
                    _policy_logps          log-probabilities of response tokens, summed per response
                    _reference_logps       the same of the frozen reference
                    pair_losses            sums -> loss and implicit rewards of each pair
        backward(share)
    optimizer_step(closure)                 the step's last batch
        closure()                          training_step and backward, as above
        on_before_optimizer_step           of callbacks first: StepLogger (learning rate, gradient norm),
                                           Guard (values that are not finite; may call skip_step); then ours
        the optimizer                      after Lightning has clipped gradients
        loss.after_step, reference.follow
    on_train_batch_end                      of callbacks: StepLogger logs means over pairs, then checkpoints are saved

The methods follow in the order of this outline. Below them: evaluation, what is built before the first step, and
checkpoints. Rules between components, such as which loss goes with which reference, are in
rap_lightning.training.checks, exact resume in rap_lightning.training.run_state.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rap_lightning.batches.loader import PairLoader
from rap_lightning.batches.types import Batch, PairLogps, PairRewards, PromptBatch, TokenLogps, copies_at_once
from rap_lightning.batches.unrelated import unrelated
from rap_lightning.distributed.deepspeed_checks import check_deepspeed_trainer
from rap_lightning.distributed.fsdp2 import sum_replicas
from rap_lightning.errors import ConfigError
from rap_lightning.losses import DPO, SFT, PreferenceLoss
from rap_lightning.losses.contract import check_loss
from rap_lightning.models.checkpoint.base_weights import base_weights, without_base
from rap_lightning.models.generation import Generation, generate
from rap_lightning.models.logps import sum_by_segment
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.base import Reference
from rap_lightning.models.token_strength import check_reach
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.training import build, checks, out_of_memory
from rap_lightning.training.protocols import PreferenceData, data_of
from rap_lightning.training.run_state import RunState, ends_step, rescale_progress, step_size
from rap_lightning.training.schedules import CosineWithWarmup, Schedule
from rap_lightning.training.step_logger import Split, StepLogger
from rap_lightning.training.warm_up import WarmUp

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WARM_UP_LOSS = SFT()
ROUTER = "router_aux"
"""The name under which a mixture of experts' load-balancing loss is logged, beside the loss's own terms."""


def adamw(params: Any) -> torch.optim.Optimizer:
    """The paper's optimizer: AdamW at 5e-7, no weight decay."""
    return torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0, fused=True)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass and its results, for callbacks that look at pairs; ``PreferenceModule.passes`` are a step's.

    Attributes:
        batch: the pairs.
        losses: [B], without gradient.
        policy, reference: log-probabilities, without gradient.
    """

    batch: Batch
    losses: Tensor
    policy: PairLogps
    reference: PairLogps | None

    @classmethod
    def of(cls, batch: Batch, losses: Tensor, policy: PairLogps, reference: PairLogps | None) -> Pass:
        """Drop the autograd graph, and the token log-probabilities."""
        chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
        summed = dataclasses.replace(policy, chosen=chosen, rejected=rejected, tokens=None, unrelated=None)
        return cls(batch, losses.detach(), summed, reference)


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
        self.policy_config, self.loss, self.warm_up = policy, loss, warm_up
        self.optimizer, self.schedule, self.generation = optimizer, schedule, generation
        self.reference = checks.resolve_reference(reference, loss, policy, warm_up)
        if type(self).pair_losses is PreferenceModule.pair_losses:  # an override may call the loss in another way
            check_loss(loss)
        self.policy: Policy | None = None
        self.run_state = RunState()
        terms = (*loss.term_names(), *([ROUTER] if policy.router_aux_loss is not None else []))
        self.step_logger = StepLogger(terms, None if warm_up is None else warm_up.steps)
        self.run_key: str | None = None  # the command line sets it, and finds the run's checkpoints by it
        self.updating = False
        """Whether the optimizer is changing weights. Checkpoints are not written then, and signals wait: half a step
        cannot be resumed (callbacks/checkpointing.py, callbacks/signals.py)."""
        self.passes: list[Pass] = []
        self._batch: Sequence[Batch] = ()
        self._norm: Tensor | None = None
        self._router: Tensor | None = None  # load-balancing loss of the last forward pass
        self._compared = False  # whether policy and reference have been compared at the first batch
        self._digests: dict[str, str] = {}  # of base model, reference, and an adapter that is continued

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer; that of the adapter which training continues, if it has one."""
        if (adapter := self.policy_config.adapter_with_tokenizer()) is not None:
            rank_zero_info(f"tokenizer and chat template are those of the adapter {adapter}")
        return self.policy_config.load_tokenizer()

    @property
    def steps_done(self) -> int:
        """Optimizer steps that the weights have taken; the trainer counts none in validate and test."""
        return self.global_step if self.trainer.state.fn == TrainerFn.FITTING else self.run_state.steps_done

    @property
    def warming_up(self) -> bool:
        """Whether the next step belongs to the warm-up."""
        return self.warm_up is not None and self.run_state.steps_done < self.warm_up.steps

    @property
    def active_loss(self) -> PreferenceLoss:
        """The loss of the next step: SFT during the warm-up."""
        return WARM_UP_LOSS if self.warming_up else self.loss

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss compares the pairs of a batch, which then may not be sorted by length."""
        return bool(self.loss.batch_level)

    # -- one optimizer step ---------------------------------------------------------------------------------------

    def before_transfer(self, batch: Any) -> Any:
        """Do what needs a batch's numbers while they are on the host: on a GPU each look at them waits for the device.

        Raises:
            DataError: the loss needs rewards, and a pair has none.
        """
        if isinstance(batch, PromptBatch):
            return batch
        for part in batch:
            checks.check_rewards(self.active_loss, part)
        if "unrelated" not in self.active_loss.requires:
            return batch
        others = [unrelated(part) for part in batch]
        if copies_at_once(self.trainer.strategy.root_device):
            others = [other.pin_memory() for other in others]
        return tuple(dataclasses.replace(part, unrelated=other) for part, other in zip(batch, others, strict=True))

    def training_step(self, batch: tuple[Batch, ...], batch_idx: int) -> Tensor:
        """Return the batch's share of the step's loss, [].

        A batch comes as the parts that fit a forward pass (one, unless ``token_budget`` is set). All but the last run
        their backward pass here, which frees their activations.
        """
        trainer = self.trainer
        if batch_idx % trainer.accumulate_grad_batches == 0:
            # Lightning zeroes gradients between training_step and backward, which would be after the first parts'
            # backward passes; hence here, and optimizer_zero_grad does nothing
            trainer.optimizers[0].zero_grad()
            self.passes, self._norm = [], None
        self._batch = batch
        *first, last = batch
        assert self.policy is not None, "configure_model comes first"
        sum_replicas(self.policy, False)
        for part in first:
            with out_of_memory.explained(self._doing("forward pass")):
                loss = self._share_of_step(part)
            # training_step runs within Lightning's autocast, and a backward pass belongs outside. DDP averages over
            # ranks only in the backward pass that follows training_step, when .grad holds the sum over all parts
            with torch.autocast(self.device.type, enabled=False):
                trainer.strategy.backward(loss, None)
        sum_replicas(self.policy, ends_step(trainer, batch_idx))
        # Lightning divides what training_step returns by accumulate_grad_batches. The share is already one of the whole
        # step (an epoch's last step may have fewer batches), so undo the division
        with out_of_memory.explained(self._doing("forward pass")):
            return self._share_of_step(last) * trainer.accumulate_grad_batches

    def _share_of_step(self, part: Batch) -> Tensor:
        """Return the part's share of the step's mean loss, [].

            share    = world_size · Σ_part w·loss / step_weight
            gradient = mean over ranks of ∇ Σ_parts share = ∇ (Σ_step w·loss / Σ_step w)

        ``step_weight`` [] is Σ_step w over all accumulated batches and ranks, which the sampler knows beforehand; ranks
        are data ranks, whose gradients a strategy averages. So the mean is exact however a step is split, for every
        loss of single pairs (checks.check_data keeps losses that compare pairs in one part).
        """
        losses = self.pair_step(part, "fit")
        share = (losses * part.loss_weights).sum() * (self.trainer.world_size / part.step_weight)
        if (router := self._router) is None:
            return share
        self._router = None
        # a mean over the step's forward passes, each by its pairs: the loss of a pass is that of its tokens together
        pairs = (len(part) - part.fillers) * self.trainer.world_size / part.step_pairs
        return share + router * (self.policy_config.router_aux_loss or 0.0) * pairs

    def pair_step(self, batch: Batch, split: Split) -> Tensor:
        """Return the loss of each pair, [B] float32, and add the batch to the means that are logged."""
        loss = self.active_loss
        other = batch.unrelated  # added by before_transfer, unless this is called with a batch of one's own
        if other is None and "unrelated" in loss.requires:
            other = unrelated(batch)
        policy = self._policy_logps(batch, other)
        assert self.policy is not None, "configure_model comes first"
        self._router = router = self.policy.router_loss  # before an adapter's reference runs the same model
        reference = self._reference_logps(batch, other) if "reference" in loss.requires else None
        rewards = PairRewards(batch.rewards[:, 0], batch.rewards[:, 1], batch.goal_rewards)
        losses, implicit = self.pair_losses(policy, reference, rewards)
        terms = loss.terms() if router is None else loss.terms() | {ROUTER: router.detach().expand(len(batch))}
        self.step_logger.add(split, losses, implicit, policy, batch, terms)
        if split == "fit":
            self.passes.append(Pass.of(batch, losses, policy, reference))
            if reference is not None:
                self._compare_first(policy, reference, losses, batch)
        return losses

    def _policy_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """Return the policy's log-probabilities; those of unrelated responses without gradient."""
        assert self.policy is not None, "configure_model comes first"
        with torch.no_grad():
            more = None if other is None else self.policy.logps(other)
        if "collisions" in self.active_loss.requires:
            token_logps, collisions = self.policy(batch, collisions=True)
            return self._pair_logps(batch, token_logps, more, collisions.detach())
        return self._pair_logps(batch, self.policy(batch), more)

    def _reference_logps(self, batch: Batch, other: Batch | None) -> PairLogps:
        """Return the reference's log-probabilities; those of tokens only if the loss needs them (Stored has sums)."""
        assert self.policy is not None, "configure_model comes first"
        more = None if other is None else self.reference.logps(self.policy, other)
        if "tokens" in self.active_loss.requires:
            return self._pair_logps(batch, self.reference.token_logps(self.policy, batch), more)
        logps = self.reference.logps(self.policy, batch)
        return PairLogps.from_segments(logps, batch.lengths, weights=_weights(batch), unrelated=more)

    def _pair_logps(
        self, batch: Batch, token_logps: Tensor, other: Tensor | None, collisions: Tensor | None = None
    ) -> PairLogps:
        sums = sum_by_segment(token_logps, batch.segment, len(batch.lengths))
        keeps_tokens = "tokens" in self.active_loss.requires
        tokens = TokenLogps.of(token_logps, batch.segment, collisions) if keeps_tokens else None
        return PairLogps.from_segments(sums, batch.lengths, weights=_weights(batch), tokens=tokens, unrelated=other)

    def pair_losses(
        self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the loss of each pair, [B], and the implicit rewards of chosen and rejected, each [B]."""
        loss = self.active_loss
        losses = loss.per_pair(policy, reference, rewards)
        with torch.no_grad():
            implicit = loss.implicit_rewards(policy, reference)
        return losses, implicit

    def _compare_first(self, policy: PairLogps, reference: PairLogps, losses: Tensor, batch: Batch) -> None:
        """At the first batch of a fresh run, check that the policy agrees with the reference it starts from."""
        if self._compared:
            return
        self._compared = True
        first = 0 if self.warm_up is None else self.warm_up.steps
        if self.global_step != first or not self.reference.is_initial_policy or self.policy_config.dropout:
            return
        exact = self.policy_config.resolve_dtype() == torch.float32 and "bf16" not in str(self.trainer.precision)
        checks.check_first_batch(policy, reference, losses, batch, after_warm_up=first > 0, exact=exact)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass; out of memory is explained."""
        with out_of_memory.explained(self._doing("backward pass")):
            super().backward(loss, *args, **kwargs)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Do nothing: ``training_step`` has zeroed gradients, and its first parts have left theirs since."""

    def gradient_norm(self) -> Tensor:
        """Return the norm of the whole gradient before clipping, [] float32; every rank must call it.

        For callbacks, in ``on_before_optimizer_step``, when a gradient scaler has unscaled the gradients. It is
        computed at a step's first call.
        """
        if self._norm is None:
            norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded: a DTensor
            self._norm = norm.to(self.device)  # gradients that are offloaded are on the host
        assert self._norm is not None
        return self._norm

    def skip_step(self) -> None:
        """Leave weights, optimizer state, loss and log as if this step's batches had not been seen.

        The step still counts: steps done, the schedule and the warm-up advance, and the reference follows.
        For callbacks, in ``on_before_optimizer_step``; every rank must call it.
        """
        for p in self.parameters():
            p.grad = None  # optimizers skip such parameters, and leave their moments and step counts alone
        self._norm = None
        self.active_loss.forget_step()
        self.step_logger.skip_step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note that weights are about to change; a callback that stops the run has done so by now."""
        self.updating = True

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Run the closure (``training_step`` and ``backward``) and the optimizer; then loss and reference follow.

        All of it happens before a callback can write a checkpoint, so that one never holds half a step.
        """
        assert self.policy is not None, "configure_model comes first"
        with out_of_memory.explained(self._doing("optimizer's update")):
            super().optimizer_step(*args, **kwargs)
        self.active_loss.after_step()  # before the step is counted: the warm-up's last step is still SFT's
        self.run_state.steps_done += 1
        self.reference.follow(self.policy, self.run_state.steps_done)
        if self.warm_up is not None and self.run_state.steps_done == self.warm_up.steps:
            self.warm_up.end(self.trainer)
            becomes = ", with the current policy as its reference" if "reference" in self.loss.requires else ""
            rank_zero_info(
                f"the warm-up of {self.warm_up.steps} steps is over: {type(self.loss).__name__} begins{becomes}"
            )
        self.updating = False
        self.run_state.mark_step(self.device)
        self.step_logger.mark_step()

    def _doing(self, what: str, *, training: bool = True) -> Callable[[], str]:
        """Describe the current work, for an out-of-memory error; what is not training belongs to no step."""

        def text() -> str:
            if not self._batch:
                return f"before the first {what}. {out_of_memory.loading_advice(self.policy_config, self.reference)}"
            parts = (self.policy_config, self.policy, self.loss, self.reference, data_of(self.trainer))
            size, advice = out_of_memory.size_of(self._batch), out_of_memory.advice(*parts, training=training)
            return f"in the {what}{f' of step {self.global_step + 1}' if training else ''}: {size}. {advice}"

        return text

    def _noted(self, batches: Iterable[tuple[Batch, ...]]) -> Iterator[tuple[Batch, ...]]:
        """Yield batches, each known as the current one."""
        for batch in batches:
            self._batch = batch
            yield batch

    # -- evaluation and generation --------------------------------------------------------------------------------

    def validation_step(self, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Add the batch to the epoch's means."""
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Batch, ...], batch_idx: int) -> None:
        """Add the batch to the epoch's means."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: tuple[Batch, ...], split: Split) -> None:
        self._batch = batch
        with out_of_memory.explained(self._doing("validation" if split == "val" else "test", training=False)):
            for part in batch:
                self.pair_step(part, split)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return a response for each prompt, added to the prompt's record."""
        assert self.policy is not None, "configure_model comes first"
        with out_of_memory.explained(
            lambda: (
                f"while generating responses to {len(batch.records)} prompts. To use less memory: a smaller "
                "--data.batch_size; a smaller --model.generation.max_new_tokens"
            )
        ):
            texts = generate(self.policy, self.tokenizer, batch, self.generation)
        return [{**record, "response": text} for record, text in zip(batch.records, texts, strict=True)]

    # -- before the first step ------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[pl.Callback]:
        """Attach the logger, for a plain Trainer too."""
        attached = self.step_logger in self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if attached else [self.step_logger]

    def configure_model(self) -> None:
        """Load policy and reference, once, on every rank; shard them where the strategy brings a device mesh."""
        # "-true" precisions would round a batch's rewards and weights. Lightning's conversion would fail first: it
        # refuses frozen dataclasses. Token ids need no converting. The hook on_before_batch_transfer comes right after
        # it, but Lightning warns of a module that has one beside a data module.
        self.trainer.precision_plugin.convert_input = self.before_transfer  # type: ignore[method-assign, assignment]
        if self.policy is not None:
            return
        check_deepspeed_trainer(self.trainer)
        checks.check_folders_on_load(self.trainer.strategy)
        if (data := data_of(self.trainer)) is not None:
            checks.check_data(self.loss, data)
            checks.check_strength(data.goal, self.policy_config)
            checks.check_attention(self.policy_config, data.layout)
        checks.check_flash(self.policy_config, self.trainer.strategy.root_device, self.trainer.precision_plugin)
        with out_of_memory.explained(self._loading):
            self._load(data)

    def _loading(self) -> str:
        """Describe what comes before the first batch, for an out-of-memory error."""
        advice = out_of_memory.loading_advice(self.policy_config, self.reference)
        return f"while loading and checking policy and reference. {advice}"

    def _load(self, data: PreferenceData | None) -> None:
        """Load, check and shard policy and reference."""
        sharding = build.sharding_of(self.trainer, self.device_mesh)
        checks.check_router_strategy(self.policy_config, self.trainer, sharded=sharding is not None)
        dtype, reference_dtype = build.weight_dtypes(self.policy_config, self.trainer, sharding)
        self.policy = build.build_policy(self.policy_config, self.trainer, sharding, dtype)
        if data is not None and isinstance(data.goal, AdapterStrength):
            check_reach(self.policy.model)
        self._digests = build.digests_of(self.policy, self.policy_config)
        after = "" if self.warm_up is None else f", after {self.warm_up.steps} steps of SFT"
        rank_zero_info(f"loss: {self.loss}{after}; reference: {type(self.reference).__name__}")
        if sharding is not None:
            self.reference.shard(sharding)
        self.reference.load(self.policy_config, reference_dtype)
        if (digest := self.reference.digest(self.policy_config, self._digests["base"])) is not None:
            self._digests["reference"] = digest
        self.reference.follow(self.policy, 0)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over the trainable parameters, and its schedule, which steps with it."""
        assert self.policy is not None, "configure_model comes first"
        try:
            optimizer = self.optimizer([p for p in self.policy.parameters() if p.requires_grad])
        except ValueError as error:  # torch checks its options only here
            raise ConfigError(f"--model.optimizer: {error}") from error
        # Fused optimizers declare that they unscale gradients themselves, and Lightning refuses to clip those. With the
        # declaration withdrawn, Lightning unscales before it clips, where there is a scaler (16-mixed).
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        steps = checks.check_steps(self.trainer)
        # a resumed run needs the schedule of both phases, whichever it is in; a second fit of a trained module doesn't
        if self.warm_up is not None and (self.warming_up or self.run_state.restored):
            checks.check_warm_up(self.warm_up, steps, self.trainer)
            scheduler = self.warm_up.scheduler(self.schedule, optimizer, steps)
        else:
            scheduler = self.schedule(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Prepare the reference."""
        self._prepare_reference(training=True)

    def on_train_start(self) -> None:
        """Set random numbers, after the sanity check and the callbacks' turn."""
        checks.check_loop(self.trainer)
        self.run_state.begin(self.trainer, self.device)

    def on_train_epoch_start(self) -> None:
        """Check that a callback has not changed the number of accumulated batches."""
        checks.check_accumulation(self.trainer)

    def on_validation_start(self) -> None:
        """Prepare the reference; fit has done so."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self._prepare_reference(training=False)

    on_test_start = on_validation_start

    def on_validation_end(self) -> None:
        """Note that a checkpoint need not repeat this validation."""
        self.step_logger.end_validation()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.run_state.validated = self.global_step

    def on_predict_start(self) -> None:
        """Refuse what can't work yet."""
        checks.check_sampling(self.device_mesh)

    def _prepare_reference(self, *, training: bool) -> None:
        """Move the reference to the policy's device; give it all batches, where it reads them before the first step."""
        with out_of_memory.explained(self._loading):
            self.reference.to(self.device)
        if not self.reference.wants_batches:
            return
        assert self.policy is not None, "configure_model comes first"
        data = checks.check_reference_data(self.reference, data_of(self.trainer), training=training)
        loaders = [data.train_dataloader(), data.val_dataloader()] if training else [data.val_dataloader()]
        splits = [loader.whole() for loader in loaders if isinstance(loader, PairLoader)]
        fresh = self.run_state.steps_done == 0 and not self.updating  # a step that failed has changed weights too
        doing = self._doing("reference's forward pass before training", training=False)
        with out_of_memory.explained(doing), self.trainer.precision_plugin.train_step_context():
            self.reference.prepare(
                self.policy, self._noted(itertools.chain(*splits)), total=sum(map(len, splits)), fresh=fresh,
                precision=str(self.trainer.precision),
            )  # fmt: skip

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _owners(self) -> dict[str, Reference | RunState]:
        """The parts of the module with a state beside weights; StepLogger is a callback, which Lightning saves."""
        return {"reference": self.reference, "run": self.run_state}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rewind the counters to the last whole step; add each owner's state, and what export needs to know.

        Batches of an unfinished step are repeated by the resumed run, with the same random numbers.
        """
        self.run_state.rewind(checkpoint, self.trainer)
        states = {name: owner.state_dict() for name, owner in self._owners().items()}
        checkpoint["rap_lightning"] = states | {
            "policy": build.recorded(self.policy_config),  # with which export loads the base model
            "goal": self.goal_record(),  # the template's text and scale
            "chat_template": self.chat_template(),  # with which it was trained
            "digests": dict(self._digests),  # a resumed run must have the same base model, reference and adapter
            "run_key": self.run_key,  # by which --ckpt_path last finds this run's checkpoints
        }
        if "state_dict" in checkpoint and self.device_mesh is None:
            # An adapter's base model never changes, so a checkpoint holds the adapter alone. (Strategies that write
            # sharded checkpoints have no state_dict here, or name its tensors themselves.)
            checkpoint["state_dict"] = without_base(checkpoint["state_dict"], base_weights(self.policy))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits this run; give each owner its state."""
        saved, step = checks.record_of(checkpoint), checkpoint["global_step"]
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        checks.check_digests(saved, self._digests, self.policy_config)
        checks.check_checkpoint_reference(saved["reference"], self.reference, self.warm_up, step, fitting=fitting)
        self.run_state.restored, self.run_state.steps_done = True, step
        before, now = saved["run"]["step"], step_size(self.trainer)
        if fitting and before and now:
            rescale_progress(checkpoint, before, now)
        for name, owner in self._owners().items():
            if fitting or owner is self.reference:  # evaluation resumes no run
                owner.load_state_dict(saved[name])
        if "state_dict" in checkpoint and self.device_mesh is None:
            # filled in again, so that loading stays strict about everything else
            checkpoint["state_dict"] = {**base_weights(self.policy), **checkpoint["state_dict"]}

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load weights.

        Raises:
            ConfigError: the checkpoint is of another model.
        """
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            facts = " ".join(line.strip() for line in str(error).splitlines()[:4])[:600]
            raise ConfigError(f"the checkpoint doesn't fit the policy {self.policy_config.path}: {facts}") from error

    def chat_template(self) -> str | dict[str, str] | None:
        """Return the chat template that the data were rendered with; None if the run has not used a tokenizer."""
        return self.tokenizer.chat_template if "tokenizer" in vars(self) else None

    def goal_record(self) -> dict[str, Any] | None:
        """Return the data's goal template, with the numbers its scale was fitted to; None where there is none.

        ``trained`` is false in it where no training pair states a goal.
        """
        data = data_of(self.trainer)
        if data is None or data.goal is None:
            return None
        record: dict[str, Any] = data.goal.record()
        return record if data.relabelling.conditioned else record | {"trained": False}


def _weights(batch: Batch) -> Tensor | None:
    """Return the weights of pairs for losses that compare pairs; None where all are 1, which needs no look at them."""
    return batch.weights if batch.fillers else None
