"""Rules between components: which loss goes with which reference, data, precision, strategy and checkpoint.

Each rule is a function that raises ConfigError; rules about the options of one component are in its constructor. The
order is that in which PreferenceModule asks: when it is constructed, before the policy is loaded, before training, at a
batch, and when a checkpoint is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rap_lightning.batches.loader import PairLoader
from rap_lightning.batches.types import Batch, PairLogps
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.losses import PreferenceLoss
from rap_lightning.models.attention import is_flash
from rap_lightning.models.checkpoint.sharded_folder import refuse_incomplete
from rap_lightning.models.digests import same_base
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import NoReference, Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.models.references.policy_copy import AdapterAsLoaded
from rap_lightning.models.references.post_warmup import Warmed
from rap_lightning.models.references.precomputed import Stored
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.training.protocols import PreferenceData, data_of
from rap_lightning.training.warm_up import WarmUp

AGREEMENT = 1e-3
"""Nats: in float32 a policy and the reference it starts from may differ by rounding, not by more."""

# -- when the module is constructed -----------------------------------------------------------------------------------


def resolve_reference(
    reference: Reference | None, loss: PreferenceLoss, policy: PolicyConfig, warm_up: WarmUp | None
) -> Reference:
    """Return the reference that was asked for, or the default for this loss and policy.

    Raises:
        ConfigError: the reference has no effect, or can't be combined with the loss, the policy or the warm-up.
    """
    name = type(loss).__name__
    if "reference" not in loss.requires:
        if reference is not None and not isinstance(reference, NoReference):
            raise ConfigError(f"{name} needs no reference, so --model.reference has no effect. Remove it.")
        if type(loss).implicit_rewards is PreferenceLoss.implicit_rewards:
            raise ConfigError(f"{name} has no reference, so the class must define implicit_rewards.")
        return NoReference()
    if warm_up is not None:
        _check_warmed(reference)
        reference = Warmed(warm_up.steps)
    elif isinstance(reference, Warmed):
        raise ConfigError("reference Warmed comes with --model.warm_up.steps N. Remove --model.reference.")
    if isinstance(reference, NoReference):
        raise ConfigError(f"{name} needs a reference. Use Frozen or AdaptersOff, or remove --model.reference.")
    if reference is None:
        reference = AdapterAsLoaded() if policy.adapter else AdaptersOff() if policy.lora is not None else Frozen()
    tokens = "tokens" in loss.requires and not reference.gives_tokens
    if tokens or ("unrelated" in loss.requires and not (reference.gives_tokens and reference.gives_any_response)):
        raise ConfigError(
            f"{name} needs more than the summed log-probabilities of the data's responses, and "
            f"{type(reference).__name__} has nothing else. Use Frozen or AdaptersOff."
        )
    reference.check(policy)
    return reference


def _check_warmed(reference: Reference | None) -> None:
    """After a warm-up the reference is the policy at its end; refuse any other, with the reason."""
    if reference is None:
        return
    reasons: dict[type, str] = {
        Stored: "its log-probabilities are computed before the first step",
        AdaptersOff: "the policy without its adapter is the policy before the warm-up",
        Frozen: "it is the policy before the warm-up, or another model",
        NoReference: "it has no log-probabilities",
    }
    reason = next((text for kind, text in reasons.items() if isinstance(reference, kind)), "it is another one")
    raise ConfigError(
        "with --model.warm_up the reference is the policy at the end of the warm-up, and "
        f"{type(reference).__name__} can't be that: {reason}. Remove --model.reference."
    )


# -- before the policy is loaded --------------------------------------------------------------------------------------


def check_data(loss: PreferenceLoss, data: PreferenceData) -> None:
    """Refuse data on which the loss would not mean what it says."""
    name = type(loss).__name__
    if data.batch_size < loss.least_pairs:
        raise ConfigError(
            f"{name} needs at least {loss.least_pairs} pairs in a batch: {loss.batch_level}. "
            f"Found --data.batch_size {data.batch_size}."
        )
    if loss.batch_level and data.token_budget is not None:
        raise ConfigError(
            f"{name} compares all pairs of a batch ({loss.batch_level}), and --data.token_budget splits a batch. "
            "Remove it, or set a smaller --data.batch_size."
        )
    single = {
        "rejected_weight": data.rejected_weight,
        "best_goal_weight": data.best_goal_weight,
        "weight_column": data.weight_column,
    }
    for option, weight in single.items():
        if loss.batch_level and weight not in (1, None):
            shown = weight if isinstance(weight, str) else f"{weight:g}"
            raise ConfigError(
                f"--data.{option} {shown} weights single pairs, and {name} has no loss of single "
                f"pairs ({loss.batch_level}). Remove it, or choose another loss."
            )
    if "rewards" in loss.requires and not data.has_rewards:
        raise ConfigError(
            f"{name} needs the judge's rewards, and the data have none. Use another loss, or scored data."
        )


def check_router_strategy(config: PolicyConfig, trainer: pl.Trainer, *, sharded: bool) -> None:
    """Refuse a router's loss where weights are sharded."""
    # its gradient reaches a router past the hook that gathers the layer's weights again
    if config.router_aux_loss is not None and (sharded or isinstance(trainer.strategy, DeepSpeedStrategy)):
        raise ConfigError(
            "--model.policy.router_aux_loss needs whole weights on every device: use --trainer.strategy ddp, or leave "
            "it out."
        )


def check_attention(config: PolicyConfig, layout: str) -> None:
    """Refuse an ``attn_implementation`` that the layout replaces."""
    asked = config.attn_implementation
    if asked is None or layout == "padded" or (layout == "packed" and is_flash(asked)):
        return
    instead = "" if layout == "packed" else " (or packed, with flash attention)"
    raise ConfigError(
        f"--model.policy.attn_implementation {asked} has no effect with --data.layout {layout}, where attention over "
        f"sequences in one row is our own. Leave it out, or use --data.layout padded{instead}."
    )


def check_flash(config: PolicyConfig, device: torch.device, plugin: Precision) -> None:
    """Refuse flash attention where there is no GPU, or in float32."""
    option = f"--model.policy.attn_implementation {config.attn_implementation}"
    if not is_flash(config.attn_implementation):
        return
    if device.type == "cpu":
        raise ConfigError(f"{option} needs a GPU, and the run is on a CPU. Leave it out.")
    if plugin.precision in ("32-true", "64-true") and config.dtype != "bfloat16":
        raise ConfigError(
            f"{option} computes in half precision, and --trainer.precision is {plugin.precision}. Use bf16-mixed, or "
            "leave it out."
        )


def check_strength(goal: GoalTemplate | None, policy: PolicyConfig) -> None:
    """Refuse a goal that is an adapter's strength where there is no adapter that a factor alone turns off and on."""
    if not isinstance(goal, AdapterStrength):
        return
    if policy.adapter is not None:
        raise ConfigError(
            f"goal AdapterStrength trains a new adapter, whose strength 0 is the model at {policy.path}, and "
            f"--model.policy.adapter {policy.adapter} has a scaling of its own. Merge it into the model "
            "(rap-lightning export --merge) and set --model.policy.lora.r."
        )
    if policy.lora is None:
        raise ConfigError(
            "goal AdapterStrength is the strength of a LoRA adapter, and the policy has none: set "
            "--model.policy.lora.r, or write the goal as text (--data.goal OverallGoal)."
        )
    if policy.lora.use_dora:
        raise ConfigError(
            "goal AdapterStrength multiplies the update BA, and DoRA normalises the weight that it is added to. Remove "
            "--model.policy.lora.use_dora."
        )


def check_precision(plugin: Precision, config: PolicyConfig, dtype: torch.dtype) -> None:
    """Refuse a dtype that the precision would convert to another one."""
    converts_to = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
    if isinstance(plugin, HalfPrecision) and dtype != converts_to[plugin.precision]:
        raise ConfigError(
            f"--model.policy.dtype {config.dtype} has no effect with --trainer.precision {plugin.precision}, which "
            "converts all weights. Remove one of the two."
        )


def check_mesh(mesh: DeviceMesh, world_size: int) -> None:
    """Refuse tensor parallelism."""
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            "tensor parallelism is not supported: the head computes log-probabilities from its whole weight. Set "
            f"--trainer.strategy.tensor_parallel_size 1 and --trainer.strategy.data_parallel_size {world_size}, or "
            "use the strategy FSDP2."
        )


# -- before training --------------------------------------------------------------------------------------------------


def check_steps(trainer: pl.Trainer) -> int:
    """Return the optimizer steps of the run, for the schedule; refuse a run without an end."""
    data = data_of(trainer)
    # estimated_stepping_batches would start a stream, whose first batch is fetched at once: before the checkpoint is
    # restored, and so from the beginning of the data
    streams = data is not None and data.streaming
    steps = _steps_of_stream(trainer) if streams else trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 0:  # Lightning returns -1 for a stream
        raise ConfigError(
            "the schedule needs the number of optimizer steps. Set --trainer.max_steps, or --trainer.max_epochs where "
            "the data are not streamed."
        )
    return int(steps)


def _steps_of_stream(trainer: pl.Trainer) -> int:
    """Return ``estimated_stepping_batches`` of a stream without starting it; -1 where only its end ends the run."""
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs
    if not isinstance(limit, int) or epochs is None or epochs < 0:
        return trainer.max_steps
    steps = math.ceil(limit / trainer.accumulate_grad_batches) * max(epochs, 1)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)


def check_warm_up(warm_up: WarmUp, steps: int, trainer: pl.Trainer) -> None:
    """Refuse a warm-up that leaves no step to the loss, or whose end can't reset the optimizer."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise ConfigError(
            "--model.warm_up is not supported with DeepSpeed, whose optimizer state can't be reset. Use DDP or FSDP2, "
            "or two runs: --model.loss SFT, then another from its exported folder."
        )
    if warm_up.steps >= steps:
        raise ConfigError(
            f"--model.warm_up.steps {warm_up.steps} leaves none of the run's {steps} optimizer steps to the loss. "
            "Warm up for fewer, or train longer (--trainer.max_steps, --trainer.max_epochs)."
        )


def check_reference_data(reference: Reference, data: PreferenceData | None, *, training: bool) -> PreferenceData:
    """Return the data that a reference reads before the first step; refuse a stream, or none."""
    name = type(reference).__name__
    if data is None:
        raise ConfigError(f"reference {name} reads all data before the first step. Attach a data module.")
    if data.streaming and training:
        raise ConfigError(
            f"reference {name} reads all data before the first step, and a stream is read during training. Use "
            "Frozen or AdaptersOff."
        )
    return data


def check_loop(trainer: pl.Trainer) -> None:
    """Refuse trainer options with which steps would be cut short or never logged, and a stream started too early."""
    loader = trainer.train_dataloader
    if isinstance(loader, PairLoader) and loader.started not in (None, loader.position()):
        raise ConfigError(
            "the stream was started before the checkpoint was restored, so it begins at the wrong batch. A callback, "
            "optimizer or schedule that reads trainer.estimated_stepping_batches does that: use trainer.max_steps."
        )
    if trainer.log_every_n_steps < 1:  # type: ignore[attr-defined]
        raise ConfigError("--trainer.log_every_n_steps must be at least 1")
    batches, accumulate = trainer.num_training_batches, trainer.accumulate_grad_batches
    epoch = sized_len(trainer.train_dataloader)  # a stream has no length
    cut = math.isfinite(batches) and (epoch is None or batches < epoch)
    if cut and batches % accumulate:
        raise ConfigError(
            f"--trainer.limit_train_batches ends an epoch after {batches} batches, in the middle of an optimizer step "
            f"of {accumulate}. Use a multiple of accumulate_grad_batches."
        )


def check_accumulation(trainer: pl.Trainer) -> None:
    """Refuse another number of accumulated batches than the steps were planned with."""
    loader = trainer.train_dataloader
    planned = loader.accumulate if isinstance(loader, PairLoader) else None  # a user's own loader plans none
    if planned is not None and planned != trainer.accumulate_grad_batches:
        raise ConfigError(
            f"the batches were planned for --trainer.accumulate_grad_batches {planned}, and something (a "
            f"GradientAccumulationScheduler?) has set {trainer.accumulate_grad_batches}: gradients would be scaled "
            "wrongly. Use accumulate_grad_batches alone."
        )


# -- at a batch -------------------------------------------------------------------------------------------------------


def check_rewards(loss: PreferenceLoss, batch: Batch) -> None:
    """Refuse a pair without rewards (nan) where the loss needs them.

    Raises:
        DataError: there is one.
    """
    if "rewards" in loss.requires and not batch.rewards.isfinite().all():
        raise DataError(f"{type(loss).__name__} needs the judge's rewards; a pair of {batch.pair_ids} has none.")


def check_first_batch(
    policy: PairLogps, reference: PairLogps, losses: Tensor, batch: Batch, *, after_warm_up: bool, exact: bool
) -> None:
    """Say by how much policy and reference differ before the first step; they start as the same model (law 5).

    Where ``exact``, more than :data:`AGREEMENT` is refused; with bfloat16 the two may differ by rounding.
    """
    ratios = torch.cat([policy.chosen - reference.chosen, policy.rejected - reference.rejected])
    largest, when = float(ratios.detach().abs().max()), " after the warm-up" if after_warm_up else ""
    rank_zero_info(
        f"first batch{when}: policy and reference differ by at most {largest:.1e} nats; mean loss "
        f"{float(losses.detach().mean()):.7f}"
    )
    if exact and not largest <= AGREEMENT:  # a nan must not pass
        raise ConfigError(
            f"policy and reference should be equal before the first step{when}, but a response of pair "
            f"{batch.pair_ids[0]} differs by {largest:.3g} nats. Is dropout on, or has the policy been changed?"
        )


def check_sampling(mesh: DeviceMesh | None) -> None:
    """Refuse predict with a sharded policy."""
    if mesh is not None:
        raise ConfigError("predict can't sample from a sharded policy yet. Run it on one device, or with DDP.")


# -- when a checkpoint is loaded --------------------------------------------------------------------------------------


def record_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the module recorded in a checkpoint; refuse another program's."""
    if "rap_lightning" not in checkpoint:
        raise ConfigError("the checkpoint was not written by rap-lightning. Start from the exported model instead.")
    return checkpoint["rap_lightning"]  # type: ignore[no-any-return]


def check_digests(saved: Mapping[str, Any], digests: Mapping[str, str], config: PolicyConfig) -> None:
    """Refuse a checkpoint's adapter on another base model or beside another adapter, and another reference.

    ``saved`` is the checkpoint's record, ``digests`` are of what was loaded now.
    """
    then = saved.get("digests", {})
    both = then.keys() & digests.keys()
    if config.adapts and "base" in both and not same_base(then["base"], digests["base"]):
        found = f"over another base model than {config.path}"
    elif "adapter" in both and then["adapter"] != digests["adapter"]:
        found = f"from another adapter than {config.adapter}"
    elif "reference" in both and not same_base(then["reference"], digests["reference"]):
        raise ConfigError(
            "the reference of the checkpoint's run had other weights than the one loaded now: its model's files have "
            f"changed, or another is named. Put back the files of that run, which began with {saved['policy']['path']}."
        )
    else:
        return
    raise ConfigError(
        f"the checkpoint's adapter was trained {found}, or that has changed since. Resume with the model of that run: "
        f"{saved['policy']['path']}, adapter {saved['policy'].get('adapter')}."
    )


def check_folders_on_load(strategy: Strategy) -> None:
    """Make a strategy refuse a checkpoint folder that is incomplete or holds code, before it reads it.

    The command line checks ``--ckpt_path`` itself. ``Trainer.fit(ckpt_path=...)`` has no hook between the choice of a
    checkpoint and its loading (Lightning 2.6.6), and DeepSpeed's and Lightning's own strategies unpickle what is in it.
    """
    load = strategy.load_checkpoint

    def checked(checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        if (path := Path(checkpoint_path)).is_dir():
            refuse_incomplete(path)
        return load(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = checked  # type: ignore[method-assign]


def check_checkpoint_reference(
    saved: Mapping[str, Tensor], reference: Reference, warm_up: WarmUp | None, step: int, *, fitting: bool
) -> None:
    """Refuse a reference, or a warm-up, that the checkpoint's run did not have.

    ``saved`` is the checkpoint's reference, empty where that doesn't change during the run.
    """
    keeps_none = type(reference).load_state_dict is Reference.load_state_dict
    if saved and keeps_none and fitting:
        raise ConfigError(
            f"the checkpoint's run had a reference that changes with the policy, and {type(reference).__name__} "
            "doesn't. Resume with the reference of that run."
        )
    if warm_up is not None and isinstance(reference, Warmed) and bool(saved) is (step < warm_up.steps):
        raise ConfigError(
            f"the checkpoint is of step {step}, and its run had {'ended' if saved else 'not ended'} a warm-up by then; "
            f"here --model.warm_up.steps is {warm_up.steps}. Resume with the warm-up of that run."
        )
