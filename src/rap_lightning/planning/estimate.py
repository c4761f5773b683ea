"""From one traced step to each rank's memory under a strategy, and to the time of a step.

docs/scaling.md says which figures were measured and which are estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from rap_lightning.planning.gpus import GPU
from rap_lightning.planning.trace import Step

Kind = Literal["single", "ddp", "fsdp2", "zero2"]
ReferenceKind = Literal["Frozen", "AdaptersOff", "AdapterAsLoaded", "Stored", "Synchronised", "none"]
Device = Literal["cpu", "cuda"]
LIVE = ("Frozen", "AdaptersOff", "AdapterAsLoaded", "Synchronised")
"""References that run a forward pass for each of the policy's."""
PROCESS = {"cpu": 0.55e9, "cuda": 0.7e9}
"""Bytes of a process without a model: interpreter and libraries, or CUDA context and cuBLAS workspaces."""
NCCL_CONNECTION = 32 * (4 * 2**20 + 4.7 * 2**20 + 0.5 * 2**20)
"""Bytes that NCCL keeps for one neighbour of a rank: up to 32 channels, each with a buffer for each of its protocols
(Simple, LL128, LL), by the defaults in its source. An estimate: nothing was measured."""
LINK_SHARE = 0.8
"""Share of a link's datasheet bandwidth that large collectives reach."""
MFU = {False: 0.33, True: 0.4}
"""Share of the peak that is reached without and with compiled layers. Recomputed operations count as operations.
torchtitan's published 8B on 8 H100 (5,762 and 6,667 tokens/s of each GPU) is what a test holds them to."""
USABLE = 0.94
"""Share of a GPU's memory available to tensors: the allocator rounds up and leaves gaps."""


@dataclass(frozen=True)
class Spread:
    """How a run is spread over processes.

    Attributes:
        kind: the family of strategies.
        ranks: processes in all; ``per_node`` of them on each node.
        shard: ranks that hold one copy together, under fsdp2.
        offload: everything sharded is kept in the host's memory, under fsdp2.
        gather: bytes of a gathered weight over bytes of a kept one.
        separate_buckets: under ddp, the reduced buckets are a second copy of the gradients (gradient_as_bucket_view
            false).
    """

    kind: Kind
    ranks: int
    per_node: int
    shard: int
    offload: bool = False
    gather: float = 1.0
    separate_buckets: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment.

    Attributes:
        weights, gradients, optimizer, reference: kept all the time.
        gathered: weights and gradients that are temporarily unsharded, under sharding strategies.
        activations: what the forward pass keeps and temporary tensors, logits included.
        logits: the part of the activations that grows with the vocabulary, at most.
        process: interpreter and libraries, or CUDA context and NCCL's buffers.
        host: in the host's memory instead, per rank.
    """

    weights: float
    gradients: float
    optimizer: float
    reference: float
    gathered: float
    activations: float
    logits: float
    process: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Everything but the host's."""
        parts = (self.weights, self.gradients, self.optimizer, self.reference, self.gathered)
        return sum(parts) + self.activations + self.process


def memory(
    step: Step, spread: Spread, reference: ReferenceKind, device: Device, *,
    passes: int = 1, reference_weights: int | None = None,
) -> Memory:  # fmt: skip
    """The memory of a rank at the worst moment.

    From the second of the ``passes`` in an optimizer step on, gradients exist before the pass. ``reference_weights``
    are the bytes of a Frozen reference that is another model.
    """
    from rap_lightning.models.logps import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES, KEPT_BYTES

    sharded = spread.kind == "fsdp2"
    n = spread.shard if sharded else 1
    frozen = {
        "Frozen": step.weights if reference_weights is None else reference_weights, "Synchronised": step.gradients,
    }.get(reference, 0)  # fmt: skip
    share = 1 / (spread.ranks if spread.kind == "zero2" else n)  # of gradients and optimizer state
    states = step.optimizer * share
    buckets = step.gradients if spread.kind == "ddp" and spread.ranks > 1 else 0  # never freed
    own = 0.0 if buckets and not spread.separate_buckets else step.gradients * share
    before = own if passes > 1 else 0.0
    gradients = buckets + own  # when the backward pass is over
    unsharded = _gathered(step, spread, reference in LIVE) if sharded and n > 1 else (0.0, 0.0, 0.0)
    # one of three moments is the worst: one within a pass; its end, when sharded gradients of the root are reduced; or
    # the optimizer's step. Each is (kept and activations, temporarily unsharded)
    added = share if own > before else 0.0
    moments = [
        *((buckets + before + kept + added * grads, unsharded[grads > 0]) for kept, grads in step.timeline),
        (gradients, unsharded[2]),
        (gradients + step.update * share, 0.0),
    ]
    most, gathered = max(moments, key=sum)
    activations = max(0.0, most - gradients)
    all_logits = step.response_tokens * step.vocabulary * 4
    logits = min(all_logits, KEPT_BYTES) + min(all_logits, CHUNK_BYTES if device == "cpu" else ACCELERATOR_CHUNK_BYTES)
    weights = step.weights / n
    if spread.kind == "zero2":  # weights are kept as gathered, and each rank's shard in float32 too
        weights = step.weights * spread.gather
        states += step.gradients * share if spread.gather < 1 else 0.0
    held = Memory(
        weights, min(gradients, most), states, frozen / n, gathered, activations,
        min(logits, activations), PROCESS[device] + (_nccl_buffers(spread) if device == "cuda" else 0.0),
    )  # fmt: skip
    if not spread.offload or device == "cpu":
        return held
    away = held.weights + held.gradients + held.optimizer + held.reference
    return replace(held, weights=0.0, gradients=0.0, optimizer=0.0, reference=0.0, host=away)


def _gathered(step: Step, spread: Spread, live: bool) -> tuple[float, float, float]:
    """Bytes temporarily unsharded: before the first gradient is complete, after that, and when the root's are reduced.

    FSDP2 keeps the root (embeddings, head) gathered from the forward pass to the end of the backward pass, gathers the
    next layer while one computes, and copies gradients into a float32 buffer to reduce them. What is gathered arrives
    in one buffer for the group and is copied out of it into the weights, so a group is there twice for a moment.
    """
    trained = step.gradients / step.weights  # share of the weights that have gradients
    root, layer = spread.gather * step.root, spread.gather * step.largest_unit
    layers = 3 * layer  # the one that computes, the next one, and the buffer that it arrived in
    forward = root + max(root, layers) if live else layers  # the reference's root is gathered while the policy's is
    backward = layers + trained * (root + layer + step.largest_unit)
    return root + forward, root + backward, root + trained * (root + step.root)


def _nccl_buffers(spread: Spread) -> float:
    """Bytes of NCCL's communicators: a ring has one neighbour that sends, a tree up to three."""

    def of(ranks: int) -> float:
        return NCCL_CONNECTION * (1 + min(3, math.ceil(math.log2(ranks)))) if ranks > 1 else 0.0

    if spread.kind != "fsdp2":
        return of(spread.ranks)
    return of(spread.ranks) + of(spread.shard) + of(spread.ranks // spread.shard)  # all ranks, shards, replicas


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step: computing, and communicating meanwhile."""

    compute: float
    communication: float

    @property
    def step(self) -> float:
        """The longer of the two: they overlap fully."""
        return max(self.compute, self.communication)


def duration(
    step: Step, spread: Spread, reference: ReferenceKind, passes: int, gpu: GPU, mfu: float, network: float
) -> Time:
    """The time of an optimizer step of so many forward and backward passes on each rank.

    ``mfu`` is the share of the peak that is reached, recomputed operations counted; ``network`` is GB/s per device
    between nodes, by the datasheet.
    """
    live = reference in LIVE
    operations = passes * (step.flops + (step.reference_flops if live else 0))
    within = spread.ranks <= spread.per_node
    far = network * 1e9 * LINK_SHARE
    link = gpu.link * 1e9 * LINK_SHARE if within else far
    near = gpu.link * 1e9 * LINK_SHARE if spread.shard <= spread.per_node else far
    moved = step.weights * spread.gather
    ring = lambda n: (n - 1) / n  # noqa: E731 (a ring collective sends all parts but one's own)
    seconds = 0.0
    if spread.kind == "ddp":
        seconds = 2 * step.gradients * ring(spread.ranks) / link
    elif spread.kind == "zero2":
        seconds = (passes * step.gradients + step.weights) * ring(spread.ranks) / link
    elif spread.kind == "fsdp2":
        gathers = passes * (2 * moved + (moved if live else 0))
        seconds = (gathers + passes * step.gradients) * ring(spread.shard) / near
        replicas = spread.ranks // spread.shard
        # replicas are reduced once a step, after the last pass
        seconds += 2 * step.gradients / spread.shard * ring(replicas) / far if replicas > 1 else 0
    return Time(operations / (gpu.teraflops * 1e12 * mfu), seconds)
