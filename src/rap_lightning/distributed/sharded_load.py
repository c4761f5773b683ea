"""Load a model that never exists whole in one process.

It is built on the meta device, where weights have a shape and no memory (:func:`blank_model`), and sharded; then each
rank reads the slices that it holds from the safetensors files (:func:`load_sharded`). What isn't in the files (rotary
frequencies and the like) is computed by the model's own code, and a new adapter starts from the same random numbers as
one on a model that was loaded whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from rap_lightning.distributed.fsdp2 import Sharding, shard
from rap_lightning.distributed.gather import gathered
from rap_lightning.errors import ConfigError
from rap_lightning.models.alterations import refuse_too_few_embeddings
from rap_lightning.models.policy import Policy
from rap_lightning.models.policy_config import PolicyConfig, silence_dropout_layers
from rap_lightning.models.pretrained import (
    INDEX,
    SINGLE,
    check_generation_config,
    finite,
    not_finite_files,
    stored_whole,
    unexpected_weights,
    weight_files,
)
from rap_lightning.models.private_api import save_under_own_names, skip_initialization


def load_sharded(config: PolicyConfig, dtype: torch.dtype, sharding: Sharding, *, trained: bool) -> tuple[Policy, str]:
    """Return the policy of ``config``, sharded; a reference is not ``trained``: frozen, and without a new adapter.

    Returns:
        The policy, and why each rank had to load it whole before sharding; empty where none had to.
    """
    model, why = blank_model(config, dtype)
    if config.lora is not None and trained and config.lora.use_dora:
        model, why = None, "DoRA starts from the norms of the base model's weights"
    files = {} if model is None else _open_files(config)
    if model is not None and (lacking := sorted(_wanted(model) - set(files))):
        model, why = None, f"its files use other weight names than its code ({lacking[0]})"
    if model is not None and (unknown := unexpected_weights(model, files)):
        model, why = None, f"its files hold weights that its code doesn't name ({unknown[0]})"
    if model is not None and stored_whole(model, files.items()):
        model, why = None, "its files hold integers"  # which the whole load refuses
    if model is None:
        whole = config.load_initial(dtype)
    else:
        whole = model
        refuse_too_few_embeddings(model, len(config.load_tokenizer()), config.path)
        save_under_own_names(model)
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
        _fill(policy.causal_lm, files, config.path)
    return policy, why


def blank_model(config: PolicyConfig, dtype: torch.dtype) -> tuple[Any, str]:
    """Build the bare causal LM with weights on the meta device, and buffers that files don't hold on the CPU.

    Returns:
        The model, or None where that can't be done, and then why.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    for name in ("adapter", "quantize", "rope", "resize_embeddings"):
        if getattr(config, name):
            return None, f"policy.{name} changes the model that its files hold"
    model_config = config.load_config()
    if getattr(model_config, "quantization_config", None) is not None:
        return None, "its weights are quantised"
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, **options)
    except (ValueError, ImportError) as error:
        if config.attn_implementation and "attention" in str(error).lower():
            raise config.no_such_attention(error) from error
        raise ConfigError(
            f"--model.policy.path {config.path}: no model can be built from its config: {error}"
        ) from error
    if not config.dropout:
        silence_dropout_layers(model)
    model.tie_weights()
    try:
        check_generation_config(config.path)
        model.generation_config = GenerationConfig.from_pretrained(config.path, revision=config.revision)
    except OSError:
        pass  # a model without such a file keeps its own defaults
    except ValueError as error:
        raise ConfigError(
            f"--model.policy.path {config.path}: its generation_config.json is invalid: {error}"
        ) from error
    _compute_buffers(model)
    if any(buffer.is_meta for _, buffer in model.named_non_persistent_buffers()):
        return None, "some of its buffers can't be computed without its weights"
    model.eval()
    return model, ""


def _compute_buffers(model: Any) -> None:
    """Compute the buffers that no file holds by the model's own initialisation, and leave weights as they are."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        parent, _, own = name.rpartition(".")
        model.get_submodule(parent).register_buffer(own, torch.zeros_like(buffer, device="cpu"), persistent=False)
    skip_initialization(model.state_dict(keep_vars=True).values())
    model.initialize_weights()


def _wanted(model: Any) -> set[str]:
    """Return the names of weights and buffers that files must hold; of tied ones, the name they are stored under."""
    return set(model.state_dict(keep_vars=True)) - set(getattr(model, "all_tied_weights_keys", None) or ())


def _open_files(config: PolicyConfig) -> dict[str, Any]:
    """Open a model's safetensors files, downloaded from the Hub first if needed; lazy slices of tensors by name."""
    from safetensors import SafetensorError, safe_open

    found = {}
    paths = weight_files(config.path, config.revision)
    if not paths:
        raise ConfigError(f"--model.policy.path {config.path}: there is neither {SINGLE} nor {INDEX} in it.")
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ConfigError(f"--model.policy.path {config.path}: {path} can't be read: {error}") from error
        for name in file.keys():  # noqa: SIM118 (not a dict)
            found[name] = file.get_slice(name)
    return found


def _materialise(policy: Policy, device: torch.device) -> None:
    """Allocate memory for meta tensors, and leave the others (buffers, adapters) as they are."""
    policy._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)


@torch.no_grad()
def _fill(model: Any, files: dict[str, Any], path: str) -> None:
    """Copy this rank's slice of each tensor from the files, whose names are those without peft's wrappers.

    All ranks must call it, and all raise the error of one that finds values which are no numbers.
    """
    broken: list[str] = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        source = files.get(name.replace(".base_layer.", "."))
        if source is None:
            continue  # an adapter's own, or tied to one that is in the files
        shape = tuple(source.get_shape())
        if shape != tuple(tensor.shape):
            raise ConfigError(
                f"--model.policy.path {path}: {name} has the shape {shape} in the model's files, and "
                f"{tuple(tensor.shape)} in its config."
            )
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if local.numel():  # with more ranks than rows, some hold none
            local.copy_(source[_local_slice(tensor) if isinstance(tensor, DTensor) else ...])
        if not finite(local):
            broken.append(name)
    if found := sorted({name for names in gathered(broken) for name in names}):
        error = not_finite_files("--model.policy.path", path, found)
        error.on_all_ranks, error.saves = True, False
        raise error


def _local_slice(tensor: DTensor) -> tuple[slice, ...]:
    """Return the slice of the whole tensor that this rank holds: as ``torch.chunk`` divides it along the mesh."""
    parts = [slice(0, size) for size in tensor.shape]
    for number, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # one dimension of the mesh at most; FSDP2 replicates over the others
            chunk = math.ceil(tensor.shape[placement.dim] / tensor.device_mesh.size(number))
            start = chunk * tensor.device_mesh.get_local_rank(number)
            parts[placement.dim] = slice(start, min(start + chunk, tensor.shape[placement.dim]))
    return tuple(parts)


def start_adapter(model: Any) -> None:
    """Draw the first weights of an adapter on a model without memory, as peft draws them on one with memory.

    peft creates and initialises a layer's factors in float32, then casts them to the base's dtype and back to their
    own. Every step is repeated, so that the random number generator advances alike and roundings are the same.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                base, dtype = layer.get_base_layer().weight.dtype, layer.lora_A[name].weight.dtype
                for part in (layer.lora_A[name], layer.lora_B[name]):
                    part.to_empty(device="cpu")
                    part.float().reset_parameters()
                layer.reset_lora_parameters(name, True)
                for part in (layer.lora_A[name], layer.lora_B[name]):
                    part.to(base).to(dtype)
