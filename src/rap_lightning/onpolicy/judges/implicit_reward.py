"""Judge by the implicit reward of a model trained with DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import adapters_off
from rap_lightning.onpolicy.judges.model_judge import BatchJudge, EncodedResponse, ModelJudge, response_logps
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.preferences.judge import Verdict

if TYPE_CHECKING:
    from rap_lightning.batches.encode import Encoder
    from rap_lightning.models.policy import Policy


class ImplicitReward(ModelJudge):
    """The implicit reward of a model trained with DPO: β (log π(y|x) - log π_ref(y|x)), in nats, up to the prompt.

    For data without scores, or with bad ones (the paper's IRA): train plain DPO on the labels, then relabel by what it
    learned. The log-probabilities are summed over the response with its end of turn; the prompt states no goal. A
    prompt's constant is not known, so rewards compare responses to one prompt; across prompts they do as far as the
    model is calibrated. They have no fixed range: state goals by QuantileScale.

    Args:
        model: the model trained with DPO: an exported folder, an adapter's folder, a Hub id, or a checkpoint of fit.
        base: the reference of that DPO: a folder or Hub id. By default an adapter's base, or the model that a
            checkpoint's run began with; required for a folder with all weights.
        beta: β of that DPO; it stretches the numbers and changes no order.
        options: batch size, dtype and length.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4; Zhang et al. 2025,
    https://arxiv.org/abs/2410.08067 (implicit-reward augmented data).
    """

    def __init__(self, model: str, base: str | None = None, beta: float = 0.1, **options: Any) -> None:
        super().__init__(model, **options)
        if not 0 < beta < float("inf"):
            raise ConfigError(f"ImplicitReward: beta must be above 0 and finite, found {beta}")
        trust = self.source.trust_remote_code
        self.base = None if base is None else ModelSource(base, None, trust, "ImplicitReward: base")
        if base is None and not (self.source.is_adapter or self.source.is_checkpoint):
            raise ConfigError(
                f"ImplicitReward: {model} holds whole weights and doesn't say what DPO began with: name that with base."
            )
        self.beta = beta

    def settings(self) -> dict[str, Any]:
        """Return both models, β, and what changes log-probabilities."""
        return super().settings() | {"base": None if self.base is None else self.base.identity(), "beta": self.beta}

    def load(self) -> tuple[Encoder, BatchJudge]:
        """Load both models; an adapter's base is the same model with the adapter disabled."""
        encoder, policy = self.load_policy(self.source, self.max_length)
        reference = self._reference(encoder, policy)

        def judge_batch(batch: Sequence[EncodedResponse]) -> list[Verdict]:
            own = response_logps(policy, batch)
            if reference is not None:
                base = response_logps(reference, batch)
            else:
                with adapters_off(policy):
                    base = response_logps(policy, batch)
            return [
                Verdict(one.item.id, self.beta * (a - b), notes={"logratio": a - b, "tokens": len(one.response)})
                for one, a, b in zip(batch, own, base, strict=True)
            ]

        return encoder, judge_batch

    def _reference(self, encoder: Encoder, policy: Policy) -> Policy | None:
        """Load the reference; None if it is the trained model without its adapter."""
        began = self.source.trained_from() if self.source.is_checkpoint else {}
        source = self.base
        if source is None and policy.has_adapter:
            if began.get("adapter") is not None:
                raise ConfigError(
                    f"ImplicitReward: the run of {self.source.path} continued an adapter, so its reference was that. "
                    "Merge it into its base (rap-lightning export), and name the folder with base."
                )
            return None
        if source is None:
            source = ModelSource(str(began["path"]), None, self.source.trust_remote_code)
        if source.identity() == self.source.identity():
            raise ConfigError(f"ImplicitReward: model and base are both {source.path}: every reward would be 0.")
        other, reference = self.load_policy(source, encoder.max_length)
        if other.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
            raise ConfigError(
                f"ImplicitReward: {source.path} has another tokenizer than {self.source.path}, so it is not what that "
                "was trained from."
            )
        return reference
