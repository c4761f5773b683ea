"""Models with random weights and pairs of a given length for gpu.py: nothing is downloaded."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rap_lightning.models.policy_config import PolicyConfig, silence_dropout
from rap_lightning.world.base_model import END, train_tokenizer

WORDS = ("cat", "tree", "blue", "run", "seven", "soft", "north", "paper", "glass", "slow", "river", "stone")
MOST_TOKENS = 16384
"""Positions that a model is made for."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Attributes:
        name: as in the tables.
        family: of transformers' configs.
        sizes: arguments of the config.
    """

    name: str
    family: str
    sizes: dict[str, Any]

    def config(self, vocabulary: int) -> Any:
        """Return the config, with at least this vocabulary."""
        import transformers

        sizes = {"max_position_embeddings": MOST_TOKENS, "bos_token_id": None} | self.sizes
        sizes["vocab_size"] = max(vocabulary, sizes.get("vocab_size", 0))
        return getattr(transformers, f"{self.family}Config")(**sizes)

    def parameters(self) -> int:
        """Return the number of parameters, of a model without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(self.config(0)).num_parameters())


def _shape(name: str, family: str, vocabulary: int, hidden: int, inner: int, layers: int, heads: int, groups: int,
           **more: Any) -> Shape:  # fmt: skip
    sizes = {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups,
    }  # fmt: skip
    return Shape(name, family, sizes | more)


TINY = _shape("tiny", "Llama", 0, 64, 128, 2, 4, 2, initializer_range=0.2)
FULL = (
    _shape("1.5B (Qwen2.5-1.5B)", "Qwen2", 151_936, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    _shape("0.5B (Qwen2.5-0.5B)", "Qwen2", 151_936, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
)
"""Shapes for training in full, largest first."""
ADAPTED = (
    _shape("8B (Llama-3.1-8B)", "Llama", 128_256, 4096, 14336, 32, 32, 8),
    _shape("3B (Llama-3.2-3B)", "Llama", 128_256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
    _shape("1B (Llama-3.2-1B)", "Llama", 128_256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True, head_dim=64),
)
"""Shapes for training an adapter, largest first."""


@dataclass
class RandomWeights(PolicyConfig):
    """A model of the config in ``path`` with random weights, which are made where torch's default device is."""

    def load_model(self, dtype: torch.dtype) -> Any:
        """Make the model; every call gives the same weights."""
        from transformers import AutoModelForCausalLM

        config = self.load_config()
        silence_dropout(config)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


@cache
def tokenizer() -> Any:
    """Return a tokenizer to which every word of WORDS is one token."""
    roles = [f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")]
    made = train_tokenizer([*(f" {word}" for word in WORDS), *WORDS, *roles] * 8)
    made.model_max_length = MOST_TOKENS
    return made


def write_model(folder: Path, shape: Shape, *, weights: torch.device | None = None) -> Path:
    """Write a model's config and tokenizer, and with a device to make them on, weights in bfloat16.

    The folder is renamed when it is complete, so that what a killed process left is not taken for a model.
    """
    if folder.exists():
        return folder
    from transformers import AutoModelForCausalLM

    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    config = shape.config(len(tokenizer()))
    config.eos_token_id, config.pad_token_id = tokenizer().eos_token_id, tokenizer().pad_token_id
    config.architectures = [f"{shape.family}ForCausalLM"]
    config.save_pretrained(partial)
    tokenizer().save_pretrained(partial)
    if weights is not None:
        torch.manual_seed(0)
        with weights:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.generation_config.eos_token_id = tokenizer().eos_token_id
        model.save_pretrained(partial)
    partial.rename(folder)
    return folder


def rows(count: int, length: int, *, mixed: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs as TRL reads them: prompt, chosen and rejected as lists of messages.

    Args:
        count: of pairs.
        length: tokens of prompt and response, half each.
        mixed: draw the lengths of the prompt and of each response from an eighth to half of ``length`` instead.
        seed: of words and lengths.
    """
    draw = random.Random(seed)
    half = length // 2
    empty = tokenizer().apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False
    )
    around = len(tokenizer().encode(empty, add_special_tokens=False))
    end = len(tokenizer().encode(f"{END}", add_special_tokens=False))

    def text(role: str, less: int) -> dict[str, str]:
        tokens = draw.randint(length // 8, half) if mixed else half
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=max(2, tokens - less)))}

    return [
        {"prompt": [text("user", around)], "chosen": [text("assistant", end)], "rejected": [text("assistant", end)]}
        for _ in range(count)
    ]


def write_pairs(path: Path, pairs: list[dict[str, Any]]) -> Path:
    """Write pairs as this package reads them: whole conversations with scores."""
    lines = [
        {
            "prompt": pair["prompt"][-1]["content"], "chosen": [*pair["prompt"], *pair["chosen"]],
            "rejected": [*pair["prompt"], *pair["rejected"]], "score_chosen": 2.0, "score_rejected": 1.0,
        }
        for pair in pairs
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
