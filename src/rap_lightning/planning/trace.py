"""Trace one training step of the real model without its weights: memory over time, and number of operations.

The policy is built from its config with fake tensors, which have shapes and no memory, and the real code runs on them:
adapters, gradient checkpointing, layouts, chunked head, optimizer. So nothing here depends on an architecture.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.distributed.sharded_load import blank_model
from rap_lightning.errors import ConfigError
from rap_lightning.models import attention, blockwise_attention, logps, masked_attention
from rap_lightning.models.attention_choice import Choice, Demand, Machine, choose
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.policy import Policy, decoder_layers, evaluating
from rap_lightning.models.policy_config import PolicyConfig
from rap_lightning.models.private_api import cpu_flash_attention, cpu_flash_attention_backward


@dataclass(frozen=True)
class Step:
    """One forward and backward pass over a batch, and the optimizer's step, on one unsharded device; sizes in bytes.

    Attributes:
        parameters, trainable: numbers of parameters.
        weights, gradients, optimizer: of the policy.
        largest_unit: weights of the largest decoder layer.
        root: weights outside of the layers: embeddings, head, last norm.
        timeline: (activations, gradients) alive together, at the moments that no other exceeds in both.
        update: temporary tensors of the optimizer's step, at most.
        tokens: input tokens of the model.
        response_tokens: tokens whose logits are computed.
        flops: of the policy's forward and backward pass, recomputation included.
        reference_flops: of a forward pass alone; 0 where the reference needs none.
        vocabulary: rows of the head.
        context: the longest sequence that the model takes; None where its config does not say.
        attention: the ways in which attention over sequences in one row is computed; empty where each has its own row.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    largest_unit: int
    root: int
    timeline: tuple[tuple[int, int], ...]
    update: int
    tokens: int
    response_tokens: int
    flops: int
    reference_flops: int
    vocabulary: int
    context: int | None = None
    attention: tuple[str, ...] = ()

    def peak(self, gradients: float = 1.0) -> int:
        """Activations and gradients at the worst moment, with gradients counted at this share of their size."""
        return max(int(activations + gradients * grads) for activations, grads in self.timeline)


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of all living storages that operations made, and the operations.

    torch's FlopCounterMode can't be used together with it: its module hooks keep recomputed activations alive until the
    backward pass ends.
    """

    def __init__(self, width: Callable[[Tensor], float]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.gradients = self.gradients_made = 0  # as they are kept, and as the trace made them
        self._width = width
        self.flops = 0
        self.moments: list[tuple[int, int]] = []
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Do not count tensors that existed before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        held = self._known.get(key)
        if held is not None and held() is not None:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)
        self.note()

    def note(self) -> None:
        """Record this moment unless the last one had more of both."""
        moment = (self.now - self.gradients_made, self.gradients)
        if self.moments and moment[0] <= self.moments[-1][0] and moment[1] <= self.moments[-1][1]:
            return
        self.moments.append(moment)

    def became_gradient(self, parameter: Tensor) -> None:
        """Count a parameter's complete gradient as a gradient instead of an activation."""
        if parameter.grad is not None and not getattr(parameter, "_counted", False):
            parameter._counted = True  # type: ignore[attr-defined]
            made = parameter.grad.untyped_storage().nbytes()
            self.gradients_made += made
            self.gradients += int(made * self._width(parameter))


@contextmanager
def fake_policy(config: PolicyConfig, dtype: torch.dtype) -> Iterator[tuple[Policy, FakeTensorMode]]:
    """The policy on fake tensors, and the mode in which it can be run."""
    blank, why = blank_model(config, dtype)
    if blank is None:
        raise ConfigError(f"plan can't build {config.path} without its weights: {why}.")
    policy = config.build(dtype, model=blank)  # an adapter on meta tensors is on meta too
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    originals = list(policy.parameters())  # kept alive, so that no id is used twice
    made: dict[int, Any] = {}  # a tied head stays tied
    with mode:
        for module in policy.modules():
            for name, old in list(module._parameters.items()):
                if old is not None:
                    fake = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    module._parameters[name] = made.setdefault(id(old), torch.nn.Parameter(fake, old.requires_grad))
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        del originals
        yield policy, mode


def batch_of(layout: str, pairs: int, prompt: int, response: int) -> Batch:
    """A batch of pairs of one size, which share no prefix except each pair's prompt."""
    examples = []
    for number in range(pairs):
        # distinct first tokens, so that no two sequences share a prefix by chance
        ids = [[10 + 3 * number + which] * max(size, 1) for which, size in enumerate((prompt, response, response))]
        examples.append(Example("", 0, None, (0.0, 0.0), ids[0], ids[1], ids[2]))
    places = tuple(range(pairs))
    return lay_out(LAYOUTS[layout], examples, BatchPlan(places, (1.0,) * pairs, pairs, (places,)), pad_id=0)


def trace(
    config: PolicyConfig, dtype: torch.dtype, batch: Batch, optimizer: Callable[[Any], Any],
    *, kept: torch.dtype | None = None, autocast: torch.dtype | None = None, reference: bool = True,
    foreach: bool = False, machine: Machine | None = None,
) -> Step:  # fmt: skip
    """Run one step on fake tensors.

    Args:
        config: the policy's.
        dtype: of its weights, as layers read them.
        batch: of one forward pass.
        optimizer: builds the optimizer from the trainable parameters.
        kept: dtype in which those weights are kept between passes, if another: a sharding strategy gathers them in
            ``dtype``.
        autocast: dtype of mixed precision.
        reference: whether a reference's forward pass runs between the policy's passes.
        foreach: whether optimizers with ``foreach=None`` update all weights at once, as they do on a GPU.
        machine: what attention and the head would run on; by default a CPU.
    """
    with fake_policy(config, dtype) as (policy, mode):
        moved = batch.map(mode.from_tensor)
        parameters = list(policy.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        text = policy.causal_lm.config.get_text_config()
        ratio = (kept or dtype).itemsize / dtype.itemsize
        width = lambda tensor: ratio if tensor.dtype == dtype else 1.0  # noqa: E731 (an adapter may be float32)
        size = lambda tensors: sum(int(t.nbytes * width(t)) for t in tensors)  # noqa: E731
        units = [size(layer.parameters()) for layer in decoder_layers(policy)]
        alive = _AliveBytes(width)
        alive.ignore([*parameters, *policy.buffers(), *(v for v in vars(moved).values() if isinstance(v, Tensor))])
        for parameter in trainable:
            parameter.register_post_accumulate_grad_hook(alive.became_gradient)
        reference_flops, ways = 0, set[Choice]()
        attention_there = _attention_on(machine or Machine("cpu"), ways)
        with alive, _head_of(machine), attention_there:
            # as Lightning enters it: casted weights are not cached for the rest of the pass
            with torch.autocast("cpu", autocast, enabled=autocast is not None, cache_enabled=False):
                loss = policy(moved).sum()
                if reference:
                    before = alive.flops
                    with torch.no_grad(), evaluating(policy):
                        policy(moved)
                    reference_flops = alive.flops - before
            torch.autograd.backward(loss)
            made, moments = optimizer(trainable), _worst(alive.moments)
            for group in made.param_groups if foreach else []:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
            alive.most = alive.now
            made.step()
        state_made = [v for s in made.state.values() for v in s.values() if isinstance(v, Tensor)]
        weights, gradients, state = size(parameters), size(trainable), size(state_made)
        update = alive.most - sum(t.nbytes for t in (*trainable, *state_made))
        return Step(
            parameters=sum(p.numel() for p in parameters), trainable=sum(p.numel() for p in trainable),
            weights=weights, gradients=gradients, optimizer=state,
            largest_unit=max(units, default=0), root=weights - sum(units), timeline=moments,
            update=max(0, int(update * max(map(width, trainable)))),
            tokens=int(batch.input_ids.numel()), response_tokens=len(batch.target),
            flops=alive.flops - reference_flops, reference_flops=reference_flops,
            vocabulary=int(text.vocab_size), context=getattr(text, "max_position_embeddings", None),
            attention=tuple(sorted(map(str, ways))),
        )  # fmt: skip


@contextmanager
def _attention_on(machine: Machine, ways: set[Choice]) -> Iterator[None]:
    """Choose the ways to compute attention over a forest as on ``machine``, and note them.

    Flash attention and FlexAttention are traced as the way on CPUs, which keeps the same: queries, keys, values,
    outputs and log-sum-exps. A soft cap and a window change none of it. FlexAttention's block masks, of 8 bytes for
    each pair of blocks of 128 tokens, are left out. With a mask, CUDA keeps the scores, and CPUs don't.
    """

    def choose_for(demand: Demand, *_: Any) -> Choice:
        choice = choose(demand, machine)
        ways.add(choice)
        return choice

    def fused(call: AttentionCall) -> Tensor:
        same = call.query.shape[-1] == call.value.shape[-1]
        return blockwise_attention.attend(call) if same else masked_attention.attend(call)

    def with_scores(call: AttentionCall) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return masked_attention.attend(call)

    before = attention.PATHS, attention._working
    paths = {"blockwise": blockwise_attention.attend, "varlen": fused, "flex": fused}
    attention.PATHS = paths | {"mask": masked_attention.attend if machine.device_type == "cpu" else with_scores}
    attention._working = choose_for  # type: ignore[assignment]
    try:
        yield
    finally:
        attention.PATHS, attention._working = before


@contextmanager
def _head_of(machine: Machine | None) -> Iterator[None]:
    """Compute the head's logits in the machine's chunks.

    A chunk is one block: those sized for a CPU's cache would be thousands of views to trace.
    """
    before = logps.ROWS_IN_CACHE, logps.CHUNK_BYTES
    logps.ROWS_IN_CACHE = 1 << 30
    if machine is not None:
        logps.CHUNK_BYTES = logps.ACCELERATOR_CHUNK_BYTES
    try:
        yield
    finally:
        logps.ROWS_IN_CACHE, logps.CHUNK_BYTES = before


def _worst(moments: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The moments that no other exceeds in both."""
    kept: list[tuple[int, int]] = []
    most = -1
    for activations, gradients in sorted(set(moments), key=lambda m: (-m[1], -m[0])):
        if activations > most:
            kept.append((activations, gradients))
            most = activations
    return tuple(kept)


def _attention(q: Any, k: Any, v: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """FLOPs of q k^T and p v, of which causality leaves half."""
    *heads, t, d = q.shape
    return int(2 * math.prod(heads) * t * k.shape[-2] * (d + v.shape[-1]) * (0.5 if is_causal else 1))


def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, log_z: Any, dropout_p: float, is_causal: bool, **_: Any
) -> int:
    """FLOPs of five products, where the forward pass has two."""
    return int(2.5 * _attention(q, k, v, dropout_p, is_causal))


# torch's registry lacks the CPU attention kernels
_FLOPS: dict[Any, Any] = flop_registry | {
    cpu_flash_attention: _attention, cpu_flash_attention_backward: _attention_backward,
}  # fmt: skip
