"""Numbers of the study from its lines: means over seeds, paired differences with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.study.jobs import merit

RESAMPLES = 10_000
#: Two-sided 95% points of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

Line = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One arm minus another, paired by seed and prompt.

    Attributes:
        mean: over seeds, in points.
        low, high: 95%, bootstrap of seeds and of prompts within them.
        t_low, t_high: 95%, Student's t over seeds; None of a single seed.
        ahead: seeds in which the first is ahead.
        seeds: how many there are.
    """

    mean: float
    low: float
    high: float
    t_low: float | None
    t_high: float | None
    ahead: int
    seeds: int

    @property
    def verdict(self) -> str:
        """By the plan: holds, fails or open."""
        lows, highs = [self.low], [self.high]
        if self.t_low is not None and self.t_high is not None:
            lows, highs = [*lows, self.t_low], [*highs, self.t_high]
        return "holds" if min(lows) > 0 and self.t_low is not None else "fails" if max(highs) < 0 else "open"


def difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Difference:
    """Of the values by prompt of two arms, a pair of lists for each seed."""
    gaps = [np.asarray(one) - np.asarray(other) for one, other in pairs]
    means = [float(gap.mean()) for gap in gaps]
    rng = np.random.default_rng(seed)
    within = np.stack([gap[rng.integers(0, len(gap), (RESAMPLES, len(gap)))].mean(1) for gap in gaps])  # [seeds, R]
    drawn = rng.integers(0, len(gaps), (RESAMPLES, len(gaps)))
    resampled = np.stack([within[drawn[:, i], np.arange(RESAMPLES)] for i in range(len(gaps))]).mean(0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    mean = statistics.fmean(means)
    t_low = t_high = None
    if len(means) > 1:
        half = STUDENT[len(means) - 1] * statistics.stdev(means) / len(means) ** 0.5
        t_low, t_high = mean - half, mean + half
    return Difference(mean, float(low), float(high), t_low, t_high, sum(m > 0 for m in means), len(means))


class Results:
    """The lines of a study, by stage.

    Args:
        lines: of results.jsonl.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = list(lines)

    def of(self, stage: str, arm: str, knobs: str = "default") -> dict[int, Line]:
        """Lines by seed."""
        found = {
            line["seed"]: line
            for line in self.lines
            if (line["stage"], line["arm"], line["knobs"]) == (stage, arm, knobs)
        }
        return dict(sorted(found.items()))

    def rechosen(self, arm: str) -> dict[int, Line]:
        """Lines by seed at the setting chosen in more worlds: run anew where it is another one."""
        return self.of("check", arm) or self.of("main", arm)

    def dosed(self, arm: str, knobs: str) -> dict[int, Line]:
        """Lines by seed of the dose-response, whose settings are those chosen in all tuning worlds.

        Of the default world the seeds that others have too.
        """
        if knobs != "default":
            return self.of("knob", arm, knobs)
        seeds = {line["seed"] for line in self.lines if line["stage"] == "knob"}
        return {seed: line for seed, line in self.rechosen(arm).items() if seed in seeds}

    def minus(
        self, arm: str, other: str, knobs: str = "default", other_condition: str | None = None
    ) -> Difference | None:
        """``arm`` minus ``other``, each as it is asked for its best; None where no seed has both."""
        stage = "main" if knobs == "default" else "knob"
        ones, others = self.of(stage, arm, knobs), self.of(stage, other, knobs)
        return between(ones, others, other_condition)

    def mean(self, stage: str, arm: str, *path: str, knobs: str = "default") -> float | None:
        """The mean over seeds of a number in the lines."""
        values = []
        for line in self.of(stage, arm, knobs).values():
            value: Any = line
            for name in path:
                value = value[int(name) if isinstance(value, list) else name]
            if value is not None:
                values.append(float(value))
        return statistics.fmean(values) if values else None

    def merit(self, arm: str, knobs: str = "default", stage: str | None = None) -> float | None:
        """Mean over seeds of the figure that arms are compared by."""
        stage = stage or ("main" if knobs == "default" else "knob")
        values = [merit(line) for line in self.of(stage, arm, knobs).values()]
        return statistics.fmean(values) if values else None


def by_prompt(line: Line, condition: str | None = None) -> list[float]:
    """Mean scores by held-out prompt, as the arm is asked, or under another condition."""
    values: list[float] = line["conditions"][condition or line["asks"]]["by_prompt"]
    return values


def between(ones: dict[int, Line], others: dict[int, Line], other_condition: str | None = None) -> Difference | None:
    """Lines by seed minus others, as each is asked (or the others under a condition); None without a common seed."""
    pairs = [(by_prompt(ones[seed]), by_prompt(others[seed], other_condition)) for seed in ones if seed in others]
    return difference(pairs) if pairs else None


def unlearnt(results: Results) -> dict[str, list[tuple[float, float]]]:
    """(score as asked, change of good rejected responses as asked, nats) of every run, by kind of arm."""
    kinds: dict[str, list[tuple[float, float]]] = {
        "without goals": [], "both goals (RA and its ways)": [], "score-conditioned SFT": [], "chosen half only": [],
    }  # fmt: skip
    for line in results.lines:
        if line["stage"] not in ("tune", "main", "check") or "probe" not in line:
            continue
        if line["arm"] in ("rejected", "never-swapped"):
            continue
        plain = line["asks"] == "none"
        kind = {"sft": "score-conditioned SFT", "chosen": "chosen half only"}.get(line["arm"])
        kind = kind or ("without goals" if plain else "both goals (RA and its ways)")
        change = line["probe"]["changes"]["none" if plain else "best"]["rejected"][-1]
        if change is not None:
            kinds[kind].append((merit(line), change))
    return kinds


def guided(results: Results, arm: str, stage: str = "guide") -> list[tuple[float | None, float, dict[str, float]]]:
    """(low goal, weight, mean figures) of an arm."""
    cells: dict[tuple[float | None, float], list[dict[str, float]]] = {}
    for line in results.of(stage, arm).values():
        for row in line["guided"]:
            cells.setdefault((row["low"], row["weight"]), []).append(row)
    return [
        (low, weight, {name: statistics.fmean(row[name] for row in found) for name in
                       ("score", "ten", "tokens", "base_nats_per_token")})
        for (low, weight), found in cells.items()
    ]  # fmt: skip
