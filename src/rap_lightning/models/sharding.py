"""Sharding a policy over a device mesh with FSDP2."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rap_lightning.models.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard every decoder layer on its own, and the rest (embeddings, last norm, head) together at the root."""
    names = set(policy.causal_lm._no_split_modules or [])
    for module in policy.modules():
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh)
    fully_shard(policy, mesh=mesh)
