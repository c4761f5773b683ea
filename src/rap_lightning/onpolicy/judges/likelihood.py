"""Judge by the fluency of a response to a language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rap_lightning.onpolicy.judges.model_judge import BatchJudge, EncodedResponse, ModelJudge, response_logps
from rap_lightning.preferences.judge import Verdict

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder


class Likelihood(ModelJudge):
    """How fluent a response is to a model: its mean log-probability per token, in nats; the prompt states no goal.

    With the base model as ``model`` it measures what steering costs: responses that guidance or training pushed away
    from the base's language get a low number.

    Args:
        model: a folder, an adapter's folder, a Hub id, or a checkpoint of fit.
        options: batch size, dtype and length.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)

    def load(self) -> tuple[Encoder, BatchJudge]:
        encoder, policy = self.load_policy(self.source, self.max_length)

        def judge_batch(batch: Sequence[EncodedResponse]) -> list[Verdict]:
            return [
                Verdict(one.item.id, nats / len(one.response), notes={"nats": nats, "tokens": len(one.response)})
                for one, nats in zip(batch, response_logps(policy, batch), strict=True)
            ]

        return encoder, judge_batch
