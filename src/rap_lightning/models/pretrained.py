"""Load from a Hugging Face folder or Hub id: :func:`load_pretrained` for anything, :func:`load_weights` for models.

Every model is loaded through :func:`load_weights`. ``from_pretrained`` draws weights at random where a checkpoint lacks
them, and ignores those that the model has no place for; it only prints a table. Here both are errors.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rap_lightning.errors import ConfigError, first_line, join_some
from rap_lightning.models.private_api import ignored_on_load
from rap_lightning.preferences.sources import refuse_no_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NO_WEIGHTS = re.compile(r"(^|[._])(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|_extra_state)$")
"""Buffers that older versions of models stored: they are computed, and hold nothing that was trained."""

NUMBERS = re.compile(r"eps(ilon)?$|_act$|activation|rope|softcapping|sliding_window$")
"""Values of a config that change what a model computes, though its weights load without them."""


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class OtherWeights(ConfigError):
    """A checkpoint doesn't hold exactly the weights of the model that its config describes."""


def load_pretrained(
    what: str, path: str, load: Callable[..., Any], options: dict[str, Any], option: str = "--model.policy.path"
) -> Any:  # fmt: skip
    """Call ``load``, a ``from_pretrained`` or :func:`load_weights`, and turn its errors into one of ours.

    ``option`` names the model in messages.

    Raises:
        ConfigError: nothing can be loaded from ``path``.
    """
    refuse_no_model(option, path)
    try:
        return load(path, **options)
    except (OtherWeights, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files fail in any way: tokenizers raises Exception itself
        reason = first_line(error).strip()[:300]
        if not reason or not isinstance(error, OSError | ValueError | ImportError):
            reason = f"{type(error).__name__}: {reason}"
        where = "the folder exists, but" if Path(path).is_dir() else "not a folder here, and"
        advice = "Expected a Hugging Face folder (config.json, *.safetensors, tokenizer.json) or a Hub id."
        if "trust_remote_code" in str(error) and not options.get("trust_remote_code"):
            advice = f"It brings code of its own: {trust_option(option)} true, if you trust its authors."
        raise ConfigError(f"{option} {path}: {where} no {what} could be loaded from it: {reason} {advice}") from error


def trust_option(option: str) -> str:
    """Return the option that lets a model's own code run, for the option that names the model."""
    section = option.rpartition(".")[0]
    return f"{section}.trust_remote_code" if section else "--trust_remote_code"


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
    revision = options.get("revision")
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
        gaps = _missing_experts(path, revision) or _missing_four_bit(path, revision)
        gaps = gaps or _missing_layers(factory, path, options)
        named = f"these are missing: {join_some(gaps)}." if gaps else f"some may be missing. {error}"
        raise ValueError(f"its weights can't be put together, {named}") from error
    finally:
        logging.set_verbosity(verbosity)
    found["unexpected_keys"] = set(found["unexpected_keys"]) - _zero_biases(model, path, revision)
    names = [
        name for name in unexpected_weights(model, found["unexpected_keys"]) if not (unused and re.search(unused, name))
    ]
    shapes = [f"{name} {list(stored)} instead of {list(own)}" for name, stored, own in sorted(found["mismatched_keys"])]
    if getattr(model, "hf_quantizer", None) is not None:  # without any states, packed bytes are loaded as plain weights
        found["missing_keys"] = {*found["missing_keys"], *_missing_four_bit(path, revision)}
    parts = {"missing": sorted(found["missing_keys"]), "unexpected": names, "of another shape": shapes}
    if any(parts.values()):
        facts = "; ".join(f"{len(part)} {kind} ({join_some(part)})" for kind, part in parts.items() if part)
        raise OtherWeights(
            f"{option} {path}: its files don't hold the weights of a {type(model).__name__} with its config.json: "
            f"{facts}. transformers would draw missing ones at random and ignore unexpected ones. Restore the files, "
            "or correct config.json (number of layers, tie_word_embeddings, architecture)."
        )
    if whole := stored_whole(model, _tensors(path, revision)):
        raise OtherWeights(
            f"{option} {path}: {len(whole)} weights are stored as {', '.join(sorted(set(whole.values())))} and not as "
            f"fractions ({join_some(sorted(whole))}), which cuts off what is behind the point. Restore the files."
        )
    if broken := [name for name, p in model.named_parameters() if not finite(p)]:
        raise not_finite_files(option, path, broken)
    return model


def not_finite_files(option: str, path: str, names: list[str]) -> OtherWeights:
    """Return the error to raise for weights that aren't all numbers."""
    return OtherWeights(
        f"{option} {path}: {len(names)} weights have values that are infinite or not a number ({join_some(names)}). "
        "The files are damaged, or of a run that diverged. Use others."
    )


def finite(values: torch.Tensor) -> bool:
    """Return whether all values are numbers, by their extremes: that takes no copy of them."""
    if values.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not values.numel():
        return True
    return all(bool(one.isfinite()) for one in values.detach().aminmax())


def weight_files(path: str, revision: str | None) -> list[Path]:
    """Return the safetensors files that transformers reads, downloaded from the Hub first if needed; [] without any.

    They are what config.json names as transformers_weights, else model.safetensors, else those that its index names.
    """
    from transformers.utils import cached_file

    def fetched(name: str) -> Path | None:
        try:
            return Path(str(cached_file(path, name, revision=revision)))
        except OSError:
            return None

    config = fetched("config.json")
    named = None if config is None else json.loads(config.read_text(encoding="utf-8")).get("transformers_weights")
    for name in [named] if named else [SINGLE, INDEX]:
        if (file := fetched(name)) is None:
            continue
        if not name.endswith(".index.json"):
            return [file]
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        near = [file.parent / shard for shard in shards]
        return [one if one.is_file() else Path(str(cached_file(path, one.name, revision=revision))) for one in near]
    return []


def _tensors(path: str, revision: str | None) -> Iterator[tuple[str, Any]]:
    """Yield the name of each tensor of a checkpoint, with the slice of safetensors that reads it."""
    from safetensors import safe_open

    for file in weight_files(path, revision):
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


def stored_whole(model: PreTrainedModel, tensors: Iterable[tuple[str, Any]]) -> dict[str, str]:
    """Return name and type of the weights that are stored as integers, though the model isn't quantised.

    transformers converts everything it reads to the dtype that is asked for.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return {}
    own = {name.rpartition("model.")[2] for name, _ in model.named_parameters()}
    kinds = ((name, tensor.get_dtype()) for name, tensor in tensors)
    return {
        name: kind for name, kind in kinds
        if not kind.startswith(("F", "BF")) and name.rpartition("model.")[2] in own
    }  # fmt: skip


def check_config_names(path: str, config: PretrainedConfig) -> list[str]:
    """Compare the names in a folder's config.json with those that its class reads.

    Returns:
        What is missing of the values that change the numbers of a model and not its shapes.

    Raises:
        ConfigError: a name that isn't known, of which one that is missing differs in a letter.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        return []
    stored = json.loads(file.read_text(encoding="utf-8"))
    known = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    other = {name for pair in type(config).attribute_map.items() for name in pair}
    missing = known - set(stored)
    for name in set(stored) - known - other:
        if near := [one for one in missing if _one_letter_apart(name, one)]:
            raise ConfigError(
                f"--model.policy.path {path}: config.json has {name}, which {type(config).__name__} doesn't know, and "
                f"lacks {near[0]}, whose default would be used. Correct the name."
            )
    written = " ".join(stored)
    return sorted(
        f"{name} {getattr(config, name)}" for name in missing
        if (found := NUMBERS.search(name)) and found[0] not in written
    )  # fmt: skip


def _one_letter_apart(one: str, other: str) -> bool:
    """Return whether two names differ in one letter that is added, removed or changed, or in capitals only."""
    short, long = sorted((one.lower(), other.lower()), key=len)
    if short == long:
        return True
    if len(long) - len(short) > 1:
        return False
    start = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
    return short[start + (len(short) == len(long)) :] == long[start + 1 :]


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
