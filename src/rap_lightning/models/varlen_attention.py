"""Attention over a forest by variable-length flash attention, for GPUs: no mask, no compiler, nothing computed twice.

One causal call for all runs, each a sequence of its own; then one call per depth, in which the descendants of each run
at that depth attend to it. The calls are merged by their log-sum-exps, as in ``blockwise_attention``, which calls a
kernel for each run; here the number of calls is the depth of the forest.

Shape legend: H query heads, G key-value heads, T tokens, D head size, N sequences of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rap_lightning.batches.types import Forest
from rap_lightning.models import private_api
from rap_lightning.models.masked_attention import AttentionCall
from rap_lightning.models.per_forest import once_per_forest, to_device

Span: TypeAlias = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Rows:
    """One side of a kernel call: tokens of the forest as N sequences.

    Attributes:
        index: the tokens, in order: a slice where they are consecutive, which needs no copy; else [t] int64.
        ends: [N + 1] int32, cumulative lengths from 0.
        longest: tokens of the longest sequence.
    """

    index: slice | Tensor
    ends: Tensor
    longest: int


@dataclass(frozen=True, eq=False)
class Part:
    """One kernel call: sequence i of the queries attends to sequence i of the keys.

    Attributes:
        causal: queries and keys are the same tokens, and a query sees those up to itself; else it sees all.
    """

    queries: Rows
    keys: Rows
    causal: bool


def attend(call: AttentionCall) -> Tensor:
    """Return [1, H, T, D] of a call without soft cap, window and dropout."""
    query, key, value = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
    out: Tensor = _VarlenAttention.apply(query, key, value, call.sinks, parts(call.forest), call.scale)
    return out.transpose(0, 1)[None]


@once_per_forest
def parts(forest: Forest) -> tuple[Part, ...]:
    """Return the calls: all runs with themselves first, then the descendants of the runs of each depth with these.

    Runs come depth first, and those of one depth are in different subtrees, so a token is at most once in a call.
    """
    levels: list[list[tuple[int, int, int]]] = []
    ancestors: list[int] = []  # where the subtrees end that the run is in
    for start, stop, end in forest.runs:
        while ancestors and ancestors[-1] <= start:
            ancestors.pop()
        if stop < end:
            if len(levels) == len(ancestors):
                levels.append([])
            levels[len(ancestors)].append((start, stop, end))
        ancestors.append(end)
    device = forest.end.device
    runs = _rows([(start, stop) for start, stop, _ in forest.runs], device)
    return Part(runs, runs, causal=True), *(
        Part(
            _rows([(stop, end) for _, stop, end in level], device),
            _rows([(start, stop) for start, stop, _ in level], device),
            causal=False,
        )
        for level in levels
    )


def _rows(spans: Sequence[Span], device: torch.device) -> Rows:
    lengths = [stop - start for start, stop in spans]
    ends = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu"), device)
    if all(a[1] == b[0] for a, b in pairwise(spans)):
        return Rows(slice(spans[0][0], spans[-1][1]), ends, max(lengths))
    index = torch.cat([torch.arange(start, stop, device="cpu") for start, stop in spans])
    return Rows(to_device(index, device), ends, max(lengths))


class _VarlenAttention(torch.autograd.Function):
    """Softmax attention over parts of the keys, merged exactly.

    With s the scores of a query and Z = Σ exp(s) over all of its keys, part p gives o_p and log Z_p, where Z_p is the
    sum over that part's keys alone. Then log Z = log Σ_p Z_p and o = Σ_p (Z_p / Z) o_p. A sink (gpt-oss) is one more
    part: Z_p is exp(sink), and its o_p is zero.

    The gradient of score j is P_j (g · v_j - g · o) with P_j = exp(s_j - log Z), and that of v_j is P_j g. Both depend
    on the other parts through the merged o and log Z alone, which flash attention's backward kernel takes as arguments.
    So it is called for each part with the *merged* ones, and what it returns is that part's share of the exact
    gradient. A sink's score has the same gradient, with v = 0.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, parts: tuple[Part, ...], scale: float
    ) -> Tensor:
        """[T, H, D] of query [T, H, D], key and value [T, G, D], sinks [H]."""
        first, *others = parts
        out, log_z = _forward(query, key, value, first, scale)  # [T, H, D], [H, T]: every token is in one run
        wide = log_z.dtype
        if others:
            out = out.to(wide)  # rounded once, and not at each depth
        for part in others:
            rows = part.queries.index
            part_out, part_log_z = _forward(query, key, value, part, scale)
            both = torch.logaddexp(log_z[:, rows], part_log_z)
            out[rows] = out[rows].lerp(part_out.to(wide), (part_log_z - both).exp().T[..., None])
            log_z[:, rows] = both
        if sinks is not None:
            both = torch.logaddexp(log_z, sinks.to(wide)[:, None])
            out = out * (log_z - both).exp().T[..., None]
            log_z = both
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, log_z)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, log_z = ctx.saved_tensors
        first, *others = ctx.parts
        grads = _backward(grad, query, key, value, out, log_z, first, ctx.scale)
        for part in others:
            shares = _backward(grad, query, key, value, out, log_z, part, ctx.scale)
            places = (part.queries.index, part.keys.index, part.keys.index)
            for total, share, rows in zip(grads, shares, places, strict=True):
                total[rows] += share
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            probability = (sinks.to(log_z.dtype)[:, None] - log_z).exp()  # [H, T]
            toward = (grad.to(log_z.dtype) * out.to(log_z.dtype)).sum(-1).T  # g · o, [H, T]
            grad_sinks = -(probability * toward).sum(1).to(sinks.dtype)
        return *grads, grad_sinks, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
    """(output [t, H, D], log-sum-exp [H, t] float32) of the part's t queries."""
    q, k = part.queries, part.keys
    return private_api.varlen_flash(
        query[q.index], key[k.index], value[k.index], q.ends, k.ends, q.longest, k.longest, part.causal, scale
    )


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_z: Tensor, part: Part, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The part's share of the gradients of its queries, keys and values."""
    q, k = part.queries, part.keys
    return private_api.varlen_flash_backward(
        grad[q.index], query[q.index], key[k.index], value[k.index], out[q.index], log_z[:, q.index].contiguous(),
        q.ends, k.ends, q.longest, k.longest, part.causal, scale,
    )  # fmt: skip
