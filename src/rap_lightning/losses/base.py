"""What every direct-alignment loss is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from rap_lightning.batches.types import PairLogps
from rap_lightning.errors import ConfigError


class PreferenceLoss(nn.Module, ABC):
    """One value per pair; the module averages over the pairs of the optimizer step.

    Subclass it, write ``forward``, and name the class by import path: ``--model.loss my_pkg.MyLoss``. Options are the
    arguments of ``__init__``. What the loss needs is declared by two class attributes:

    - ``needs_reference``: it is ``forward(policy, reference)``; where false, no reference is loaded, it is
      ``forward(policy)``, and the class says what its ``implicit_rewards`` are.
    - ``needs_rewards``: the judge's rewards come too, as the keyword ``rewards`` (a ``PairRewards``).

    Args:
        beta: strength of the implicit reward, per nat.
    """

    needs_reference: ClassVar[bool] = True
    needs_rewards: ClassVar[bool] = False

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ConfigError(f"{type(self).__name__}: beta must be above 0, found {beta}")
        self.beta = beta

    @abstractmethod
    def forward(self, policy: PairLogps, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of each pair, [B] float32, in nats unless the class says otherwise."""

    def implicit_rewards(self, policy: PairLogps, reference: PairLogps | None) -> tuple[Tensor, Tensor]:
        """What the loss treats as the rewards of chosen and rejected, each [B]; logged as ``rewards/...``.

        Here: β times the log-ratio of policy and reference (Rafailov et al. 2023, section 4, up to a term that depends
        on the prompt alone).
        """
        assert reference is not None, "a loss without a reference defines its own implicit rewards"
        return self.beta * (policy.chosen - reference.chosen), self.beta * (policy.rejected - reference.rejected)

    def extra_repr(self) -> str:
        """The options, as shown at the start of a run."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if isinstance(v, int | float) and k != "training")


def margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Chosen minus rejected log-ratio, [B], in nats."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
