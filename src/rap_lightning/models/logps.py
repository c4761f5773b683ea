"""Response log-probabilities from hidden states: chunked over tokens, in float32, independent of layout and loss.

:class:`Head` holds the output layer and what a model does to its logits; :class:`_TokenLogps` computes. Another way to
compute (``F.linear_cross_entropy``, cut-cross-entropy) is a subclass of Head with its own ``token_logps``, chosen in
:meth:`Head.of`; ``model_checks.check_head`` then compares it with the model's own logits at every start.

Shape legend: N response tokens (M in a Batch), D hidden size, V vocabulary. No [B, T, V] and no [N, V] tensor ever
exists: logits are computed for one chunk of tokens at a time. Those of the first chunks, up to KEPT_BYTES, are kept for
the backward pass; the others are computed again.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rap_lightning.errors import ConfigError
from rap_lightning.models.autocast import autocast_dtype, without_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_BYTES = 256 * 2**20  # float32 logits computed at a time on a CPU
ACCELERATOR_CHUNK_BYTES = 2**30  # and elsewhere: each chunk's backward pass reads and writes the whole gradient of W
TILE = 128  # rows of a GPU's matrix product; a chunk of 523 rows would take the time of 640
KEPT_BYTES = 512 * 2**20  # float32 logits that one forward pass may keep for its backward pass
INVERTIBLE_CAP = 40.0  # soft cap up to which z can be recovered from e^(z - max): e^-80 is far from underflow
ROWS_IN_CACHE = 8  # of logits, on a CPU: 1.5 MB at 49,152 tokens, 8 MB at 256,000


def _active(layer: Any) -> Any:
    """Return the output layer that computes: an adapter may have a copy of its own (modules_to_save)."""
    if isinstance(layer, nn.Linear) or not hasattr(layer, "modules_to_save"):
        return layer
    off = layer.disable_adapters or not layer.active_adapters
    return layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]


class Head:
    """An output layer: hidden states h become logits softcap(scale * (h W^T + b)).

    Args:
        weight: [V, D].
        bias: [V] or ``None``.
        scale: factor on the logits (Cohere's ``logit_scale``; one over Granite's ``logits_scaling``).
        softcap: c in c * tanh(logits / c) (Gemma 2), or ``None``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float | None = None) -> None:
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """Return the head of a Hugging Face causal LM.

        Raises:
            ConfigError: the head isn't a plain linear layer (an adapter on it, say).
        """
        layer, config = _active(model.get_output_embeddings()), model.config.get_text_config()
        if not isinstance(layer, nn.Linear) or hasattr(layer, "base_layer"):
            raise ConfigError(
                f"{type(model).__name__}: expected a plain linear output layer, found {type(layer).__name__}. "
                "Leave the output layer out of the adapter's target_modules and trainable tokens."
            )
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return cls(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))

    def token_logps(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return log p(target | hidden), [N] float32 nats, of hidden [N, D] and target [N] int64."""
        logps: Tensor = _TokenLogps.apply(
            hidden, self.weight, self.bias, target, self.scale, self.softcap, self._compute_dtype(hidden),
            torch.is_grad_enabled(),
        )  # fmt: skip
        return logps

    @torch.no_grad()
    def log_collisions(self, hidden: Tensor) -> Tensor:
        """Return log Σ_v p(v | hidden)², [N] float32 nats, of hidden [N, D]; without gradient.

        The probability that two draws are the same token; its negative is the Rényi entropy of order 2.
        """
        compute = self._compute_dtype(hidden)
        wide = torch.float64 if compute == torch.float64 else torch.float32
        cast = self.weight.to(compute)
        found = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        for part in _chunks(len(hidden), self.weight.shape[0], wide, hidden.device):
            logits = _logits(hidden[part], cast, self.bias, self.scale, self.softcap, compute, wide)
            log_z = torch.logsumexp(logits, -1)
            found[part] = torch.logsumexp(2 * logits, -1) - 2 * log_z
        return found

    def _compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype of the matrix products: autocast's, or the weight's. Logits are float32 (float64) either way."""
        return autocast_dtype(hidden.device) or self.weight.dtype


class _TokenLogps(torch.autograd.Function):
    """The log-softmax of a linear layer's output at one target per row, with a backward pass of its own.

    Forward: logits z become e = exp(z - max) in place, and Z is the sum of e. The log-probability is the gathered logit
    minus log-sum-exp (max + log Z): log_softmax on a CPU has ten times the rounding error of this.

    Backward: with g the gradient of a token's log-probability, the gradient of its logits is -(g / Z) (e - Z onehot).
    The factor -(g / Z) is one number per token, so it is multiplied into the [N, D] side of both matrix products
    instead of the [N, V] side: no pass over the logits is made for it.

    Chunks that the forward pass did not keep are computed again, from the saved max, so that e is the same to the bit.
    With a soft cap the gradient also needs z, which is recovered from e where the cap is small enough.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        scale: float, softcap: float | None, compute: torch.dtype, keep: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if compute == torch.float64 else torch.float32
        cast = weight.to(compute)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        top, total = torch.empty_like(logps), torch.empty_like(logps)
        kept: dict[int, Tensor] = {}
        room = KEPT_BYTES if keep and (softcap is None or softcap <= INVERTIBLE_CAP) else 0
        for number, part in enumerate(_chunks(len(hidden), weight.shape[0], wide, hidden.device)):
            logits = _logits(hidden[part], cast, bias, scale, softcap, compute, wide)
            logps[part] = logits.gather(-1, target[part, None])[:, 0]
            _exponentiate(logits, top[part], total[part])
            room -= logits.nbytes
            if room >= 0:
                kept[number] = logits
        logps -= top + total.log()
        ctx.save_for_backward(hidden, weight, bias, target, top, total)
        ctx.scale, ctx.softcap, ctx.compute, ctx.kept = scale, softcap, compute, kept
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, top, total = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide = total.dtype
        # dtypes are chosen here, also where an autocast region is open around the backward pass
        with without_autocast(hidden.device):
            cast = weight.to(ctx.compute)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.empty(weight.shape, dtype=wide, device=weight.device) if need_weight else None
            grad_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if need_bias else None
            factor = grad * (-ctx.scale / total)
            parts = _chunks(len(hidden), weight.shape[0], wide, hidden.device)
            if grad_weight is not None and not parts:
                grad_weight.zero_()
            for number, part in enumerate(parts):
                powers, cap = ctx.kept.pop(number, None), None
                if powers is None:
                    powers = _logits(hidden[part], cast, bias, ctx.scale, ctx.softcap, ctx.compute, wide)
                    cap = _slope_of_cap(powers, ctx.softcap)
                    _exponentiate(powers, top[part], None)
                elif ctx.softcap is not None:
                    cap = _slope_of_cap(powers.log() + top[part, None], ctx.softcap)
                rows = factor[part, None]
                slopes = _to_slopes(powers, total[part, None], target[part, None], cap)
                if grad_bias is not None:
                    grad_bias += factor[part] @ slopes
                slopes = slopes.to(ctx.compute)
                if grad_hidden is not None:
                    grad_hidden[part] = (_product(slopes, cast, wide) * rows).to(hidden.dtype)
                if grad_weight is not None:
                    scaled = (hidden[part].to(wide) * rows).to(ctx.compute)
                    _add_product(grad_weight, slopes.T, scaled, first=number == 0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _exponentiate(logits: Tensor, top: Tensor, total: Tensor | None) -> None:
    """Replace logits by exp(logits - top) in place.

    Args:
        logits: [C, V].
        top: [C] their largest values: an output, or with ``total`` None an input.
        total: [C] an output, the sums of the exponentials.

    On a CPU a few rows are done at a time, which stay in its cache between the three passes.
    """
    rows = ROWS_IN_CACHE if logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), rows):
        some = slice(first, first + rows)
        if total is not None:
            torch.amax(logits[some], -1, out=top[some])
        logits[some].sub_(top[some, None]).exp_()
        if total is not None:
            torch.sum(logits[some], -1, out=total[some])


def _slope_of_cap(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Return the derivative of the soft cap at capped logits: 1 - (z / c)^2."""
    return None if softcap is None else (logits / softcap).square_().neg_().add_(1)


def _to_slopes(powers: Tensor, total: Tensor, target: Tensor, cap: Tensor | None) -> Tensor:
    """Return e - Z onehot, times the slope of the soft cap where there is one, in the memory of ``powers`` e."""
    powers.scatter_add_(-1, target, -total)
    return powers if cap is None else powers.mul_(cap)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add a @ b to ``total``, in place where the product can have its dtype, which saves a copy of the head's weight.

    At ``first`` the total is overwritten. bfloat16 products are summed in the total's float32.
    """
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif multiplies_into_float32(a.device, a.dtype) and total.dtype == torch.float32:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Return a @ b in ``wide``; where the device can, without rounding the sums to the operands' bfloat16 before.

    A logit of 20 is rounded by up to 0.06 in bfloat16, and its log-probability with it.
    """
    if wide == torch.float32 and multiplies_into_float32(a.device, a.dtype):
        product: Tensor = torch.mm(a, b, out_dtype=wide)
        return product
    return (a @ b).to(wide)


@cache
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies half-precision matrices into float32: torch 2.8 and newer, on CUDA. Tried."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    with without_autocast(device):
        try:
            a = torch.ones(16, 16, dtype=dtype, device=device)
            total = torch.full((16, 16), torch.nan, device=device)
            torch.addmm(total, a, a.T, beta=0, out_dtype=torch.float32, out=total)
            torch.addmm(total, a, a.T, beta=1, out_dtype=torch.float32, out=total)
            total += torch.mm(a, a, out_dtype=torch.float32)
        except (RuntimeError, TypeError):  # no kernel, or an older torch that doesn't know the argument
            return False
        return bool((total == 48).all())


def _chunks(count: int, vocabulary: int, dtype: torch.dtype, device: torch.device | None = None) -> list[slice]:
    row = vocabulary * dtype.itemsize
    size = max(1, CHUNK_BYTES // row)
    if device is not None and device.type != "cpu":
        size = max(TILE, ACCELERATOR_CHUNK_BYTES // row // TILE * TILE)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
    compute: torch.dtype, wide: torch.dtype,
) -> Tensor:  # fmt: skip
    logits = _product(hidden.to(compute), weight.T, wide)
    if bias is not None:
        logits += bias.to(wide)
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def sum_by_segment(token_logps: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Return the sums of [N] values by segment, [segments], in their dtype."""
    return token_logps.new_zeros(segments).index_add(0, segment, token_logps)
