"""Signs of a run going wrong that users of such losses report, said in words, once each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from rap_lightning.errors import ConfigError
from rap_lightning.module import PreferenceModule

FIRST = 3
"""Log windows whose mean is the beginning that later ones are held against."""
LASTING = 3
"""Log windows in a row that a sign must last."""


class Watchdog(pl.Callback):
    """Warns once of each of these, and changes nothing.

    - The log-probability of chosen responses collapses: the policy unlearns what it should prefer (Pal et al. 2024,
      https://arxiv.org/abs/2402.13228, describe it).
    - All pairs are told apart, and margins grow on: nothing is left to learn from them, and the policy drifts.
    - Samples become longer or shorter, where a callback takes some (SteeringTable does).

    Args:
        enabled: watch at all.
        chosen_drop: nats per token by which chosen responses may become less likely than in the first log windows.
        margin: mean implicit reward margin from which an accuracy of 1 is a sign.
        length_ratio: how many times as long, or as short, samples may become.
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
        self._seen = 0
        self._chosen: list[float] = []  # nats per token, of the first windows
        self._length: float | None = None
        self._lasted = {"chosen": 0, "margin": 0}
        self._said: list[str] = []

    # The module logs at the end of a batch, after the callbacks' turn: so what it logged is read at what comes next.

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Look at what was logged since."""
        self._look(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at what was logged since."""
        self._look(pl_module)

    def _look(self, module: pl.LightningModule) -> None:
        if not self.enabled or not isinstance(module, PreferenceModule):
            return
        step, values = module.last_logged
        if step <= self._seen or "logps/chosen" not in values:
            return
        self._seen = step
        chosen = values["logps/chosen"] / max(1.0, values["lengths/chosen"])
        if len(self._chosen) < FIRST:
            self._chosen.append(chosen)
        drop = fmean(self._chosen) - chosen
        accuracy, margin = values["rewards/accuracies"], values["rewards/margins"]
        self._sign(
            "chosen", drop > self.chosen_drop,
            f"step {step}: chosen responses have become {drop:.2f} nats per token less likely than at the beginning "
            f"({chosen:.2f} against {fmean(self._chosen):.2f}): the policy unlearns both responses, and the margin "
            "between them hides it. A smaller learning rate, a larger beta, or a loss with a term on chosen responses "
            "(DPOP, RPO, Mixture with SFT) helps.",
        )  # fmt: skip
        self._sign(
            "margin", accuracy >= 0.9999 and margin > self.margin,
            f"step {step}: every pair is told apart (accuracy {accuracy:.3f}) and the mean margin is {margin:.1f} and "
            "growing: the pairs are learnt by heart, or something gives them away (lengths, a word that one side "
            "always has). Stop earlier, take more varied pairs, or a loss that bounds the margin (IPO).",
        )  # fmt: skip

    def saw_samples(self, lengths: Sequence[int], step: int) -> None:
        """Called by what takes samples, each time, with their lengths in tokens; the first is the beginning."""
        if not self.enabled or not lengths:
            return
        mean = fmean(lengths)
        if self._length is None:
            self._length = mean
        ratio = mean / max(1.0, self._length)
        if ratio > self.length_ratio or ratio < 1 / self.length_ratio:
            self._say(
                "length",
                f"step {step}: samples have {mean:.1f} tokens on average, and had {self._length:.1f} at the beginning. "
                "Judges often prefer length: look at rewards of samples of one length, or take a loss that is fair to "
                "lengths (SimPO, R-DPO, LD-DPO).",
            )

    def _sign(self, name: str, there: bool, text: str) -> None:
        self._lasted[name] = self._lasted[name] + 1 if there else 0
        if self._lasted[name] >= LASTING:
            self._say(name, text)

    def _say(self, name: str, text: str) -> None:
        if name not in self._said:
            self._said.append(name)
            rank_zero_warn(f"watchdog: {text}")

    def state_dict(self) -> dict[str, Any]:
        """The beginning, and what has been said."""
        return {
            "seen": self._seen, "chosen": list(self._chosen), "length": self._length, "lasted": dict(self._lasted),
            "said": list(self._said),
        }  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on watching."""
        self._seen, self._chosen = state_dict["seen"], list(state_dict["chosen"])
        self._length, self._lasted = state_dict["length"], dict(state_dict["lasted"])
        self._said = list(state_dict["said"])
