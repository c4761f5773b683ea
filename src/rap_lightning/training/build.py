"""The policy, loaded for a trainer: in its precision, sharded by its strategy, with its head checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.device_mesh import DeviceMesh

from rap_lightning.distributed.fsdp2 import Sharding, reshard
from rap_lightning.distributed.sharded_load import load_sharded
from rap_lightning.models.adapters import adapter_digest
from rap_lightning.models.digests import base_digest
from rap_lightning.models.model_checks import check_head, check_sharing
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.pretrained import refuse_quantised
from rap_lightning.training import checks


def sharding_of(trainer: pl.Trainer, mesh: DeviceMesh | None) -> Sharding | None:
    """Return how the strategy shards weights; None where every process holds them whole."""
    if mesh is None:
        return None
    checks.check_mesh(mesh, trainer.world_size)
    # our FSDP2 says more than Lightning's ModelParallelStrategy: a dtype, and offloading
    asked = getattr(trainer.strategy, "sharding", None)
    return asked if isinstance(asked, Sharding) else Sharding(mesh["data_parallel"])


def weight_dtypes(
    config: PolicyConfig, trainer: pl.Trainer, sharding: Sharding | None
) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes in which the policy and a live reference are loaded."""
    on_accelerator = trainer.strategy.root_device.type != "cpu"
    return config.loading_dtypes(
        config.resolve_dtype(), mixed=on_accelerator and trainer.precision_plugin.precision == "bf16-mixed",
        gather=None if sharding is None else sharding.gather,
    )  # fmt: skip


def build_policy(config: PolicyConfig, trainer: pl.Trainer, sharding: Sharding | None, dtype: torch.dtype) -> Policy:
    """Load the policy in ``dtype`` and compare its log-probabilities with the model's own logits.

    Raises:
        ConfigError: the dtype contradicts the precision, the weights are quantised and would all be trained, or the
            model's head is not supported.
    """
    if not config.adapts:
        refuse_quantised(config.load_config(), config.path)
    plugin = trainer.precision_plugin
    checks.check_precision(plugin, config, dtype)
    if sharding is not None:
        policy, whole = load_sharded(config, dtype, sharding, trained=True)
        if whole:
            rank_zero_info(f"{config.path} is loaded whole by each process, then sharded: {whole}.")
    else:
        policy = config.build(dtype)
        if isinstance(plugin, HalfPrecision):  # Lightning converts later, and references copy the policy now
            plugin.convert_module(policy)
    difference = check_head(policy)
    if reason := check_sharing(policy):
        rank_zero_info(
            f"{config.path} supports neither prefix sharing nor packing: {reason}. With the layouts packed and tree, "
            "its sequences are run one at a time."
        )
    else:
        rank_zero_info(f"attention over sequences in one row: {'; '.join(policy.attention)}")
    if sharding is not None:
        reshard(policy)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    rank_zero_info(
        f"policy: {config.path}, {sum(p.numel() for p in policy.parameters()):,} parameters, "
        f"{sum(p.numel() for p in trainable):,} trainable, {dtype}; head checked to {difference:.1e} nats"
    )
    if dtype != config.resolve_dtype():
        rank_zero_info(
            "weights that are not trained are held in bfloat16; --model.policy.dtype float32 keeps them in float32"
        )
    if any(p.dtype == torch.bfloat16 for p in trainable):
        rank_zero_warn(
            "Trainable weights are bfloat16: updates smaller than 1/256 of a weight are rounded away, so small "
            "learning rates train nothing. Use --trainer.precision bf16-mixed, which keeps them in float32."
        )
    return policy


def digests_of(policy: Policy, config: PolicyConfig) -> dict[str, str]:
    """Return digests of the weights that the run begins with, of which checkpoints hold only trained ones."""
    digests = {"base": base_digest(policy)}
    if config.adapter is not None:
        digests["adapter"] = adapter_digest(config.adapter, config.adapter_revision)
    return digests


def recorded(config: PolicyConfig) -> dict[str, Any]:
    """Return the config for a checkpoint, with local paths made absolute: it is read from any folder."""
    record = dataclasses.asdict(config)
    for name in ("path", "adapter"):
        if record[name] is not None and Path(record[name]).is_dir():
            record[name] = str(Path(record[name]).resolve())
    return record
