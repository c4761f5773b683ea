"""Models that never exist whole in one process.

A model is built on the meta device, where weights have a shape and no memory; sharded; and each rank reads from the
safetensors files those slices that it holds. What isn't in the files (rotary frequencies and the like) is computed by
the model's own code, and an adapter starts from the same random numbers as one on a model that was loaded whole.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rap_lightning.distributed.fsdp2 import Sharding, shard
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, PolicyConfig, _load, silence_dropout

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def load_sharded(config: PolicyConfig, dtype: torch.dtype, sharding: Sharding, *, trained: bool) -> tuple[Policy, str]:
    """The policy of ``config`` (or, not ``trained``, its bare model, frozen), sharded.

    Returns:
        The policy, and why each rank had to load it whole before sharding; empty where none had to.
    """
    model, why = blank_model(config, dtype)
    if config.lora is not None and trained and config.lora.use_dora:
        model, why = None, "DoRA starts from the norms of the base model's weights"
    files = {} if model is None else _Files.of(config)
    if model is not None and (lacking := sorted(_wanted(model) - set(files))):
        model, why = None, f"its files name weights otherwise than its code does ({lacking[0]})"
    if model is None:
        whole = config.load_initial(dtype)
    else:
        whole, model._weight_conversions = model, []  # written by the names that its files have
    if trained:
        random = torch.get_rng_state()
        policy = config.build(dtype, model=whole)
        if model is not None and policy.has_adapter:
            torch.set_rng_state(random)
            start_adapter(policy.model)
    else:
        policy = Policy(whole).requires_grad_(False).eval()
    shard(policy, sharding)
    if model is not None:
        _materialise(policy, sharding.home)
        _fill(policy.causal_lm, files)
    return policy, why


def blank_model(config: PolicyConfig, dtype: torch.dtype) -> tuple[Any, str]:
    """The bare causal LM with weights on the meta device and buffers that files don't hold computed on the CPU.

    Returns:
        The model, or None where that can't be done, and then why.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    for name in ("adapter", "quantize", "rope", "resize_embeddings"):
        if getattr(config, name):
            return None, f"policy.{name} changes the model that its files hold"
    source = config._source()
    model_config = _load("model config", config.path, AutoConfig, source)
    if not config.dropout:
        silence_dropout(model_config)
    if getattr(model_config, "quantization_config", None) is not None:
        return None, "its weights are quantised"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, **options)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"--model.policy.path {config.path}: no model can be built from its config: {error}"
        ) from error
    if not config.dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    model.tie_weights()
    # only where the folder has one: a model's own defaults are kept otherwise
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(config.path, revision=config.revision)
    _compute_buffers(model)
    if any(buffer.is_meta for _, buffer in model.named_non_persistent_buffers()):
        return None, "buffers of it can't be computed apart from its weights"
    model.eval()
    return model, ""


def _compute_buffers(model: Any) -> None:
    """Fill the buffers that no file holds, by the model's own initialisation; weights stay as they are."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent)._buffers[own] = torch.zeros_like(buffer, device="cpu")
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers then leaves it alone
    model.initialize_weights()


def _wanted(model: Any) -> set[str]:
    """Names of weights and buffers that files must hold; of tied ones, the name that they are stored by."""
    named = model.state_dict(keep_vars=True)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return set(named) - tied


class _Files(dict[str, Any]):
    """Slices of every tensor in a model's safetensors files, by name."""

    @classmethod
    def of(cls, config: PolicyConfig) -> _Files:
        """Opens the files, fetching them from the Hub first where need be."""
        from safetensors import safe_open
        from transformers.utils import cached_file

        found = cls()
        for path in _paths(config, cached_file):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 (not a dict)
                found[name] = file.get_slice(name)
        return found


def _paths(config: PolicyConfig, cached_file: Any) -> Iterator[str]:
    import json

    options = {"revision": config.revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(config.path, INDEX, **options)
    if index is None:
        single = cached_file(config.path, SINGLE, **options)
        if single is None:
            raise ConfigError(f"--model.policy.path {config.path}: there is neither {SINGLE} nor {INDEX} in it.")
        yield single
        return
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        yield cached_file(config.path, name, revision=config.revision)


def _materialise(policy: Policy, device: torch.device) -> None:
    """Give meta tensors memory, and leave the others (buffers, adapters) as they are."""
    policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


@torch.no_grad()
def _fill(model: Any, files: dict[str, Any]) -> None:
    """Copy each tensor's slice of this rank from the files; names of an adapter's wrappers are not in them."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = files.get(name.replace(".base_layer.", "."))
        if source is None:
            continue  # an adapter's own, or tied to one that is there
        shape = tuple(source.get_shape())
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"{name} has the shape {shape} in the model's files, and {tuple(tensor.shape)} in its config."
            )
        if not isinstance(tensor, DTensor):
            tensor.copy_(source[:] if shape else source[...])
            continue
        local = tensor.to_local()
        sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if math.prod(sizes):  # with more ranks than rows, some hold none
            local.copy_(source[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))])


def start_adapter(model: Any) -> None:
    """Draw the first weights of an adapter on a model without memory, as peft draws them on one with."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                base, dtype = layer.get_base_layer().weight.dtype, layer.lora_A[name].weight.dtype
                for part in (layer.lora_A[name], layer.lora_B[name]):
                    part.to_empty(device="cpu")
                    part.float().reset_parameters()  # peft's layers are born so, and the generator moves on by it
                layer.reset_lora_parameters(name, True)
                for part in (layer.lora_A[name], layer.lora_B[name]):
                    part.to(base).to(dtype)  # peft gives an adapter the base's dtype, then its own
