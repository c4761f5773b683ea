"""Changes to a model as it is loaded: frozen parameters, RoPE scaling, more embeddings, 4-bit weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rap_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def check_patterns(patterns: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that is not a regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--model.policy.freeze: {pattern!r} is not a regular expression: {error}") from error


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose name contains a match of a pattern.

    Raises:
        ConfigError: a pattern matches no trainable parameter, or nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))  # a tied head has two names
    trainable = {name: p for name, p in named if p.requires_grad}
    for pattern in patterns:
        found = [p for name, p in trainable.items() if re.search(pattern, name)]
        if not found:
            untrained = any(re.search(pattern, name) for name, _ in named)
            why = "only parameters that are not trained anyway" if untrained else "no parameter"
            examples = ", ".join(list(trainable)[:: max(1, len(trainable) // 3)][:3])
            raise ConfigError(
                f"--model.policy.freeze: {pattern!r} matches {why}. Trained are {len(trainable)} parameters with "
                f"names such as {examples}."
            )
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in trainable.values()):
        raise ConfigError(f"--model.policy.freeze {list(patterns)} freezes everything: nothing is left to train.")


def check_rope(rope: dict[str, Any]) -> None:
    """Raise ConfigError for a RoPE scaling that is invalid for every model."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = rope.get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(
            f"--model.policy.rope: rope_type must be one of {', '.join(sorted(ROPE_INIT_FUNCTIONS))}, found {kind!r}. "
            "Example: {rope_type: yarn, factor: 4.0}"
        )
    factor = rope.get("factor")
    if factor is not None and not (isinstance(factor, int | float) and factor >= 1):
        raise ConfigError(f"--model.policy.rope: factor must be a number of at least 1, found {factor!r}")


def scale_rope(config: PretrainedConfig, rope: dict[str, Any], path: str) -> None:
    """Set the RoPE scaling of a model's config, keeping its base frequency.

    Raises:
        ConfigError: the model has no rotary positions, has one scaling per kind of layer, or the options don't fit.
    """
    text = config.get_text_config()
    now = getattr(text, "rope_parameters", None)
    if not now:
        raise ConfigError(f"--model.policy.rope has no effect: the model {path} has no rotary positions. Remove it.")
    if any(isinstance(value, dict) for value in now.values()):
        raise ConfigError(
            f"--model.policy.rope: {path} scales the positions of its kinds of layers differently "
            f"({', '.join(now)}), which one scaling would undo. Edit rope_parameters in its config.json."
        )
    if all(now.get(name) == value for name, value in rope.items()):
        raise ConfigError(f"--model.policy.rope has no effect: {path} is scaled like that already. Remove it.")
    kept = {name: now[name] for name in ("rope_theta", "partial_rotary_factor") if name in now}
    text.rope_parameters = {**kept, **rope}
    try:
        with _warnings_of("transformers.modeling_rope_utils") as said:  # it only warns, then computes wrong positions
            text.standardize_rope_params()
            text.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        said = [str(error)]
    if said:
        raise ConfigError(f"--model.policy.rope {rope}: {'; '.join(said)}")


@contextmanager
def _warnings_of(logger: str) -> Iterator[list[str]]:
    """Collect the warnings of a logger within a block, and keep them from other handlers."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, listener = logging.getLogger(logger), Listener(logging.WARNING)
    propagate, log.propagate = log.propagate, False
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)
        log.propagate = propagate


def resize_embeddings(model: PreTrainedModel, tokens: int, path: str) -> None:
    """Give the model an embedding for each of the tokenizer's tokens; new ones are the mean of the existing ones.

    With the mean a policy and its reference agree; random rows would differ.

    Raises:
        ConfigError: there are enough embeddings already.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if rows >= tokens:
        raise ConfigError(
            f"--model.policy.resize_embeddings has no effect: {path} has {rows:,} embeddings for the tokenizer's "
            f"{tokens:,} tokens. Remove it."
        )
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)
                if getattr(layer, "bias", None) is not None:
                    layer.bias[rows:] = layer.bias[:rows].float().mean().to(layer.bias.dtype)


def refuse_too_few_embeddings(model: PreTrainedModel, tokens: int, path: str, adapter: str | None = None) -> None:
    """Raise ConfigError where the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens and adapter is not None:
        raise ConfigError(
            f"adapter {adapter}: its tokenizer has {tokens:,} tokens, and it brings no embeddings for those beyond the "
            f"{rows:,} of {path}. Save the adapter with its embeddings (save_embedding_layers=True), or remove the "
            "tokenizer's files from its folder."
        )
    if rows < tokens:
        raise ConfigError(
            f"{path}: the tokenizer has {tokens:,} tokens and the model {rows:,} embeddings. Set "
            "--model.policy.resize_embeddings true to add rows for the others, or use the tokenizer that the model "
            "was trained with."
        )


def check_four_bit() -> None:
    """Raise ConfigError where bitsandbytes isn't installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "--model.policy.quantize needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave "
            "the option out."
        )


def four_bit(kind: str, dtype: torch.dtype) -> Any:
    """Return the config of 4-bit weights as in QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
