"""Whether a model reads a goal: how far its margins move between a pair's two goals, and which gradient is left.

m(g) = log π(y_w | x, g) - log π(y_l | x, g) is the margin of the better response under a goal, in nats. At the first
step, where policy and reference agree, the two halves of a relabelled pair push along +∇m(g_w) and -∇m(g_l), each as
hard as plain DPO. Plain DPO, with the pair twice, pushes along ∇m twice; of that is left

    of a pair       |∇m(g_w) - ∇m(g_l)| / (|∇m(g_w)| + |∇m(g_l)|)
    of their mean   |Σ (∇m(g_w) - ∇m(g_l))| / (|Σ ∇m(g_w)| + |Σ ∇m(g_l)|)

0 where the halves cancel because the model ignores the goal, 1 where they add up. Gradients are those of a new LoRA
adapter on all linear layers (of its factor B; A is random, so this is a random projection of each weight's gradient).

:func:`sample_pairs` chooses pairs, :func:`probe_goal` measures one template on them, :func:`advice` says what to do.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rap_lightning.batches.at_goals import batch_of
from rap_lightning.batches.dataset import Example, PairEncoder, example_of
from rap_lightning.batches.encode import Encoder
from rap_lightning.errors import ConfigError, DataError
from rap_lightning.evaluation import Bootstrap, Figure
from rap_lightning.models.policy import Policy, evaluating
from rap_lightning.models.policy_config import Lora, PolicyConfig
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.hashing import hash_text
from rap_lightning.preferences.pairs import Pair
from rap_lightning.preferences.relabelling import Relabelling, is_tie

AMONG = 4
"""The pairs with the widest gap are taken of a sample this many times as large."""
LITTLE, ENOUGH = 0.1, 0.25
"""Shares of a pair's gradient below which a goal hardly reaches the model, and from which on it does."""

Halves = tuple[Example, Example]
"""A pair under its winner's goal and under its loser's; the second one's chosen response is the loser."""


@dataclass(frozen=True)
class GoalProbe:
    """What was measured with one goal template.

    Attributes:
        goal: the template.
        pairs: how many pairs it was measured on.
        shift: m(g_w) - m(g_l), nats, the mean over pairs.
        left: share of plain DPO's gradient that is left, the mean over pairs.
        left_of_mean: that of the mean gradient.
    """

    goal: str
    pairs: int
    shift: Figure
    left: float
    left_of_mean: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return vars(self) | {"shift": self.shift.as_dict()}


def sample_pairs(pairs: Iterable[Pair], count: int, seed: int) -> list[Pair]:
    """Return the pairs with the widest gaps of a seeded sample, in any order of ``pairs``; ties are left out."""
    scored = (pair for pair in pairs if not pair.tie and pair.rewards[0] > pair.rewards[1])
    drawn = heapq.nsmallest(count * AMONG, scored, key=lambda pair: hash_text(f"{seed} {pair.id}"))
    return heapq.nsmallest(count, drawn, key=lambda pair: (pair.rewards[1] - pair.rewards[0], pair.id))


def load_policy(path: str, dtype: torch.dtype = torch.float32) -> Policy:
    """Load a model with a new LoRA adapter, always the same one, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = PolicyConfig(path, lora=Lora(), gradient_checkpointing=False).build(dtype)
    return policy.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def probe_goal(
    policy: Policy, goal: GoalTemplate, pairs: Sequence[Pair], tokenizer: Any, max_length: int,
    tick: Callable[[], object] = lambda: None,
) -> GoalProbe:  # fmt: skip
    """Measure a goal template on pairs.

    Args:
        policy: as :func:`load_policy` returns it.
        goal: the template, with a fitted scale.
        pairs: some scored pairs.
        tokenizer: the model's.
        max_length: tokens of prompt and response together.
        tick: called after each pair.

    Raises:
        ConfigError: the template states the same goal for both responses of every pair.
        DataError: no pair can be encoded, with the first one's reason.
    """
    parameters = [one for one in policy.parameters() if one.requires_grad]
    shifts, left, sums = [], [], [torch.zeros(()), torch.zeros(())]
    for halves in encode_halves(pairs, Encoder(tokenizer, goal, max_length)):
        high, g_w = _margin_and_gradient(policy, halves[0], 1, parameters)
        low, g_l = _margin_and_gradient(policy, halves[1], -1, parameters)
        shifts.append(high - low)
        left.append(_share(g_w, g_l))
        sums = [g_w + sums[0], g_l + sums[1]]
        tick()
    return GoalProbe(describe(goal), len(shifts), mean_shift(shifts), float(np.mean(left)), _share(*sums))


def encode_halves(pairs: Sequence[Pair], encoder: Encoder) -> list[Halves]:
    """Return each pair under its two goals, as training sees them; see :func:`probe_goal` for the errors."""
    goal = encoder.goal
    assert goal is not None, "the halves of a pair differ in their goals"
    apart = [pair for pair in pairs if not is_tie(goal, pair.rewards, pair.attributes)]
    if not apart:
        raise ConfigError(
            f"{describe(goal)}: it states the same goal for both responses of every pair, so that there is nothing to "
            "read. Print the number in its text, or use more decimals."
        )
    rows = PairEncoder(encoder, Relabelling())(apart)
    good = [row for row in rows if not row["dropped"]]
    if not good:
        raise DataError(f"{describe(goal)}: no pair can be encoded: {rows[0]['dropped']}.")
    return [(example_of(row, 0), example_of(row, 1)) for row in good]  # as Relabelling() orders them


def measure_margins(policy: Policy, halves: Sequence[Halves], pad_id: int) -> list[float]:
    """Return m(g_w) - m(g_l) of each pair in nats, without gradients; two forward passes a pair."""
    with torch.no_grad(), evaluating(policy):
        margins = [[_margin(policy, half, pad_id) for half in both] for both in halves]
    return [float(high + low) for high, low in margins]  # the second half's chosen response is the loser


def mean_shift(shifts: Sequence[float]) -> Figure:
    """Return the mean with its 95% interval."""
    values = np.asarray(shifts)
    return Bootstrap(range(len(values))).figure(lambda w: (w @ values) / w.sum(-1), "no pairs")


def describe(goal: GoalTemplate) -> str:
    """Return a template in short: its class, and where it writes."""
    placed = "" if goal.placement == "auto" else f", {goal.placement}"
    return f"{type(goal).__name__}{placed}"


def advice(found: Sequence[GoalProbe]) -> str:
    """Return one sentence that says what to do, by the share per pair.

    That of the mean says less: its denominator is small where the pairs' gradients cancel each other (docs/LOG.md).
    """
    best = max(found, key=lambda one: one.left)
    share = f"{best.left:.1%} of plain DPO's gradient is left of a pair with {best.goal}"
    if best.left >= ENOUGH:
        return f"Goals reach the model: {share}; train with it."
    reach = "hardly reach" if best.left < LITTLE else "partly reach"
    return (
        f"Goals {reach} the model: {share}, so training starts that much more slowly. Try another text or placement "
        "(--goals), a warm-up (--model.warm_up.steps), or the goal as an adapter's strength (AdapterStrength)."
    )


def _margin(policy: Policy, half: Example, pad_id: int) -> Tensor:
    """Return log-probability of chosen minus that of rejected, []."""
    logps = policy.logps(batch_of([half], "padded", pad_id).to(policy.device))
    return logps[0] - logps[1]


def _margin_and_gradient(policy: Policy, half: Example, sign: int, parameters: list[Any]) -> tuple[float, Tensor]:
    """Return m in nats and ∇m, flat; ``sign`` is -1 for the half whose chosen response is the loser."""
    margin = sign * _margin(policy, half, 0)
    gradients = torch.autograd.grad(margin, parameters, allow_unused=True)
    return float(margin.detach()), torch.cat([one.flatten().float() for one in gradients if one is not None])


def _share(g_w: Tensor, g_l: Tensor) -> float:
    whole = float(g_w.norm() + g_l.norm())
    return float((g_w - g_l).norm()) / whole if whole > 0 else math.nan
