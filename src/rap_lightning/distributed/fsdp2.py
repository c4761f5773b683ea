"""Sharding a policy over a device mesh with FSDP2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from rap_lightning.models.policy import Policy, decoder_layers


@dataclass(frozen=True)
class Sharding:
    """How weights, gradients and optimizer state are sharded.

    Attributes:
        mesh: one dimension: every rank holds a part. Two (replicate, shard): each part is held once per replica.
        gather: dtype in which weights are gathered and layers compute; by default the weights' own. Gradients are
            reduced in float32 either way.
        offload: parts are in the host's memory while they are not computed with.
    """

    mesh: DeviceMesh
    gather: torch.dtype | None = None
    offload: bool = False

    @property
    def compute_device(self) -> torch.device:
        """Where layers compute."""
        if self.mesh.device_type == "cpu":
            return torch.device("cpu")
        return torch.device(self.mesh.device_type, torch.get_device_module(self.mesh.device_type).current_device())

    @property
    def home(self) -> torch.device:
        """Where the parts are stored."""
        return torch.device("cpu") if self.offload else self.compute_device


def shard(policy: Policy, sharding: Sharding) -> None:
    """Shard every decoder layer on its own, and the rest (embeddings, last norm, head) together at the root.

    The order matters: ``fully_shard`` takes the parameters below a module that no earlier call has taken, so layers
    come first and the root takes what is left. The root is the Policy, not the Hugging Face model inside it: its
    ``forward`` reads the head's weight outside of the head's own forward, which works because the root's hook has
    gathered it.
    """
    on_host = OffloadPolicy()
    if sharding.offload:
        on_host = CPUOffloadPolicy(pin_memory=sharding.compute_device.type != "cpu")
    precision = MixedPrecisionPolicy()
    if sharding.gather is not None:
        # inputs are ids and positions, and a Batch isn't a tensor that could be cast
        precision = MixedPrecisionPolicy(sharding.gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(policy):
        fully_shard(layer, mesh=sharding.mesh, mp_policy=precision, offload_policy=on_host)
    # The root's weights stay gathered for the backward pass, which follows at once. A frozen model has none, and must
    # free them after the forward pass (torch 2.6 keeps every root's by default).
    frozen = not any(p.requires_grad for p in policy.parameters())
    fully_shard(policy, mesh=sharding.mesh, mp_policy=precision, offload_policy=on_host, reshard_after_forward=frozen)
    policy.computes_on = sharding.compute_device


def sum_replicas(policy: Policy, wanted: bool) -> None:
    """Say whether the next backward pass adds up gradients over replicas, which hold each part once (HSDP).

    Within a replica gradients are reduced at every backward pass; over replicas they only need to be at a step's last.
    Without replicas it has no effect.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_all_reduce(wanted)


def reshard(policy: Policy) -> None:
    """Free gathered weights after a forward pass without a backward one.

    The root keeps them until then, and an optimizer that is made meanwhile would hold the gathered tensors instead of
    the sharded parameters.
    """
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
