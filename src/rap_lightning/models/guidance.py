"""Goal guidance: sampling that is pushed away from what the policy says under a low goal.

This is classifier-free guidance with the goal as the condition. With w the weight, each token is drawn from

    log p(v) = (1 + w) log p(v | goal) - w log p(v | low) + constant

which is the rule of Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598, section 3.2, their w) as Sanchez et al. 2023
(https://arxiv.org/abs/2306.17806) write it for language models with a negative prompt (their γ, transformers'
``guidance_scale``, is 1 + w). Both streams see the same response so far.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rap_lightning.errors import ConfigError
from rap_lightning.models.private_api import is_stateful

CACHES = ("cache", "past_key_values")
"""The names of a model's key-value cache in its forward and output: since transformers 5.24, and before."""


class GoalGuidance:
    """A logits processor for ``model.generate``, of transformers or of peft.

    For one batch of prompts; of an exported folder, whose chat template takes the goal::

        tokenizer = AutoTokenizer.from_pretrained("hf", padding_side="left")
        options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
        asked = tokenizer.apply_chat_template(conversations, goal=10, **options)
        low = tokenizer.apply_chat_template(conversations, goal=1, **options)
        model.generate(**asked, do_sample=True, logits_processor=[GoalGuidance(model, low, weight=1.0)])

    It needs the same model and prompts as ``generate``, in the same order and padded on the left. It works with several
    samples per prompt and with beams. transformers applies it before temperature, top-k and top-p, so these act on the
    guided distribution. A step takes a second forward pass of the same size, and a second cache.

    (transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor gives padded prompts wrong positions.)

    Args:
        model: the causal LM.
        against: the prompts at the low goal: ``input_ids`` and ``attention_mask``, [R, T] int64, padded on the left.
        weight: w, 0 or more; at 0 scores are unchanged.
        plausibility: α in (0, 1): a token whose probability under the goal is below α times that of the most likely one
            is excluded, as in contrastive decoding (Li et al. 2022, https://arxiv.org/abs/2210.15097, section 3.3): the
            difference of two log-probabilities can be large for a token that is nearly impossible under both. None
            excludes no token: the floor changes sampling without guidance too (:class:`PlausibilityFloor`), and its
            effect would be mistaken for that of guidance.
        use_cache: keep keys and values of the second stream, where the model has them and no recurrent state; without,
            each step computes the whole sequence again, to the same numbers up to rounding.
        within: makes a block that the second stream's forward passes run in; with AdapterStrength, at its strength.

    Raises:
        ConfigError: an option is out of its range, or prompts are padded on the right.
    """

    def __init__(
        self, model: Any, against: Mapping[str, Tensor], weight: float, plausibility: float | None = None,
        use_cache: bool = True, within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:  # fmt: skip
        check_guidance(weight, plausibility)
        self.ids, self.mask = against["input_ids"], against["attention_mask"]
        if not bool(self.mask[:, -1].all()):
            raise ConfigError("guidance: pad prompts on the left (padding_side='left'), so that they end together")
        self.model, self.weight, self.plausibility, self.within = model, weight, plausibility, within
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's wrapper takes *args
        self._takes = set(inspect.signature(base.forward).parameters)
        self._cache_name = next((name for name in CACHES if name in self._takes), None)
        # a recurrent state has read the padding on the left, so a cached step would differ from a whole pass
        self.use_cache = use_cache and self._cache_name is not None and not is_stateful(base)
        self._prompt: Tensor | None = None  # of the first stream, by which a batch is recognised
        self._seen: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return [R, V] guided log-probabilities, up to a constant per row; float32 or float64.

        Args:
            input_ids: [R, T] int64, prompts and responses so far.
            scores: [R, V], logits or log-probabilities under the goal.
        """
        if self.weight == 0:
            return scores if self.plausibility is None else PlausibilityFloor(self.plausibility)(input_ids, scores)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        own = torch.log_softmax(scores, dim=-1)
        low = torch.log_softmax(self._logits(input_ids).to(own.dtype), dim=-1)
        # (1 + w) own - w low, except where a probability is 0 and the difference undefined
        guided = torch.where(own.isinf() | low.isinf(), own, own + self.weight * (own - low))
        if self.plausibility is None:
            return guided
        return guided.masked_fill(_implausible(own, self.plausibility), float("-inf"))

    @torch.no_grad()
    def _logits(self, input_ids: Tensor) -> Tensor:
        """Return the logits of the next token after the low prompts and the responses so far, [R, V]."""
        seen, fresh = self._seen, input_ids[:, -1:]
        one_more = seen is not None and seen.shape[1] + 1 == input_ids.shape[1] and torch.equal(input_ids[:, :-1], seen)
        if one_more and self.use_cache:
            assert self._mask is not None, "a restart sets it"
            self._mask = torch.cat([self._mask, torch.ones_like(fresh)], dim=1)
        else:  # the first step, or beams have changed places
            fresh, self._mask = self._restart(input_ids)
        self._seen = input_ids
        position = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        more: dict[str | None, Any] = {"position_ids": position, "logits_to_keep": 1, self._cache_name: self._cache}
        with self.within():
            output = self.model(
                input_ids=fresh, attention_mask=self._mask, use_cache=self.use_cache,
                **{name: value for name, value in more.items() if name in self._takes},
            )  # fmt: skip
        self._cache = getattr(output, str(self._cache_name)) if self.use_cache else None
        logits: Tensor = output.logits[:, -1]
        return logits

    def _restart(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole sequences of the second stream and their mask, and drop the cache."""
        if self._prompt is None:
            self._prompt = input_ids
        width, rows = self._prompt.shape[1], len(input_ids)
        if rows % len(self.ids) or not torch.equal(input_ids[:, :width], self._prompt):
            raise ConfigError(
                "guidance is for one batch of prompts: create a GoalGuidance for each call of generate, with as many "
                "low prompts as prompts."
            )
        # transformers repeats each prompt for its samples and beams, side by side
        ids, mask = (t.to(input_ids).repeat_interleave(rows // len(self.ids), 0) for t in (self.ids, self.mask))
        response = input_ids[:, width:]
        self._cache = None
        return torch.cat([ids, response], dim=1), torch.cat([mask, torch.ones_like(response)], dim=1)


class PlausibilityFloor:
    """A logits processor with the floor of :class:`GoalGuidance` alone, to compare guidance with.

    It is min-p sampling (Nguyen et al. 2024, https://arxiv.org/abs/2407.01082) before the temperature.

    Args:
        plausibility: α in (0, 1): tokens whose probability is below α times that of the most likely one are excluded.
    """

    def __init__(self, plausibility: float) -> None:
        self.plausibility = plausibility

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores, [R, V], -inf where a token is excluded."""
        return scores.masked_fill(_implausible(scores, self.plausibility), float("-inf"))


def _implausible(scores: Tensor, plausibility: float) -> Tensor:
    return scores < scores.amax(dim=-1, keepdim=True) + math.log(plausibility)


def check_guidance(weight: float, plausibility: float | None) -> None:
    """Raise ConfigError where an option is out of its range."""
    if not 0 <= weight < float("inf"):
        raise ConfigError(f"guidance must be 0 or above and finite, found {weight}")
    if plausibility is not None and not 0 < plausibility < 1:
        raise ConfigError(f"guidance: plausibility must be above 0 and below 1, found {plausibility}")
