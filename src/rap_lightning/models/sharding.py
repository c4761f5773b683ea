"""Sharding a policy over a device mesh with FSDP2."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rap_lightning.models.policy import Policy, decoder_layers


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard every decoder layer on its own, and the rest (embeddings, last norm, head) together at the root."""
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
