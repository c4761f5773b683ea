"""Whether a model reads a goal: how far its margins move between a pair's two goals, and which gradient is left.

m(g) = log π(y_w | x, g) - log π(y_l | x, g) is the margin of the better response under a goal, in nats. At the first
step, where policy and reference agree, the two halves of a relabelled pair push along +∇m(g_w) and -∇m(g_l), each as
hard as plain DPO; together, along d = ∇m(g_w) - ∇m(g_l). What that is worth:

    share left, per pair   |d| / (|∇m(g_w)| + |∇m(g_l)|)
    agreement of pairs     the mean cosine of d of one pair and d of another

The share is 0 where the halves cancel because the model ignores the goal, 1 where they add up. The agreement is how far
a step on one pair also helps another, as in training: what is left may be about that pair's words alone. Gradients are
those of a new LoRA adapter on all linear layers (of its factor B; A is random, so this is a random projection of each
weight's gradient).

:func:`sample_pairs` chooses pairs, :func:`probe_goal` measures one template on them, :func:`advice` says what to do.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

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
LITTLE, ENOUGH = 0.01, 0.04
"""Agreement below which a goal hardly reaches the model, and from which on it does (benchmarks/results/probe.md)."""
LEAST_LEFT = 0.1
"""Share of a pair's gradient below which agreement is not trusted: no measured case was so low."""

Halves = tuple[Example, Example]
"""A pair under its winner's goal and under its loser's; the second one's chosen response is the loser."""
MarginAndGradient = tuple[float, Tensor]


@dataclass(frozen=True)
class GoalProbe:
    """What was measured with one goal template.

    Attributes:
        goal: the template.
        pairs: how many pairs it was measured on.
        shift: m(g_w) - m(g_l), nats, the mean over pairs.
        left: share of plain DPO's gradient that is left, the mean over pairs.
        agreement: cosine of what is left of two different pairs, the mean over all of them.
    """

    goal: str
    pairs: int
    shift: Figure
    left: float
    agreement: float

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
        DataError: no pair can be encoded, with the first one's reason; or a single one, which agrees with no other.
    """
    halves = encode_halves(pairs, Encoder(tokenizer, goal, max_length))
    if len(halves) < 2:
        raise DataError(f"{describe(goal)}: of {len(pairs)} pairs a single one can be probed. Raise --probe_pairs.")
    shifts, left, directions = [], [], torch.zeros(())
    for (high, g_w), (low, g_l) in margin_gradients(policy, halves):
        shifts.append(high - low)
        left.append(float((g_w - g_l).norm() / (g_w.norm() + g_l.norm())))
        directions = directions + normalize(g_w - g_l, dim=0)
        tick()
    count = len(shifts)
    # |Σu|² of unit vectors u is their number and the cosines of all ordered pairs of them
    agreement = float(directions.square().sum() - count) / (count * (count - 1))
    return GoalProbe(describe(goal), count, mean_shift(shifts), float(np.mean(left)), agreement)


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


def margin_gradients(policy: Policy, halves: Iterable[Halves]) -> Iterator[tuple[MarginAndGradient, MarginAndGradient]]:
    """Yield m in nats and ∇m, flat, of each pair under its winner's goal and under its loser's."""
    parameters = [one for one in policy.parameters() if one.requires_grad]
    for won, lost in halves:
        yield _margin_and_gradient(policy, won, 1, parameters), _margin_and_gradient(policy, lost, -1, parameters)


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
    """Return one sentence that says what to do, by the agreement of pairs where enough of their gradient is left.

    Of thirteen figures the agreement predicted best what a short training did (benchmarks/results/probe.md).
    """
    best = max(found, key=lambda one: (one.left >= LEAST_LEFT, one.agreement))
    measured = (
        f"with {best.goal}, {best.left:.1%} of plain DPO's gradient is left of a pair, and pairs agree by a cosine of "
        f"{best.agreement:.3f}"
    )
    agreement = best.agreement if best.left >= LEAST_LEFT else 0.0
    if agreement >= ENOUGH:
        return f"Goals reach the model: {measured}; train with it."
    reach = "hardly reach" if agreement < LITTLE else "partly reach"
    return (
        f"Goals {reach} the model: {measured}, so training starts slowly. Try another text or placement (--goals), a "
        "warm-up (--model.warm_up.steps), or the goal as an adapter's strength (AdapterStrength)."
    )


def _margin(policy: Policy, half: Example, pad_id: int) -> Tensor:
    """Return log-probability of chosen minus that of rejected, []."""
    logps = policy.logps(batch_of([half], "padded", pad_id).to(policy.device))
    return logps[0] - logps[1]


def _margin_and_gradient(policy: Policy, half: Example, sign: int, parameters: list[Any]) -> MarginAndGradient:
    """Return m in nats and ∇m, flat; ``sign`` is -1 for the half whose chosen response is the loser."""
    margin = sign * _margin(policy, half, 0)
    gradients = torch.autograd.grad(margin, parameters, allow_unused=True)
    return float(margin.detach()), torch.cat([one.flatten().float() for one in gradients if one is not None])
