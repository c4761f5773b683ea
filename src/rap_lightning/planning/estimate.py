"""From one traced step to what each rank holds, under a strategy; and how long a step takes.

Of the strategies' own buffers only those are counted that grow with the model. What is measured and what is only
reckoned stands in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rap_lightning.planning.gpus import GPU
from rap_lightning.planning.trace import Step

Kind = Literal["single", "ddp", "fsdp2", "zero2"]
ReferenceKind = Literal["Frozen", "AdaptersOff", "AdapterAsLoaded", "Stored", "Synchronised", "none"]
Device = Literal["cpu", "cuda"]
LIVE = ("Frozen", "AdaptersOff", "AdapterAsLoaded", "Synchronised")
"""References that take a forward pass in each of the policy's."""
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
        shard: ranks that hold one copy together, under fsdp2.
        offload: everything sharded lives in the host's memory, under fsdp2.
        gather: bytes per weight that travels, over bytes per weight that is kept.
        buckets_apart: under ddp, what is sent is a second copy of the gradients (gradient_as_bucket_view false).
    """

    kind: Kind
    ranks: int
    per_node: int
    shard: int
    offload: bool = False
    gather: float = 1.0
    buckets_apart: bool = False


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


def memory(
    step: Step, spread: Spread, reference: ReferenceKind, vocabulary: int, device: Device, *,
    passes: int = 1, reference_weights: int | None = None,
) -> Memory:  # fmt: skip
    """What a rank holds when most is alive.

    Args:
        step: of one forward and backward pass.
        spread: how the run is spread.
        reference: which.
        vocabulary: rows of the head.
        device: what the run is on.
        passes: in an optimizer step; from the second one on, gradients are there before.
        reference_weights: bytes of a Frozen reference that is another model.
    """
    from rap_lightning.models.logps import CHUNK_BYTES, KEPT_BYTES

    sharded = spread.kind == "fsdp2"
    n = spread.shard if sharded else 1
    frozen = {
        "Frozen": step.weights if reference_weights is None else reference_weights, "Synchronised": step.gradients,
    }.get(reference, 0)  # fmt: skip
    share = 1 / (spread.ranks if spread.kind == "zero2" else n)  # of gradients and optimizer state
    states = step.optimizer * share
    buckets = step.gradients if spread.kind == "ddp" and spread.ranks > 1 else 0  # what is sent is never given back
    own = 0.0 if buckets and not spread.buckets_apart else step.gradients * share
    before = own if passes > 1 else 0.0
    gradients = buckets + own  # when the backward pass is over
    within, at_end = _gathered(step, spread, reference in LIVE) if sharded and n > 1 else (0.0, 0.0)
    # one of three moments is the worst: one within a pass; its end, when sharded gradients of the root are reduced; and
    # when the optimizer steps. What is whole for a while stands apart from the rest
    moments: list[tuple[float, float]] = [
        (buckets + before + step.peak(share if own > before else 0.0), within),
        (gradients, at_end),
        (gradients + step.update * share, 0.0),
    ]
    most, gathered = max(moments, key=sum)
    activations = max(0.0, most - gradients)
    all_logits = step.response_tokens * vocabulary * 4
    logits = min(all_logits, KEPT_BYTES) + min(all_logits, CHUNK_BYTES)
    weights = step.weights / n
    if spread.kind == "zero2":  # DeepSpeed keeps weights as they travel, and each rank its part of them in full beside
        weights = step.weights * spread.gather
        states += step.gradients * share if spread.gather < 1 else 0.0
    held = Memory(
        weights, min(gradients, most), states, frozen / n, gathered, activations,
        min(logits, activations), PROCESS[device],
    )  # fmt: skip
    if not spread.offload or device == "cpu":
        return held
    away = held.weights + held.gradients + held.optimizer + held.reference
    return replace(held, weights=0.0, gradients=0.0, optimizer=0.0, reference=0.0, host=away)


def _gathered(step: Step, spread: Spread, live: bool) -> tuple[float, float]:
    """Weights and gradients that are whole for a while: within a pass, and when the root's gradients are reduced.

    As FSDP2 does it: the root (embeddings, head) stays gathered from the forward pass to the end of the backward pass,
    one layer is computed with while the next arrives, and gradients are copied into what is sent, in float32.
    """
    trained = step.gradients / step.weights  # share of weights that have gradients
    root, layer = spread.gather * step.root, spread.gather * step.largest_unit
    backward = trained * (root + layer + step.largest_unit)
    of_reference = root + layer if live else 0.0  # its root comes while the policy's is there
    return root + 2 * layer + max(backward, of_reference), root + trained * (root + step.root)


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
    live = reference in LIVE
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
    elif spread.kind == "fsdp2":
        gathers = passes * (2 * moved + (moved if live else 0))
        seconds = (gathers + passes * step.gradients) * ring(spread.shard) / near
        replicas = spread.ranks // spread.shard
        seconds += 2 * passes * step.gradients / spread.shard * ring(replicas) / (network * 1e9) if replicas > 1 else 0
    return Time(operations / (gpu.teraflops * 1e12 * mfu), seconds)
