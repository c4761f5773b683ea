"""Warnings about known ways in which preference training goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.errors import ConfigError
from rap_lightning.training.step_logger import LoggedStep, LogObserver

FIRST = 3
"""Logged windows whose mean later ones are compared with."""
LASTING = 3
"""Logged windows in a row that must show a sign before it is reported."""


class Watchdog(LogObserver):
    """Warns once of each of these, and changes nothing.

    - The log-probability of chosen responses collapses: the policy unlearns what it should prefer (Pal et al. 2024,
      https://arxiv.org/abs/2402.13228, describe it).
    - Every pair is told apart and margins keep growing: nothing is left to learn from the pairs, and the policy drifts.
    - Samples become longer or shorter, where a callback takes some (SteeringTable and GoalSamples do).

    Args:
        enabled: watch at all.
        chosen_drop: nats per token by which chosen responses may become less likely than in the first logged windows.
        margin: mean implicit reward margin above which an accuracy of 1 is a sign.
        length_ratio: factor by which samples may become longer or shorter.
    """

    def __init__(
        self, enabled: bool = True, chosen_drop: float = 1.0, margin: float = 10.0, length_ratio: float = 1.5
    ) -> None:
        if chosen_drop <= 0 or margin <= 0 or length_ratio <= 1:
            raise ConfigError(
                "--watchdog: chosen_drop and margin must be above 0 and length_ratio above 1, found "
                f"{chosen_drop:g}, {margin:g} and {length_ratio:g}."
            )
        self.enabled, self.chosen_drop, self.margin, self.length_ratio = enabled, chosen_drop, margin, length_ratio
        self._chosen: list[float] = []  # nats per token, of the first windows
        self._length: float | None = None
        self._lasted = {"chosen": 0, "margin": 0}
        self._warned: list[str] = []

    def on_step_logged(self, trainer: pl.Trainer, logged: LoggedStep) -> None:
        """Look at the means of a window."""
        if not self.enabled:
            return
        step, values = logged
        chosen = values["logps/chosen"] / max(1.0, values["lengths/chosen"])
        if len(self._chosen) < FIRST:
            self._chosen.append(chosen)
        start = fmean(self._chosen)
        accuracy, margin = values["rewards/accuracies"], values["rewards/margins"]
        self._sign(
            "chosen", start - chosen > self.chosen_drop,
            f"step {step}: chosen responses have become {start - chosen:.2f} nats per token less likely than at the "
            f"start ({chosen:.2f}, was {start:.2f}): the policy unlearns both responses, which the margin hides. Try a "
            "smaller learning rate, a larger beta, or a loss with a term on chosen responses (DPOP, RPO, Mixture with "
            "SFT).",
        )  # fmt: skip
        self._sign(
            "margin", accuracy >= 0.9999 and margin > self.margin,
            f"step {step}: every pair is told apart (accuracy {accuracy:.3f}) and the mean margin of {margin:.1f} is "
            "growing: the policy overfits the pairs, or something gives them away (length, a word that one side always "
            "has). Stop earlier, take more varied pairs, or a loss that bounds the margin (IPO).",
        )  # fmt: skip

    def saw_samples(self, lengths: Sequence[int], step: int) -> None:
        """Compare the lengths of samples, in tokens, with those of the first; called by callbacks that take samples."""
        if not self.enabled or not lengths:
            return
        mean = fmean(lengths)
        if self._length is None:
            self._length = mean
        ratio = mean / max(1.0, self._length)
        if ratio > self.length_ratio or ratio < 1 / self.length_ratio:
            self._warn(
                "length",
                f"step {step}: samples have {mean:.1f} tokens on average, and had {self._length:.1f} at the start. "
                "Judges often prefer length: compare rewards of samples of one length, or use a loss that corrects for "
                "length (SimPO, R-DPO, LD-DPO).",
            )

    def _sign(self, name: str, seen: bool, text: str) -> None:
        self._lasted[name] = self._lasted[name] + 1 if seen else 0
        if self._lasted[name] >= LASTING:
            self._warn(name, text)

    def _warn(self, name: str, text: str) -> None:
        if name not in self._warned:
            self._warned.append(name)
            rank_zero_warn(f"watchdog: {text}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "chosen": list(self._chosen), "length": self._length, "lasted": dict(self._lasted),
            "warned": list(self._warned),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._chosen, self._length = list(state_dict["chosen"]), state_dict["length"]
        self._lasted, self._warned = dict(state_dict["lasted"]), list(state_dict["warned"])
