"""Statistics of scored pairs, in constant memory."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rap_lightning.preferences.pairs import Pair


@dataclass
class PairStatistics:
    """Counts over pairs: rewards and gaps rounded to 0.01, weights to 3 digits, lengths in tokens where known."""

    rewards: Counter[float] = field(default_factory=Counter)
    gaps: Counter[float] = field(default_factory=Counter)
    weights: Counter[float] = field(default_factory=Counter)
    lengths: dict[str, Counter[int]] = field(
        default_factory=lambda: {name: Counter() for name in ("prompt", "chosen", "rejected", "longest")}
    )
    pairs: int = 0
    tokenised: int = 0
    longer: float = 0.0
    turns: Counter[int] = field(default_factory=Counter)
    over: int = 0

    def add(self, pair: Pair) -> None:
        self.pairs += 1
        for reward in pair.rewards:
            if not math.isnan(reward):
                self.rewards[round(reward, 2)] += 1
        if not math.isnan(pair.rewards[0]):
            self.gaps[round(pair.rewards[0] - pair.rewards[1], 2)] += 1
        self.weights[float(f"{pair.weight:.3g}")] += 1
        chosen, rejected = map(len, pair.responses)
        self.longer += 0.5 if chosen == rejected else float(chosen > rejected)
        self.turns[sum(turn["role"] == "user" for turn in pair.history)] += 1

    def add_tokens(self, prompt: int, chosen: int, rejected: int, max_length: int) -> None:
        """Count the lengths of a pair in tokens: of its longest prompt with a goal, and of its responses."""
        self.tokenised += 1
        longest = prompt + max(chosen, rejected)
        for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected), ("longest", longest)):
            self.lengths[name][value] += 1
        self.over += longest > max_length

    def histogram(self, bins: int = 10) -> list[tuple[float, float, int]]:
        """Return (low, high, count) of rewards in equal bins; the last one includes its upper end."""
        if not self.rewards:
            return []
        low, high = min(self.rewards), max(self.rewards)
        width = (high - low) / bins or 1.0
        counts = [0] * bins
        for reward, count in self.rewards.items():
            counts[min(bins - 1, int((reward - low) / width))] += count
        return [(low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts)]

    def as_dict(self) -> dict[str, Any]:
        share = round(self.longer / self.pairs, 4) if self.pairs else None
        figures: dict[str, Any] = {
            "pairs": self.pairs,
            "chosen_longer_share": share,
            "user_turns": {str(turns): self.turns[turns] for turns in sorted(self.turns)},
            "gap": quantiles(self.gaps),
            "rewards": [[round(low, 4), round(high, 4), count] for low, high, count in self.histogram()],
        }
        if set(self.weights) - {1.0}:
            figures["weights"] = quantiles(self.weights)
        if self.tokenised:
            figures["tokens"] = {name: quantiles(counts) for name, counts in self.lengths.items()}
            figures["tokens"]["pairs_measured"] = self.tokenised
            figures["tokens"]["share_over_max_length"] = round(self.over / self.tokenised, 4)
        return figures


def quantiles(counts: Counter[Any]) -> dict[str, float]:
    """Return min, p25, p50, p75, p95 and max of counted values; nothing if there are none."""
    total = sum(counts.values())
    if not total:
        return {}
    wanted = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}
    found: dict[str, float] = {}
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        for name, share in wanted.items():
            if name not in found and seen >= max(1.0, share * total):
                found[name] = value
    return found
