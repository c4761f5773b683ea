"""Base class of judges that run a language model or reward model in this process.

It holds the options that such judges share, encodes conversation and response without a goal, and forms batches; a
subclass loads its model and judges one batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.model_source import ModelSource, default_device, free_memory, weights_dtype
from rap_lightning.preferences.judge import Item, Judge, Verdict
from rap_lightning.preferences.pairs import BadRow

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.models.policy import Policy


@dataclass(frozen=True)
class EncodedResponse:
    """Token ids of an item: its prompt without a goal, and its response with the end of turn."""

    item: Item
    prompt: list[int]
    response: list[int]


BatchJudge = Callable[[Sequence[EncodedResponse]], list[Verdict]]


class ModelJudge(Judge):
    """A judge that runs a model in this process.

    Args:
        model: a Hugging Face folder or Hub id.
        batch_size: responses in a batch, of similar length.
        dtype: dtype of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        max_length: longest prompt and response in tokens; prompts are truncated first. By default the model's context.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.name = type(self).__name__
        if batch_size < 1:
            raise ConfigError(f"{self.name}: batch_size must be at least 1, found {batch_size}")
        self.source = ModelSource(model, revision, trust_remote_code, f"{self.name}: model")
        self.batch_size, self.dtype, self.max_length = batch_size, dtype, max_length

    def settings(self) -> dict[str, Any]:
        """Return the model and what changes its numbers."""
        return {
            "class": self.name, "model": self.source.identity(), "dtype": self.dtype, "max_length": self.max_length
        }  # fmt: skip

    @abstractmethod
    def load(self) -> tuple[Encoder, BatchJudge]:
        """Load the model; return an encoder for it, and a function that judges a batch."""

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """Yield the verdicts of one batch at a time, the longest responses first."""
        import torch

        encoder, judge_batch = self.load()
        encoded: list[EncodedResponse] = []
        for item in items:
            try:
                encoded.append(self._encode(encoder, item))
            except BadRow as problem:
                yield [Verdict(item.id, error=f"{problem.column}: {problem.reason}")]
        encoded.sort(key=lambda one: (-len(one.prompt) - len(one.response), one.item.id))
        for first in range(0, len(encoded), self.batch_size):
            with torch.inference_mode():
                verdicts = judge_batch(encoded[first : first + self.batch_size])
            yield [_finite(verdict) for verdict in verdicts]
        del judge_batch
        free_memory()

    def longest(self, max_length: int | None, context: int) -> int:
        """Return ``max_length``, by default the model's context."""
        if max_length is not None and not 2 <= max_length <= context:
            raise ConfigError(
                f"{self.name}: max_length must be from 2 to the {context:,} tokens that the model takes, "
                f"found {max_length:,}"
            )
        return max_length or context

    def load_policy(self, source: ModelSource, max_length: int | None) -> tuple[Encoder, Policy]:
        """Load a causal LM for log-probabilities, with an encoder for it."""
        from rap_lightning.batches.encode import Encoder

        encoder = Encoder(source.tokenizer(), None, self.longest(max_length, source.context()))
        device = default_device()
        return encoder, source.load_policy(weights_dtype(self.dtype, device), device)

    def _encode(self, encoder: Encoder, item: Item) -> EncodedResponse:
        """Return an item's token ids, truncated to fit; what was truncated or repaired is counted."""
        from rap_lightning.batches.encode import Conversation

        found = encoder.encode_one(Conversation(item.history, responses=(item.response,)))
        self.counts.update(found.notes())
        return EncodedResponse(item, found.prompt_ids[0], found.response_ids[0])


def response_logps(policy: Policy, responses: Sequence[EncodedResponse]) -> list[float]:
    """Return the log-probability of each response in nats, summed over its tokens in float32."""
    from rap_lightning.batches.layouts import lay_out_responses

    batch = lay_out_responses([(one.prompt, one.response) for one in responses], pad_id=0).to(policy.device)
    found: list[float] = policy.logps(batch).tolist()
    return found


def _finite(verdict: Verdict) -> Verdict:
    if verdict.error or all(map(math.isfinite, [verdict.overall, *verdict.attributes.values()])):
        return verdict
    return Verdict(verdict.id, error="the model gave a number that is not finite")
