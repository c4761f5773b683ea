"""Sampling from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rap_lightning.batches.types import PromptBatch
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import Policy, evaluating


@dataclass
class Generation:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response, in tokens.
        temperature: of sampling; 0 picks the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this share of the probability.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"generation.max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature must be 0 or above, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generation.top_p must be above 0 and at most 1, found {self.top_p}")
        if self.temperature == 0 and self.top_p < 1:
            raise ConfigError("generation.top_p has no effect at temperature 0; leave it out, or sample.")


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int, records: Sequence[dict[str, Any]]) -> PromptBatch:
    """Prompts side by side, ending together."""
    width = max(map(len, prompts))
    rows = [[pad_id] * (width - len(ids)) + list(ids) for ids in prompts]
    masks = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return PromptBatch(torch.tensor(rows), torch.tensor(masks), tuple(records))


@torch.no_grad()
def generate(policy: Policy, tokenizer: Any, batch: PromptBatch, options: Generation) -> list[str]:
    """One response per prompt, as text without control tokens."""
    from transformers import GenerationConfig

    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    model = policy.causal_lm
    own = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = end_of_turn_ids(tokenizer, model)
    try:
        # transformers fills what is left out from the model's own config, so that one must not stand in the way:
        # a repetition penalty there would change what "temperature 0" means
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling
        )
        with evaluating(policy):
            output = policy.model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config
            )
    finally:
        model.generation_config = own
    texts: list[str] = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def end_of_turn_ids(tokenizer: Any, model: Any) -> list[int]:
    """Ids that end a response: those of the model's generation config, and what the chat template writes after one."""
    known = model.generation_config.eos_token_id
    ids = set(known if isinstance(known, list) else [] if known is None else [known])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    probe = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a-response-to-look-for"}]
    tail = tokenizer.apply_chat_template(probe, tokenize=False).rpartition("a-response-to-look-for")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)
    return sorted(ids if first is None else ids | {first})
