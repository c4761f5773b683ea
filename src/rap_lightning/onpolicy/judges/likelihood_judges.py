"""Judges that read a response's reward off the probabilities of language models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.response_likelihoods import Dtype, Encoded, Likelihoods, batches_of
from rap_lightning.onpolicy.sampled_model import Model, free_memory
from rap_lightning.preferences.judge import Item, Judge, Verdict


class ImplicitReward(Judge):
    """The reward that a model trained with DPO has in it: β (log π(y|x) - log π_ref(y|x)), in nats, up to the prompt.

    For data without scores, or with bad ones (the paper's IRA): train plain DPO on the labels, then relabel by what it
    learned. The log-probabilities are summed over the response with its end of turn; the prompt states no goal. A
    prompt's constant is not known, so rewards compare responses to one prompt; across prompts they do as far as the
    model is calibrated. They have no fixed range: state goals by QuantileScale.

    Args:
        model: what DPO made: an exported folder, an adapter's folder, a Hub id, or a checkpoint of fit.
        base: what DPO began with, its reference: a folder or Hub id. By default an adapter's base, or the model that a
            checkpoint's run began with; of a folder with whole weights it must be named.
        beta: β of that DPO; it stretches the numbers and changes no order.
        batch_size: responses at a time.
        dtype: of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        max_length: of prompt and response in tokens; by default the model's context.
        revision: of the model on the Hub.
        trust_remote_code: run Python code that comes with the models. Only for authors you trust.

    Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, section 4; Zhang et al. 2025,
    https://arxiv.org/abs/2410.08067 (implicit-reward augmented data).
    """

    def __init__(
        self,
        model: str,
        base: str | None = None,
        beta: float = 0.1,
        batch_size: int = 16,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"ImplicitReward: batch_size must be at least 1, found {batch_size}")
        if not 0 < beta < float("inf"):
            raise ConfigError(f"ImplicitReward: beta must be above 0 and finite, found {beta}")
        self.source = Model(model, revision, trust_remote_code, "ImplicitReward: model")
        self.named = None if base is None else Model(base, None, trust_remote_code, "ImplicitReward: base")
        if base is None and not (self.source.is_adapter or self.source.is_checkpoint):
            raise ConfigError(
                f"ImplicitReward: {model} holds whole weights and doesn't say what DPO began with: name that with base."
            )
        self.beta, self.batch_size, self.dtype, self.max_length = beta, batch_size, dtype, max_length

    def settings(self) -> dict[str, Any]:
        """Both models, β, and what changes log-probabilities."""
        base = self.named.identity() if self.named is not None else None
        return {
            "class": "ImplicitReward", "model": self.source.identity(), "base": base, "beta": self.beta,
            "dtype": self.dtype, "max_length": self.max_length,
        }  # fmt: skip

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """The longest first, through both models; an adapter's base is the same model with the adapter off."""
        yield from self._judged(items)
        free_memory()

    def _judged(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        trained = Likelihoods(self.source, self.dtype, self.max_length)
        trained.counts = self.counts
        base = self._base(trained)

        def verdicts(batch: list[Encoded]) -> list[Verdict]:
            own = trained.logps(batch)
            other = trained.logps(batch, adapter=False) if base is None else base.logps(batch)
            return [
                Verdict(one.item.id, self.beta * (a - b), notes={"logratio": a - b, "tokens": len(one.response)})
                for one, a, b in zip(batch, own, other, strict=True)
            ]

        yield from _in_batches(items, trained, self.batch_size, verdicts)

    def _base(self, trained: Likelihoods) -> Likelihoods | None:
        """The reference; None where it is the trained model without its adapter."""
        named = self.named
        if named is None and trained.policy.has_adapter:
            if self.source.is_checkpoint and self.source.began_with()[1] is not None:
                raise ConfigError(
                    f"ImplicitReward: the run of {self.source.path} continued an adapter, so its reference was that. "
                    "Merge it into its base (rap-lightning export), and name the folder with base."
                )
            return None
        if named is None:
            path, _ = self.source.began_with()
            named = Model(path, None, self.source.trust_remote_code)
        if named.identity() == self.source.identity():
            raise ConfigError(f"ImplicitReward: model and base are both {named.path}: every reward would be 0.")
        base = Likelihoods(named, self.dtype, self.max_length or trained.encoder.max_length)
        if base.encoder.tokenizer.get_vocab() != trained.encoder.tokenizer.get_vocab():
            raise ConfigError(
                f"ImplicitReward: {named.path} has another tokenizer than {self.source.path}, so it is not what that "
                "was trained from."
            )
        return base


class Likelihood(Judge):
    """How fluent a response is to a model: its mean log-probability per token, in nats; the prompt states no goal.

    With the base model for ``model`` it tells what steering costs: what guidance or training pushes out of the base's
    language gets a low number.

    Args:
        model: a folder, an adapter's folder, a Hub id, or a checkpoint of fit.
        batch_size: responses at a time.
        dtype: of the weights; by default bfloat16 on an accelerator and float32 on a CPU.
        max_length: of prompt and response in tokens; by default the model's context.
        revision: of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        dtype: Dtype | None = None,
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"Likelihood: batch_size must be at least 1, found {batch_size}")
        self.source = Model(model, revision, trust_remote_code)
        self.batch_size, self.dtype, self.max_length = batch_size, dtype, max_length

    def settings(self) -> dict[str, Any]:
        """The model, and what changes log-probabilities."""
        return {
            "class": "Likelihood", "model": self.source.identity(), "dtype": self.dtype, "max_length": self.max_length
        }  # fmt: skip

    def judge(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        """The longest first."""
        yield from self._judged(items)
        free_memory()

    def _judged(self, items: Sequence[Item]) -> Iterator[list[Verdict]]:
        model = Likelihoods(self.source, self.dtype, self.max_length)
        model.counts = self.counts

        def verdicts(batch: list[Encoded]) -> list[Verdict]:
            return [
                Verdict(one.item.id, nats / len(one.response), notes={"nats": nats, "tokens": len(one.response)})
                for one, nats in zip(batch, model.logps(batch), strict=True)
            ]

        yield from _in_batches(items, model, self.batch_size, verdicts)


def _in_batches(
    items: Sequence[Item], model: Likelihoods, size: int, verdicts: Callable[[list[Encoded]], list[Verdict]]
) -> Iterator[list[Verdict]]:
    """The verdicts of each batch; of items that the model can't take, why."""
    for batch, refused in batches_of(items, model.encode, size):
        yield [
            *(Verdict(item.id, error=f"{problem.column}: {problem.reason}") for item, problem in refused),
            *(_finite(verdict) for verdict in (verdicts(batch) if batch else ())),
        ]


def _finite(verdict: Verdict) -> Verdict:
    if verdict.error or abs(verdict.overall) < float("inf"):
        return verdict
    return Verdict(verdict.id, error="a log-probability that is not finite")
