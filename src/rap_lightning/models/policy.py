"""The policy: a causal LM as a function from a batch to response log-probabilities.

Read :meth:`Policy.forward` first: hidden states by the path that the batch's layout and the model allow, then the head
(:mod:`~rap_lightning.models.logps`) on the response tokens only. How a model is loaded: ``policy_config``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rap_lightning.batches.types import Batch, Forest
from rap_lightning.errors import ConfigError
from rap_lightning.models.activation_offload import activations_on_host
from rap_lightning.models.attention import forest_attention, packs_itself, sequence_lengths
from rap_lightning.models.logps import Head, sum_by_segment
from rap_lightning.models.private_api import one_sequence_per_row, skip_adapter, uses_adapter
from rap_lightning.models.router_loss import Routed, no_routers, router_loss, sequences_of_tokens
from rap_lightning.models.token_strength import at_strength, attach

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Policy(nn.Module):
    """A causal LM as a function from a batch to response log-probabilities.

    The head runs inside ``forward``, so that FSDP2 and other sharding strategies gather its weight as they do for any
    module.

    Attributes:
        model: the Hugging Face model, or the peft model around it.
        shares: whether sequences can share a forward pass (``model_checks.check_sharing``); else one at a time.
        attention: how attention over sequences in one row is computed, as found by ``model_checks.check_sharing``.
        checkpoints: whether activations are computed again in the backward pass.
        computes_on: where it computes, if sharded weights can be stored elsewhere.
        balances: whether the load-balancing loss of a mixture of experts is computed.
        router_loss: that loss of the last batch, [] float32.
    """

    def __init__(self, model: Any, *, offload: bool = False) -> None:
        super().__init__()
        self.model, self.offload = model, offload
        if self.has_adapter:
            attach(model)
        self.shares = True
        self.attention: list[str] = []
        self.checkpoints = False
        self.computes_on: torch.device | None = None
        self.balances = False
        self.router_loss: Tensor | None = None
        self._routed: list[Routed] = []

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The Hugging Face model, without an adapter's wrapper."""
        lm: PreTrainedModel = self.model.get_base_model() if self.has_adapter else self.model
        return lm

    @property
    def has_adapter(self) -> bool:
        """Whether a peft adapter is attached."""
        return hasattr(self.model, "peft_config")

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.computes_on or next(self.parameters()).device

    def gathered(self, function: Callable[[], Tensor]) -> Tensor:
        """Call ``function`` while the sharded weights outside of the layers are gathered.

        FSDP2 gathers the root's weights in a hook around ``forward``, so the call has to go through it.
        """
        return self(None, inside=function)  # type: ignore[no-any-return]

    def forward(
        self, batch: Batch | None, *, collisions: bool = False, inside: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Return the log-probability of each response token, [M] float32 nats.

        Args:
            batch: None with ``inside`` only.
            collisions: return [2, M], with log Σ_v p(v)² in the second row. It has no gradient, and costs the head's
                forward pass once more.
            inside: called in the place of everything else, for :meth:`gathered`.
        """
        if inside is not None:
            return inside()
        assert batch is not None, "a batch, or something to call"
        offloading = activations_on_host() if self.offload and torch.is_grad_enabled() else nullcontext()
        with offloading, at_strength(batch.strength):
            self._routed = []
            hidden = self._hidden_of_batch(batch)
        if self.balances:
            top_k = self.causal_lm.config.get_text_config().num_experts_per_tok
            self.router_loss, self._routed = router_loss(self._routed, top_k), []
        hidden, head = hidden.flatten(0, 1)[batch.predict_from], Head.of(self.causal_lm)
        token_logps = head.token_logps(hidden, batch.target)
        return torch.stack((token_logps, head.log_collisions(hidden.detach()))) if collisions else token_logps

    def _hidden_of_batch(self, batch: Batch) -> Tensor:
        """[R, T, D]."""
        counts = sequences_of_tokens(batch) if self.balances and (self.shares or batch.forest is None) else None
        if batch.forest is None:
            # no attention mask: padding is on the right, where causality hides it, and without a mask attention takes
            # its fastest kernel
            return self.hidden(batch.input_ids, batch.position_ids, counts)
        if self.shares:
            config = self.causal_lm.config.get_text_config()
            if packs_itself(config, batch.forest):
                return self.hidden(batch.input_ids, batch.position_ids, counts, **sequence_lengths(batch.forest))
            with forest_attention(config):
                return self.hidden(batch.input_ids, batch.position_ids, counts, forest=batch.forest)
        return self._hidden_by_path(batch, batch.forest)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, counts: Tensor | None = None, **options: Any) -> Tensor:
        """Return the last layer's hidden states, [R, T, D], of ids and positions [R, T] int64.

        Each row is one sequence, unless ``options`` describe a forest. ``counts``, [R * T], is how many sequences each
        token counts for in the load-balancing loss; by default one.
        """
        body = self.causal_lm.base_model
        if self.balances:
            options["output_router_logits"] = True
        with one_sequence_per_row():
            output = body(input_ids=input_ids, position_ids=position_ids, use_cache=False, **options)
        if self.balances:
            logits = getattr(output, "router_logits", None)
            if not logits:
                raise no_routers(type(self.causal_lm).__name__)
            flat = tuple(layer.flatten(0, -2) for layer in logits)
            self._routed.append((flat, flat[0].new_ones(len(flat[0])) if counts is None else counts))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _hidden_by_path(self, batch: Batch, forest: Forest) -> Tensor:
        """[1, T, D]: each path through the model on its own; what paths share is computed for each of them."""
        hidden: Tensor | None = None
        paths = list(forest.paths)
        if self.computes_on is not None:  # ranks gather every layer together, so each must run as many passes
            paths += paths[-1:] * (most_on_any_rank(len(paths), self.device) - len(paths))
        for path in paths:
            places = torch.cat([torch.arange(*span, device=batch.input_ids.device) for span in path])
            with at_strength(None if batch.strength is None else batch.strength[:, places]):
                one = self.hidden(batch.input_ids[:, places], batch.position_ids[:, places])
            if hidden is None:
                hidden = one.new_zeros(1, batch.input_ids.shape[1], one.shape[-1])
            hidden = hidden.index_copy(1, places, one)
        assert hidden is not None, "a batch has at least one response"
        return hidden

    def logps(self, batch: Batch) -> Tensor:
        """Return the log-probability of each response, [2B] float32 nats."""
        return sum_by_segment(self(batch), batch.segment, len(batch.lengths))


def of_adapter(name: str) -> bool:
    """Return whether a parameter of this name belongs to the adapter, trained or frozen, and not to the base model."""
    return ".lora_" in name or ".modules_to_save." in name


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that the model repeats: the longest list of modules that is in no other such list.

    Lists inside of another one are the experts of a mixture. On 35 architectures of transformers 5.24 these are the
    layers that its own (private) lists for sharding name.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [one for name, one in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return list(max(outer, key=len, default=[]))


def compile_layers(policy: Policy) -> None:
    """Compile every decoder layer; they run the same code, so the compiler works once.

    Lengths are symbols in what is compiled, so that no batch compiles anew, and attention over a forest is left out.
    Where activations are computed again in the backward pass, the parts of a layer are compiled, each on its own: the
    compiler doesn't support the context manager (``context_fn``) of the recomputation.

    Raises:
        ConfigError: the model has no list of layers.
    """
    layers = decoder_layers(policy)
    if not layers:
        raise ConfigError(
            f"--model.policy.compile: {type(policy.causal_lm).__name__} has no list of layers to compile. Leave it out."
        )
    for layer in layers:
        for part in layer.children() if policy.checkpoints else [layer]:
            part.compile(dynamic=True)


def most_on_any_rank(count: int, device: torch.device) -> int:
    """Return the largest ``count`` of all ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    most = torch.tensor(count, device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


@contextmanager
def evaluating(policy: Policy) -> Iterator[None]:
    """Put the policy in evaluation mode, without dropout, within a block."""
    training = [module for module in _all_modules(policy) if module.training]
    # ``Module.train`` goes through ``Module.__setattr__``, which takes 45 ms for an 8B model with an adapter
    for module in training:
        module.__dict__["training"] = False
    try:
        yield
    finally:
        for module in training:
            module.__dict__["training"] = True


@contextmanager
def adapters_off(policy: Policy) -> Iterator[None]:
    """Leave the policy's adapter out within a block.

    peft's ``disable_adapter`` also visits every weight of the adapter, to stop its gradient and to start it again, and
    so takes 93 ms for an 8B model; it even starts the gradient of what was frozen.
    """
    layers = [module for module in _all_modules(policy) if uses_adapter(module)]
    for layer in layers:
        skip_adapter(layer, True)
    try:
        yield
    finally:
        for layer in layers:
            skip_adapter(layer, False)


def _all_modules(policy: Policy) -> list[nn.Module]:
    """Return the policy and all modules below it; ``Module.modules``, a generator per level, takes four times that."""
    found: list[nn.Module] = [policy]
    for module in found:  # which grows while it is read
        found.extend(child for child in module._modules.values() if child is not None)
    return found
