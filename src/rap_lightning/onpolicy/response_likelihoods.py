"""Log-probabilities of responses under a model, computed as training computes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.sampled_model import Model, weights_dtype
from rap_lightning.preferences.judge import Item
from rap_lightning.preferences.pairs import BadRow

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Encoded:
    """Token ids of an item: its prompt without a goal, and its response with the end of turn."""

    item: Item
    prompt: list[int]
    response: list[int]


class Likelihoods:
    """Encodes responses for a model, and gives their log-probabilities; the prompt states no goal.

    Args:
        model: which.
        dtype: of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        max_length: of prompt and response together; prompts are cut first, then responses. By default the model's
            context.

    Raises:
        ConfigError: the model can't be loaded, or takes no sequences so long.
    """

    def __init__(self, model: Model, dtype: Dtype | None = None, max_length: int | None = None) -> None:
        import torch

        from rap_lightning.batches.encode import Encoder
        from rap_lightning.models.model_checks import check_head
        from rap_lightning.models.policy import Policy

        context = model.context()
        if max_length is not None and not 2 <= max_length <= context:
            raise ConfigError(f"max_length must be from 2 to the {context:,} tokens that {model.path} takes")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = Encoder(model.tokenizer(), None, max_length or context)
        self.policy = Policy(model.load(weights_dtype(dtype, device), device)).requires_grad_(False)
        check_head(self.policy)
        self.counts: Counter[str] = Counter()

    def encode(self, item: Item) -> Encoded:
        """Token ids, cut to fit; what was cut or repaired is counted.

        Raises:
            BadRow: the chat template refuses the conversation.
        """
        from rap_lightning.batches.encode import Notes

        encoder, notes = self.encoder, Notes()
        prompt = encoder.prompt(item.history, None, notes)
        response = encoder.response(prompt, item.response, notes, "response")
        fitted = encoder.fit(prompt, item.history, len(response))
        self.counts.update(f"repaired: {what}" for what in notes.repaired)
        if fitted.cut:
            self.counts["cut: prompts that didn't fit"] += 1
        room = encoder.max_length - len(fitted.ids)
        if len(response) > room:
            self.counts["cut: ends of responses that didn't fit"] += 1
        return Encoded(item, fitted.ids, response[:room])

    def logps(self, encoded: Sequence[Encoded], *, adapter: bool = True) -> list[float]:
        """Nats, summed over each response's tokens, in float32; without ``adapter``, those of the bare base model."""
        import torch

        from rap_lightning.batches.layouts import lay_out_responses
        from rap_lightning.models.policy import evaluating

        batch = lay_out_responses([(one.prompt, one.response) for one in encoded], pad_id=0).to(self.policy.device)
        with torch.inference_mode(), evaluating(self.policy):
            if adapter:
                return self.policy.logps(batch).tolist()
            with self.policy.model.disable_adapter():
                return self.policy.logps(batch).tolist()


def batches_of(
    items: Sequence[Item], encode: Any, size: int
) -> Iterator[tuple[list[Encoded], list[tuple[Item, BadRow]]]]:
    """Encoded items of similar length together, the longest first, and those that can't be encoded with the reason.

    Args:
        items: the responses.
        encode: of a :class:`Likelihoods`.
        size: responses in a batch.
    """
    encoded: list[Encoded] = []
    refused: list[tuple[Item, BadRow]] = []
    for item in items:
        try:
            encoded.append(encode(item))
        except BadRow as problem:
            refused.append((item, problem))
    if refused:
        yield [], refused
    encoded.sort(key=lambda one: (-len(one.prompt) - len(one.response), one.item.id))
    for first in range(0, len(encoded), size):
        yield encoded[first : first + size], []
