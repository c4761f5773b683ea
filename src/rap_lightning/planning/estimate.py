"""From one traced step to what each rank holds, under a strategy; and how long a step takes.

Of the strategies' own buffers only those are counted that grow with the model. What is measured and what is only
reckoned stands in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rap_lightning.planning.gpus import GPU
from rap_lightning.planning.trace import Step

Kind = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]
ReferenceKind = Literal["Frozen", "AdaptersOff", "Stored", "Synchronised", "none"]
PROCESS = {"cpu": 0.55e9, "cuda": 1.2e9}
"""Bytes of a process that has loaded everything but a model: interpreter and libraries, or CUDA context and NCCL."""
USABLE = 0.94
"""Share of a GPU's memory that tensors get: the allocator rounds up and leaves gaps."""


@dataclass(frozen=True)
class Spread:
    """How a run is spread.

    Attributes:
        kind: which family of strategies.
        ranks: processes in all; ``per_node`` of them on each node.
        shard: ranks that hold one copy together, under fsdp2 and zero3.
        offload: optimizer (zero2) or everything sharded (fsdp2, zero3) lives in the host's memory.
        gather: bytes per weight that travels, over bytes per weight that is kept.
    """

    kind: Kind
    ranks: int
    per_node: int
    shard: int
    offload: bool = False
    gather: float = 1.0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the worst moment.

    Attributes:
        weights, gradients, optimizer, reference: kept there.
        gathered: weights and gradients that are whole for a while, under sharding strategies.
        activations: what the forward pass keeps and the passes need beside, logits among them.
        logits: the part of it that grows with the vocabulary, at most.
        process: what any process takes.
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
        """All of it but the host's."""
        parts = (self.weights, self.gradients, self.optimizer, self.reference, self.gathered)
        return sum(parts) + self.activations + self.process


def memory(step: Step, spread: Spread, reference: ReferenceKind, vocabulary: int, device: str) -> Memory:
    """What a rank holds when most is alive."""
    from rap_lightning.models.logps import CHUNK_BYTES, KEPT_BYTES

    sharded = spread.kind in ("fsdp2", "zero3")
    n = spread.shard if sharded else 1
    frozen = {"Frozen": step.weights, "Synchronised": step.gradients}.get(reference, 0)
    gradients = step.gradients / n
    if spread.kind == "ddp" and spread.ranks > 1:
        gradients = 2 * step.gradients  # its buckets are a second copy
    if spread.kind == "zero2":
        gradients = step.gradients / spread.ranks
    states = step.optimizer / (spread.ranks if spread.kind == "zero2" else n)
    gathered = 0.0
    if sharded and n > 1:
        full = step.gradients / step.weights  # share of weights that have gradients
        gathered = spread.gather * (step.root + 2 * step.largest_unit) + full * (step.root + step.largest_unit)
    share = gradients / step.gradients if step.gradients else 0.0
    # the moment after the backward pass has all gradients; the worst moment may be an earlier one, with fewer
    activations = max(step.peak(share), gradients) - gradients
    all_logits = step.response_tokens * vocabulary * 4
    logits = min(all_logits, KEPT_BYTES) + min(all_logits, CHUNK_BYTES)
    held = Memory(
        step.weights / n, gradients, states, frozen / n, gathered, activations, min(logits, activations),
        PROCESS[device],
    )  # fmt: skip
    if not spread.offload or device == "cpu":
        return held
    if spread.kind == "zero2":
        return replace(held, optimizer=0.0, host=held.optimizer)
    away = held.weights + held.gradients + held.optimizer + held.reference
    return replace(held, weights=0.0, gradients=0.0, optimizer=0.0, reference=0.0, host=away)


@dataclass(frozen=True)
class Time:
    """Seconds of one optimizer step: computing, and what travels meanwhile; the longer of the two counts."""

    compute: float
    communication: float

    @property
    def step(self) -> float:
        """If the two overlap fully."""
        return max(self.compute, self.communication)


def duration(
    step: Step, spread: Spread, reference: ReferenceKind, passes: int, gpu: GPU, mfu: float, network: float
) -> Time:
    """Of an optimizer step with ``passes`` forward and backward passes on each rank.

    Args:
        step: of one pass.
        spread: how the run is spread.
        reference: live references cost a forward pass.
        passes: forward and backward passes on each rank.
        gpu: its figures.
        mfu: share of the peak that is reached.
        network: GB/s per device between nodes.
    """
    live = reference not in ("Stored", "none")
    operations = passes * (step.flops + (step.reference_flops if live else 0))
    within = spread.ranks <= spread.per_node
    link = (gpu.link if within else network) * 1e9
    near = (gpu.link if spread.shard <= spread.per_node else network) * 1e9
    moved = step.weights * spread.gather
    ring = lambda n: (n - 1) / n  # noqa: E731 (of n parts, all but one's own)
    seconds = 0.0
    if spread.kind == "ddp":
        seconds = 2 * step.gradients * ring(spread.ranks) / link
    elif spread.kind == "zero2":
        seconds = (passes * step.gradients + step.weights) * ring(spread.ranks) / link
    elif spread.kind in ("fsdp2", "zero3"):
        gathers = passes * (2 * moved + (moved if reference in ("Frozen", "AdaptersOff") else 0))
        seconds = (gathers + passes * step.gradients) * ring(spread.shard) / near
        replicas = spread.ranks // spread.shard
        seconds += 2 * passes * step.gradients / spread.shard * ring(replicas) / (network * 1e9) if replicas > 1 else 0
    return Time(operations / (gpu.teraflops * 1e12 * mfu), seconds)
