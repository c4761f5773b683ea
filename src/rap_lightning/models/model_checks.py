"""Two checks of a model before it is used: does our head compute what its own does, and can sequences share a pass?

No list of names says which models work: each is compared with itself on a few tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rap_lightning.batches.dataset import Example
from rap_lightning.batches.layouts import LAYOUTS, lay_out
from rap_lightning.batches.sampler import BatchPlan
from rap_lightning.batches.types import Batch
from rap_lightning.errors import ConfigError, first_line, join_some
from rap_lightning.models.attention import Seen, declared_windows, forest_attention, is_flash
from rap_lightning.models.digests import not_finite
from rap_lightning.models.logps import Head
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.models.private_api import attention_implementation

EXACT, ROUNDED = 1e-3, 0.25
"""Nats by which two computations may differ, in float32 and in bfloat16, which rounds logits to 2^-8 of their size."""


def check_head(policy: Policy) -> float:
    """Return the largest difference in nats between our log-probabilities and those of the model's own logits.

    Eight tokens are enough to find a head that does more than :class:`Head` knows of.

    Raises:
        ConfigError: the two differ by more than rounding.
    """
    device = policy.device
    ids = torch.arange(8, device=device)[None] % policy.causal_lm.config.get_text_config().vocab_size
    places = torch.arange(7, device=device)
    batch = Batch(
        input_ids=ids, position_ids=torch.arange(8, device=device)[None], attention_mask=torch.ones_like(ids),
        forest=None, predict_from=places, target=ids[0, 1:], segment=places * 0, lengths=places[:1],
        rewards=places[:0], goal_rewards=places[:0], origin=places[:0], weights=places[:0], fillers=0,
        step_pairs=0, loss_weights=places[:0], step_weight=0.0, digests=(), pair_ids=(), goals=(),
    )  # fmt: skip
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch)
        logits = policy.gathered(lambda: policy.causal_lm(input_ids=ids, use_cache=False).logits)[0, :-1]
        theirs = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    difference = float((ours - theirs).abs().max())
    if not math.isfinite(difference):
        names = not_finite(policy)
        raise ConfigError(
            f"the model at {policy.causal_lm.config.name_or_path} gives log-probabilities that are not numbers: "
            f"{f'not finite: {join_some(names)}' if names else f'{ours.dtype} overflows in it'}. "
            "Restore its files, or load it in float32 or bfloat16."
        )
    if not difference <= (EXACT if ours.dtype == logits.dtype else ROUNDED):
        raise ConfigError(
            f"{type(policy.causal_lm).__name__}: response log-probabilities differ by {difference:.3g} nats from those "
            "of the model's own logits, so its output layer does something that is not known here. "
            "Please report the model."
        )
    return difference


def check_sharing(policy: Policy) -> str | None:
    """Compare short sequences laid out as a forest with the same ones one at a time, and set ``policy.shares``.

    Models with state outside of attention (Mamba), positions by index (ALiBi) or attention code of their own differ.

    Returns:
        Why sequences can't share a forward pass, or None where they can.
    """
    config = policy.causal_lm.config.get_text_config()
    batch, seen = _forest_batch(config).to(policy.device), Seen()
    assert batch.forest is not None, "a tree"
    dtypes = set[torch.dtype]()

    def shared() -> Tensor:
        with forest_attention(config, seen):
            hidden = policy.hidden(batch.input_ids, batch.position_ids, forest=batch.forest)
        dtypes.add(hidden.dtype)
        return Head.of(policy.causal_lm).token_logps(hidden.flatten(0, 1)[batch.predict_from], batch.target)

    with torch.no_grad(), evaluating(policy):
        policy.shares = False
        apart = policy(batch)
        try:
            together = policy.gathered(shared)
        except Exception as error:  # a model's own code fails in its own way on an attention it doesn't know
            if error in seen.failures or isinstance(error, torch.OutOfMemoryError):
                raise  # ours failed, or the device: that says nothing about the model
            reason = first_line(error)
            return f"its attention can't be replaced ({type(error).__name__}: {reason})"
    policy.attention = sorted(map(str, seen.paths))
    difference, declared = float((together - apart).abs().max()), declared_windows(config)
    if not difference <= (EXACT if dtypes == {torch.float32} else ROUNDED):
        return f"sequences side by side change each other's log-probabilities, by up to {difference:.2g} nats"
    if not declared <= seen.windows:
        return f"it attends within {max(declared - seen.windows):,} tokens in a way of its own"
    policy.shares = True
    if is_flash(own := attention_implementation(config)):
        _check_own_packing(policy, str(own))
        policy.attention = [f"{own} for packed", *policy.attention]
    return None


def _check_own_packing(policy: Policy, implementation: str) -> None:
    """Compare packed sequences in the model's own flash attention with the same ones one at a time.

    Raises:
        ConfigError: they differ by more than rounding.
    """
    batch = _forest_batch(policy.causal_lm.config.get_text_config(), "packed").to(policy.device)
    with torch.no_grad(), evaluating(policy):
        together = policy(batch)
        policy.shares = False
        apart = policy(batch)
        policy.shares = True
    difference = float((together - apart).abs().max())
    if not difference <= ROUNDED:
        raise ConfigError(
            f"--model.policy.attn_implementation {implementation}: packed sequences change each other's "
            f"log-probabilities, by up to {difference:.2g} nats. Leave it out."
        )


def _forest_batch(config: Any, layout: str = "tree") -> Batch:
    """Return three random pairs in one row; prompts are longer than the model's attention window, if it is short."""
    long = max([w for w in declared_windows(config) if w <= 512], default=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (4, long + 40), generator=generator, device="cpu").tolist()
    examples = [
        Example("", 0, None, (0.0, 0.0), ids[0][: long + 24], ids[1][:9], ids[2][:7]),
        Example("", 0, None, (0.0, 0.0), ids[0][: long + 20] + ids[1][:6], ids[2][:5], ids[3][:11]),
        Example("", 0, None, (0.0, 0.0), ids[3][:20], ids[0][:5], ids[1][:8]),
    ]
    return lay_out(LAYOUTS[layout], examples, BatchPlan((0, 1, 2), (1.0,) * 3, 3, ((0, 1, 2),)), pad_id=0)
