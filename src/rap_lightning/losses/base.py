"""The base class of every direct-alignment loss, and the elementwise functions that losses share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Set
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rap_lightning.batches.types import PairLogps, PairRewards
from rap_lightning.errors import ConfigError

Requirement = Literal["reference", "rewards", "tokens", "unrelated", "collisions"]


class PreferenceLoss(nn.Module, ABC):
    """One value per pair; the module averages over the pairs of the optimizer step.

    Subclass it, write ``forward``, and name the class by import path: ``--model.loss my_pkg.MyLoss``. Options are the
    arguments of ``__init__``; a class without β calls ``nn.Module.__init__`` and defines ``implicit_rewards``. What
    the loss requires, and what is particular about it, is declared by attributes:

    - ``requires``: a set of inputs, by default ``{"reference"}``.

      - ``"reference"``: ``forward(policy, reference)`` is called. Without it no reference is loaded,
        ``forward(policy)`` is called, and the class defines ``implicit_rewards``.
      - ``"rewards"``: the judge's rewards are passed as the keyword ``rewards`` (a ``PairRewards``).
      - ``"tokens"``: ``policy.tokens`` and ``reference.tokens`` hold the log-probability of every response token.
      - ``"collisions"``: ``policy.tokens.log_collisions`` is set; together with ``"tokens"``.
      - ``"unrelated"``: ``policy.unrelated`` and ``reference.unrelated`` hold log-probabilities of responses to other
        prompts of the batch, at the cost of another forward pass.
    - ``least_pairs``: the smallest batch on which the loss is defined.
    - ``batch_level``: why a pair's value depends on the other pairs of its batch, or "" where it doesn't. Such a loss
      changes with the batch size, gradient accumulation and the number of devices; it must leave out pairs whose
      ``policy.weights`` is 0.
    - ``at_zero_margin``: why the gradient at policy = reference does not raise chosen and lower rejected, or "".

    Args:
        beta: strength of the implicit reward, per nat.

    >>> class Squared(PreferenceLoss):
    ...     def forward(self, policy, reference):
    ...         return (1 - self.beta * margin(policy, reference)) ** 2
    >>> lengths = torch.tensor([4, 2])
    >>> before = PairLogps.from_segments(torch.tensor([-9.0, -6.0]), lengths)  # chosen, rejected, in nats
    >>> after = PairLogps.from_segments(torch.tensor([-7.0, -9.0]), lengths)
    >>> Squared(beta=0.1)(after, before)
    tensor([0.2500])
    """

    requires: Set[Requirement] = frozenset({"reference"})
    least_pairs: int = 1
    batch_level: str = ""
    at_zero_margin: str = ""

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = above_zero(self, "beta", beta)

    @abstractmethod
    def forward(self, policy: PairLogps, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of each pair, [B] float32, in nats unless the class says otherwise."""

    def per_pair(self, policy: PairLogps, reference: PairLogps | None, rewards: PairRewards | None) -> Tensor:
        """Call ``forward`` with what the loss requires: [B]."""
        inputs = (policy, reference) if "reference" in self.requires else (policy,)
        return self(*inputs, **({"rewards": rewards} if "rewards" in self.requires else {}))  # type: ignore[no-any-return]

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """Return what the loss treats as the rewards of chosen and rejected, each [B]; logged as ``rewards/...``.

        By default β times the log-ratio of policy and reference (Rafailov et al. 2023, section 4, up to a term that
        depends on the prompt alone).
        """
        assert reference is not None, "a loss without a reference defines its own implicit rewards"
        return self.beta * (policy.chosen - reference.chosen), self.beta * (policy.rejected - reference.rejected)

    def terms(self) -> dict[str, Tensor]:
        """Return parts of the last ``forward``, [B] each, to log as ``loss/NAME``; the names never change."""
        return {}

    def term_names(self) -> Iterable[str]:
        """Return the names of ``terms``, before the first ``forward``."""
        return ()

    def after_step(self) -> None:
        """Update buffers; called on every rank after each optimizer step, so that resuming is exact."""

    def forget_step(self) -> None:
        """Drop what the step's forward passes have gathered; called before ``after_step`` where a step is skipped."""

    def extra_repr(self) -> str:
        """Return the options, as shown at the start of a run."""
        own = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{k}={v}" for k, v in own.items() if isinstance(v, int | float))


def above_zero(loss: object, name: str, value: float) -> float:
    """Return ``value``.

    Raises:
        ConfigError: it is not above 0, or not finite.
    """
    if not value > 0:
        raise ConfigError(f"{type(loss).__name__}: {name} must be above 0, found {value}")
    if value == float("inf"):
        raise ConfigError(f"{type(loss).__name__}: {name} must be finite, found {value}")
    return value


def between(loss: object, name: str, value: float, low: float, high: float, *, with_low: bool) -> float:
    """Return ``value``, which must be between ``low`` and ``high``, or ``low`` itself if ``with_low``.

    Raises:
        ConfigError: it is not.
    """
    if not (low < value < high or (with_low and value == low)):
        first = "from" if with_low else "above"
        raise ConfigError(f"{type(loss).__name__}: {name} must be {first} {low:g} to below {high:g}, found {value}")
    return value


def logratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """Return policy minus reference log-probability of chosen and of rejected, each [B], in nats."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Return chosen minus rejected log-ratio, [B], in nats."""
    chosen, rejected = logratios(policy, reference)
    return chosen - rejected


def cross_entropy(probability: float | Tensor, logit: Tensor) -> Tensor:
    """Return -p log σ(z) - (1 - p) log σ(-z), elementwise: of Bernoullis with probability p and with logit z."""
    return -probability * F.logsigmoid(logit) - (1 - probability) * F.logsigmoid(-logit)


EXP_BOUND = 30.0


def bounded_exp(x: Tensor) -> Tensor:
    """Return exp(x) up to :data:`EXP_BOUND`, and its tangent there beyond: value and gradient never overflow."""
    capped = x.clamp(max=EXP_BOUND)
    return torch.exp(capped) * (1 + x - capped)


def live(policy: PairLogps) -> Tensor:
    """Return the indices of the pairs that count, [n] int64: those whose weight is not 0."""
    if policy.weights is None:
        return torch.arange(len(policy.chosen), device=policy.chosen.device)
    return policy.weights.nonzero()[:, 0]


def over_ranks(totals: Tensor) -> Tensor:
    """Return the sum of a small tensor over all ranks; every rank must call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        totals = totals.clone()
        torch.distributed.all_reduce(totals)
    return totals
