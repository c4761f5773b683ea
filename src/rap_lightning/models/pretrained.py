"""Load from a Hugging Face folder or Hub id: :func:`load_pretrained` for anything, :func:`load_weights` for models.

Every model is loaded through :func:`load_weights`. ``from_pretrained`` draws weights at random where a checkpoint lacks
them, and ignores those that the model has no place for; it only prints a table. Here both are errors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rap_lightning.errors import ConfigError, join_some
from rap_lightning.models.private_api import ignored_on_load
from rap_lightning.preferences.sources import refuse_no_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_WEIGHTS = re.compile(r"(^|[._])(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|_extra_state)$")
"""Buffers that older versions of models stored: they are computed, and hold nothing that was trained."""


class OtherWeights(ConfigError):
    """A checkpoint doesn't hold exactly the weights of the model that its config describes."""


def load_pretrained(what: str, path: str, load: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Call ``load`` and turn its errors into one of ours.

    Args:
        what: is loaded, for the message.
        path: a folder or Hub id.
        load: ``from_pretrained`` of an Auto class of transformers, or :func:`load_weights` with one.
        options: of ``from_pretrained``.

    Raises:
        ConfigError: nothing can be loaded from ``path``.
    """
    refuse_no_model("--model.policy.path", path)
    try:
        return load(path, **options)
    except OtherWeights:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        where = "the folder exists, but" if Path(path).is_dir() else "not a folder here, and"
        raise ConfigError(
            f"--model.policy.path {path}: {where} no {what} could be loaded from it: {reason} "
            "Expected a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a Hub id."
        ) from error


def load_weights(factory: Any, option: str, unused: str | None, path: str, **options: Any) -> PreTrainedModel:
    """Load a model, and make sure that each of its weights comes from the checkpoint.

    Args:
        factory: an Auto class of transformers.
        option: names the model, for messages.
        unused: a regular expression of weights that the checkpoint may hold and the model doesn't use.
        path: a folder or Hub id.
        options: of ``from_pretrained``.

    Raises:
        OtherWeights: weights are missing, unexpected, or of another shape.
        ValueError: the files can't be read.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    check_generation_config(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights: ours names them
    try:
        # with `ignore_mismatched_sizes`, shapes are returned and can be named instead of raising a bare RuntimeError
        model, found = factory.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True, **options
        )
    except torch.OutOfMemoryError:
        raise
    except SafetensorError as error:  # a truncated file
        raise ValueError(str(error)) from error
    except RuntimeError as error:  # one expert of several can't be joined, an integer weight can't be drawn at random
        gaps = _missing_experts(path, options.get("revision")) or _missing_four_bit(path, options.get("revision"))
        gaps = gaps or _missing_layers(factory, path, options)
        named = f"these are missing: {join_some(gaps)}." if gaps else f"some may be missing. {error}"
        raise ValueError(f"its weights can't be put together, {named}") from error
    finally:
        logging.set_verbosity(verbosity)
    found["unexpected_keys"] = set(found["unexpected_keys"]) - _zero_biases(model, path, options.get("revision"))
    names = [
        name for name in unexpected_weights(model, found["unexpected_keys"]) if not (unused and re.search(unused, name))
    ]
    shapes = [f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in sorted(found["mismatched_keys"])]
    if getattr(model, "hf_quantizer", None) is not None:  # without any states, packed bytes are loaded as plain weights
        found["missing_keys"] = {*found["missing_keys"], *_missing_four_bit(path, options.get("revision"))}
    parts = {"missing": sorted(found["missing_keys"]), "unexpected": names, "of another shape": shapes}
    if any(parts.values()):
        facts = "; ".join(f"{len(part)} {kind} ({join_some(part)})" for kind, part in parts.items() if part)
        raise OtherWeights(
            f"{option} {path}: its files don't hold the weights of a {type(model).__name__} with its config.json: "
            f"{facts}. transformers would draw missing ones at random and ignore unexpected ones. Restore the files, "
            "or correct config.json (number of layers, tie_word_embeddings, architecture)."
        )
    if broken := [name for name, p in model.named_parameters() if not _finite(p)]:
        raise OtherWeights(
            f"{option} {path}: {len(broken)} weights have values that are infinite or not a number ({join_some(broken)}"
            "). The files are damaged, or of a run that diverged. Use others."
        )
    return model


def _finite(values: torch.Tensor) -> bool:
    """Return whether all values are numbers, by their extremes: that takes no copy of them."""
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not values.numel():
        return True
    return all(bool(one.isfinite()) for one in values.detach().aminmax())


def _tensors(path: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the name of each tensor of a checkpoint, with the slice of safetensors that reads it."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    for file in sorted(Path(str(cached_file(path, "config.json", revision=revision))).parent.glob("*.safetensors")):
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118 (not a dict)
                yield name, content.get_slice(name)


def _zero_biases(model: Any, path: str, revision: str | None) -> set[str]:
    """Return the biases that are zero, which GPTQ and AWQ write for quantised layers that have none."""
    if getattr(model, "hf_quantizer", None) is None:
        return set()
    return {name for name, tensor in _tensors(path, revision) if name.endswith(".bias") and not tensor[:].any()}


def _missing_experts(path: str, revision: str | None) -> list[str]:
    """Return the names of the tensors of experts that are left out among those that a checkpoint has."""
    found: dict[tuple[str, str], set[int]] = {}
    for name, _ in _tensors(path, revision):
        if expert := re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name):
            found.setdefault((expert[1], expert[3]), set()).add(int(expert[2]))
    count = max((max(numbers) for numbers in found.values()), default=-1) + 1
    return [f"{a}{n}{b}" for (a, b), numbers in sorted(found.items()) for n in range(count) if n not in numbers]


def _missing_four_bit(path: str, revision: str | None) -> list[str]:
    """Return the names of the tensors that are left out of 4-bit weights (bitsandbytes), which all have the same parts.

    Those are the packed bytes, the scales (``absmax``), the table of values and the state, and more where scales are
    quantised too.
    """
    found: dict[str, set[str]] = {}
    for name, tensor in _tensors(path, revision):
        if part := re.fullmatch(
            r"(.*\.weight)(\.(?:nested_)?(?:absmax|quant_map)|\.quant_state\.bitsandbytes__\w+)", name
        ):
            found.setdefault(part[1], set()).add(part[2])
        elif name.endswith(".weight") and tensor.get_dtype() == "U8":
            found.setdefault(name, set()).add("")
    parts = {"", ".absmax", ".quant_map"}.union(*found.values())
    if not any("quant_state" in part for part in parts):
        parts.add(".quant_state.bitsandbytes__nf4")
    return [name + part for name, own in sorted(found.items()) for part in sorted(parts - own)]


def _missing_layers(factory: Any, path: str, options: dict[str, Any]) -> list[str]:
    """Return the parameters that a checkpoint lacks, or [] where it has other names altogether."""
    from transformers import AutoConfig

    hub = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(path, **hub)
    with torch.device("meta"):
        code = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
        own = [name for name, _ in factory.from_config(config, **code).named_parameters()]
    stored = {name for name, _ in _tensors(path, options.get("revision"))}
    missing = sorted(set(own) - stored)
    return missing if len(missing) < len(own) / 2 else []


def check_generation_config(path: str) -> None:
    """Raise ValueError for a generation config that is no JSON object; transformers ignores what isn't JSON."""
    file = Path(path) / "generation_config.json"
    if not file.is_file():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is not JSON: {error}. Restore or remove it.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds {type(found).__name__} instead of options. Restore or remove it.")


def unexpected_weights(model: Any, names: Iterable[str]) -> list[str]:
    """Return those of the names of a checkpoint's tensors that ``model`` doesn't have and should.

    transformers knows of each architecture what may be left out, such as the heads for speculative decoding. The
    scales and zero points of a quantised layer belong to that layer; a bias is a weight of its own.
    """
    ignored = [NO_WEIGHTS.pattern, *ignored_on_load(model)]
    layers: set[str] = set()
    if getattr(model, "hf_quantizer", None) is not None:
        layers = {name for name, module in model.named_modules() if name and not any(module.children())}
    own = set(model.state_dict(keep_vars=True))
    return sorted(
        name for name in set(names) - own
        if not any(re.search(pattern, name) for pattern in ignored)
        and (name.endswith(".bias") or not any(name.startswith(f"{layer}.") for layer in layers))
    )  # fmt: skip


def refuse_quantised(config: PretrainedConfig, path: str) -> None:
    """Raise ConfigError where a checkpoint's weights are quantised, and would all have to be trained."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    settings = found if isinstance(found, dict) else found.to_dict()
    if settings.get("dequantize"):
        return
    bits = "4-bit " if settings.get("load_in_4bit") else ""
    raise ConfigError(
        f"--model.policy.path {path}: its weights are quantised ({bits}{settings.get('quant_method', 'unknown')}), and "
        "such weights can't be trained. Set --model.policy.lora.r to train an adapter, or name the model in full "
        "precision."
    )
