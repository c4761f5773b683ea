"""Sample responses from a policy."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from rap_lightning.batches.types import PromptBatch
from rap_lightning.errors import ConfigError
from rap_lightning.models.guidance import GoalGuidance, PlausibilityFloor, check_guidance
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.models.token_strength import at_strength

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Generation:
    """How responses are sampled.

    Args:
        max_new_tokens: longest response, in tokens.
        temperature: of sampling; 0 picks the most likely token each time.
        top_p: sample from the most likely tokens that hold this share of the probability.
        guidance: w, how far log-probabilities at the goal are pushed away from those at a low goal, to
            (1 + w) log p(. | goal) - w log p(. | low); 0 samples without guidance. It takes a second forward pass per
            token.
        against: the low goal, a number on the scale that goals state, or none for the prompt without a goal; by default
            the lowest of the scale.
        plausibility: exclude tokens whose probability under the goal is below this share of the most likely one's; by
            default none is excluded. Without guidance it is min-p, to compare guidance with.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 0.0
    against: float | Literal["none"] | None = None
    plausibility: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"generation.max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if self.temperature < 0:
            raise ConfigError(f"generation.temperature must be 0 or above, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"generation.top_p must be above 0 and at most 1, found {self.top_p}")
        if self.temperature == 0 and self.top_p < 1:
            raise ConfigError("generation.top_p has no effect at temperature 0; leave it out, or sample.")
        check_guidance(self.guidance, self.plausibility)
        if self.plausibility is not None and self.guidance == 0 and self.temperature == 0:
            raise ConfigError("guidance: plausibility has no effect at temperature 0 without guidance; leave it out.")
        if self.against is not None and self.guidance == 0:
            raise ConfigError("guidance: against has no effect without a guidance above 0; remove one of the two.")

    def settings(self) -> dict[str, Any]:
        """Return the options as plain values; those of guidance only where they have an effect."""
        options = dataclasses.asdict(self)
        names = [] if self.guidance else ["guidance", "against"]
        names += [] if self.plausibility is not None else ["plausibility"]
        return {name: value for name, value in options.items() if name not in names}

    @property
    def min_p(self) -> float | None:
        """``plausibility`` as the min_p of servers, which divide by the temperature before they compare probabilities.

        p(v) / p(max) >= α at temperature 1 is (p(v) / p(max))^(1/T) >= α^(1/T) at temperature T.
        """
        return None if self.plausibility is None else float(self.plausibility ** (1 / self.temperature))

    @property
    def processes_logits(self) -> bool:
        """Whether sampling does more than temperature and top-p."""
        return self.guidance > 0 or self.plausibility is not None


@torch.no_grad()
def generate(policy: Policy, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, options: Generation) -> list[str]:
    """Return one response per prompt, as text without control tokens.

    Raises:
        ConfigError: guidance is on, and the batch holds no prompts at the low goal.
    """
    from transformers import GenerationConfig

    guide = guidance_of(policy.model, batch.against, options)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    model = policy.causal_lm
    own = model.generation_config
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = end_of_turn_ids(tokenizer, model)
    try:
        # transformers takes options that are not given from the model's own generation config, where a repetition
        # penalty would change what "temperature 0" means
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        config = GenerationConfig(
            max_new_tokens=options.max_new_tokens, eos_token_id=ends, pad_token_id=pad, **sampling
        )
        with evaluating(policy), at_strength(batch.strength):
            output = policy.model.generate(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, generation_config=config,
                logits_processor=[] if guide is None else [guide],
            )  # fmt: skip
    finally:
        model.generation_config = own
    texts: list[str] = tokenizer.batch_decode(output[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def guidance_of(
    model: Any, against: PromptBatch | None, options: Generation
) -> GoalGuidance | PlausibilityFloor | None:
    """Return the logits processor of ``options``; None where they have none, so that sampling is unchanged."""
    if options.guidance == 0:
        return None if options.plausibility is None else PlausibilityFloor(options.plausibility)
    if against is None:
        raise ConfigError(
            "guidance needs each prompt at the low goal too: batches of PreferenceDataModule.prompt_batch hold them."
        )
    low = {"input_ids": against.input_ids, "attention_mask": against.attention_mask}
    within = partial(at_strength, against.strength)
    return GoalGuidance(model, low, options.guidance, options.plausibility, within=within)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """Return the ids that end a response: of the model's generation config, and what the chat template writes."""
    known = model.generation_config.eos_token_id
    ids = set(known if isinstance(known, list) else [] if known is None else [known])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    probe = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a-response-to-look-for"}]
    tail = tokenizer.apply_chat_template(probe, tokenize=False).rpartition("a-response-to-look-for")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)
    return sorted(ids if first is None else ids | {first})
