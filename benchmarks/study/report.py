"""Tables and pictures of the study. Tables replace what is between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.arms import ARMS, FRESH, LONG
from benchmarks.study.schedule import LONGER, Lines, Plan, setting
from benchmarks.study.settings import BEST_GOAL, TEMPERATURES, Size
from benchmarks.study.statistics import Difference, area, difference

Line = dict[str, Any]
BY_STRENGTH = ("strength+best", "strength+soft")
"""Arms that the plan's second part makes claims of."""
SHOWN = (*LONG, "strength+soft")
"""Arms that frontiers are shown of."""
CLAIM = ("claim", "points [bootstrap 95%]", "[t 95%]", "seeds ahead", "verdict")
NEAR = 3.0
"""Nats a response: about where most arms are at their best goal."""


class Results:
    """Lines of a study by stage and arm, each arm at the setting and temperature chosen in tuning.

    Args:
        lines: of the study.
        size: of the study.
        seeds: those that the figures come from; by default the size's first ones.
    """

    def __init__(self, lines: Lines, size: Size, seeds: Sequence[int] | None = None) -> None:
        self.lines, self.size, self.plan = lines, size, Plan(size, lines)
        self.seeds = size.seeds if seeds is None else seeds

    def of(self, stage: str, arm: str) -> dict[int, Line]:
        """By seed; of an arm, at its chosen setting."""
        chosen = self.plan.chosen(arm) if stage != "base" else (0, 0.0)
        wanted = stage, arm, None if chosen is None else chosen[0]
        found = [line for line in self.lines.values() if (line["stage"], line["arm"], line["trial"]) == wanted]
        return {line["seed"]: line for seed in self.seeds for line in found if line["seed"] == seed}

    def temperature(self, arm: str) -> str:
        """The one chosen in tuning."""
        chosen = self.plan.chosen(arm)
        assert chosen is not None
        return f"{chosen[1]:g}"

    def arms(self, stage: str = "main") -> list[str]:
        """Those that have been run and have a chosen setting."""
        return [arm for arm in ARMS if self.of(stage, arm) and self.plan.chosen(arm) is not None]

    def scores(self, stage: str, arm: str, temperature: str | None = None) -> dict[int, list[float]]:
        """Mean scores by seed and prompt at the best goal."""
        at = temperature or self.temperature(arm)
        return {seed: line["best"][at] for seed, line in self.of(stage, arm).items()}

    def minus(self, stage: str, arm: str, other: str, temperature: str | None = None) -> Difference | None:
        """An arm minus another; None where no seed has both."""
        ones, others = self.scores(stage, arm, temperature), self.scores(stage, other, temperature)
        return _paired(ones, others)

    def better(self, arms: Sequence[str]) -> str | None:
        """The one of these arms that tuning prefers."""
        return max((arm for arm in arms if arm in self.arms()), key=self._tuned, default=None)

    def _tuned(self, arm: str) -> float:
        chosen = self.plan.chosen(arm)
        assert chosen is not None
        lines = [self.lines[job.key] for job in self.plan.trials(arm) if job.trial == chosen[0]]
        return statistics.fmean(statistics.fmean(line["best"][f"{chosen[1]:g}"]) for line in lines)

    def frontiers(self, seed: int) -> dict[str, list[tuple[float, float]]]:
        """(KL, score) points of a seed; plain DPO's own are its runs, ``dpo scaled`` are those of its adapter."""
        base = self.lines.get(f"base base 0 {seed}")
        if base is None:
            return {}
        start = (0.0, base["base"]["None"]["1"])
        found = {}
        for arm in self.arms():
            line = self.of("main", arm).get(seed)
            if line is not None:
                name = arm if ARMS[arm].conditioned else f"{arm} scaled"
                found[name] = [start, *((one["kl"], one["score"]) for one in line["frontier"])]
        runs = [self.of(stage, "dpo").get(seed) for stage in ("main", *LONGER, "beta")]
        found["dpo"] = [start, *((r["frontier"][0]["kl"], r["frontier"][0]["score"]) for r in runs if r is not None)]
        return found

    def areas(self, names: Sequence[str], near: float | None = None) -> dict[str, dict[int, list[float]]]:
        """[Mean score under each frontier] by seed, up to a KL, or to the largest one that all the named ones reach."""
        found: dict[str, dict[int, list[float]]] = {name: {} for name in names}
        for seed in self.seeds:
            points = self.frontiers(seed)
            if not all(name in points for name in names):
                continue
            until = near or min(max(kl for kl, _ in points[name]) for name in names)
            if until > 0:  # else a policy didn't move
                for name in names:
                    found[name][seed] = [area(points[name], until)]
        return found


def write(folder: Path, lines: Lines, size: Size) -> None:
    """Write a page's tables, which are left out where nothing has been run yet, and its pictures.

    The page is README.md, and of a task on a real model that of the task's name.
    """
    results, second = Results(lines, size), Results(lines, size, size.fresh)
    page = folder / f"{size.task or 'README'}.md"
    tables = {name: table(results) for name, table in (TABLES if size.task is None else REAL_TABLES).items()}
    if size.fresh:
        tables |= {"fresh": _second_claims(second), "lengths": _lengths(second)}
    text = page.read_text() if page.is_file() else "\n".join(f"<!-- {n} -->\n<!-- end of {n} -->\n" for n in tables)
    for name, table in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)"
        text = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
    page.write_text(text)
    _pictures(folder / f"{size.task or 'goals'}.png", results, second)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)]), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _mean(values: Iterable[float], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else ""


def _paired(ones: dict[int, list[float]], others: dict[int, list[float]]) -> Difference | None:
    """The first minus the second over the seeds that both have; None where there is none."""
    pairs = [(ones[seed], others[seed]) for seed in ones if seed in others]
    return difference(pairs) if pairs else None


def _shown(found: Difference | None, bound: float | None = None) -> list[str]:
    if found is None:
        return [""] * (3 if bound is None else 4)
    t = "" if found.t_low is None else f"[{found.t_low:+.2f}, {found.t_high:+.2f}]"
    cells = [f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]", t, f"{found.ahead}/{found.seeds}"]
    return cells if bound is None else [*cells, found.above(bound)]


def _claims(results: Results) -> str:
    ours = results.better(("strength", "strength+best"))
    if ours is None or "dpo" not in results.arms():
        return "(nothing yet)"
    title = ARMS[ours].title
    rows = [
        [f"H1: {title}, minus plain DPO; above -0.2", *_shown(results.minus("main", ours, "dpo"), -0.2)],
        [
            "H2: the same after four times the steps; above 0 (target +0.5)",
            *_shown(results.minus("long", ours, "dpo"), 0),
        ],
    ]
    areas = results.areas([ours, "dpo", "dpo scaled"])
    for other, words in (("dpo", "plain DPO"), ("dpo scaled", "plain DPO, scaled")):
        rows.append([f"H3: area under the frontier minus that of {words}; above 0",
                     *_shown(_paired(areas[ours], areas[other]), 0)])  # fmt: skip
    rows.append(_following(results, ours))
    return _table(CLAIM, rows)


def _following(results: Results, arm: str) -> list[str]:
    lines, goals = results.of("main", arm).values(), results.size.goals
    peaks = [max(goals, key=lambda g, line=line: line["curve"][f"{g:g}"]) for line in lines]  # type: ignore[misc]
    spearman, missed = [line["spearman"] for line in lines], [line["missed"] for line in lines]
    fits = min(spearman) >= 0.95 and all(p == BEST_GOAL for p in peaks) and statistics.fmean(missed) <= 1.5
    return [f"H4: Spearman {_mean(spearman)} (lowest {min(spearman):.2f}), peak at {_list(peaks)}, "
            f"mean of abs(score - goal) {_mean(missed)}", "", "", "", "holds" if fits else "fails"]  # fmt: skip


def _second_claims(results: Results) -> str:
    """The claims of the plan's second part, of both arms by strength that it names."""
    arms = [arm for arm in BY_STRENGTH if arm in results.arms()]
    return _table(CLAIM, [row for arm in arms for row in _claims_of(results, arm, -0.2)])


def _real_claims(results: Results) -> str:
    """Those of a real model, of the arm by strength that tuning prefers."""
    arm = results.better(BY_STRENGTH)
    return "(nothing yet)" if arm is None else _table(CLAIM, _claims_of(results, arm, 0.0))


def _claims_of(results: Results, arm: str, bound: float) -> list[list[str]]:
    rows = [[f"**{ARMS[arm].title}**", "", "", "", ""]]
    rows.append([f"H1: minus plain DPO; above {bound:g}", *_shown(results.minus("main", arm, "dpo"), bound)])
    for stage, times in LONGER.items():
        for other in [other for other in ("dpo", "soft") if other in results.arms(stage)]:
            claim = f"H2: {times} times the steps, minus {ARMS[other].title}; above 0"
            rows.append([claim, *_shown(results.minus(stage, arm, other), 0)])
    for other in ("dpo", "dpo scaled", "soft scaled"):
        areas = results.areas([arm, other], results.size.cap)
        if (found := _paired(areas[arm], areas[other])) is not None:
            words = ARMS[other.removesuffix(" scaled")].title + (", scaled" if "scaled" in other else "")
            claim = f"H3: area up to {results.size.cap:g} nats, minus {words}; above 0"
            rows.append([claim, *_shown(found, 0)])
    return [*rows, _following(results, arm)]


def _lengths(results: Results) -> str:
    """Scores at the best goal by the length of training, at the chosen temperature and at 1."""
    rows = []
    for arm in [arm for arm in FRESH if arm in results.arms("long")]:
        cells = [
            _mean(map(statistics.fmean, results.scores(stage, arm, at).values()))
            for at in (None, "1")
            for stage in ("main", *LONGER)
        ]
        rows.append([ARMS[arm].title, results.temperature(arm), *cells])
    times = [f"{n} x the steps" for n in (1, *LONGER.values())]
    return _table(["at the best goal", "T", *times, *(f"T = 1, {words}" for words in times)], rows)


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))


def _arms(results: Results) -> str:
    rows, asked = [], (*results.size.goals, *results.size.beyond)
    for arm in results.arms():
        chosen, lines = results.plan.chosen(arm), results.of("main", arm)
        assert chosen is not None
        trial = setting(results.size, arm, chosen[0])
        words = f"lr {trial.lr:g}" + (f", β {trial.beta:g}" if trial.beta else "")
        minus = results.minus("main", arm, "dpo") if arm != "dpo" and "dpo" in results.arms() else None
        curve = [_mean((line["curve"].get(f"{g:g}") for line in lines.values()), 1) for g in asked]
        rows.append([
            ARMS[arm].title, words, results.temperature(arm),
            _mean(map(statistics.fmean, results.scores("main", arm).values())), *_shown(minus)[:2],
            " ".join(c for c in curve if c),
            *(_mean(line.get(name) for line in lines.values()) for name in ("spearman", "missed", "good_rejected")),
        ])  # fmt: skip
    goals = " / ".join(f"{g:g}" for g in asked)
    head = ["arm", "setting", "T", "score at the best goal", "minus plain DPO [bootstrap 95%]", "[t 95%]",
            f"T = 1 at goals {goals}", "Spearman", "mean abs(score - goal)", "good rejected, nats"]  # fmt: skip
    return _table(head, rows)


def _temperatures(results: Results) -> str:
    def row(name: str, value: Callable[[str], str]) -> list[str]:
        return [name, *(value(f"{t:g}") for t in TEMPERATURES)]

    rows = []
    for stage, words in (("main", ""), ("long", ", four times the steps"), ("beta", ", a fifth of β")):
        for arm in results.arms(stage):
            rows.append(row(ARMS[arm].title + words, lambda t, a=arm, s=stage: _mean(  # type: ignore[misc]
                map(statistics.fmean, results.scores(s, a, t).values()))))  # fmt: skip
    return _table(["at the best goal", *(f"T = {t:g}" for t in TEMPERATURES)], rows)


def _long(results: Results) -> str:
    rows = []
    for stage, words in (("long", "four times the steps"), ("beta", "a fifth of β")):
        for arm in [arm for arm in LONG if arm in results.arms(stage) and arm != "dpo"]:
            for temperature in TEMPERATURES:
                found = results.minus(stage, arm, "dpo", f"{temperature:g}")
                rows.append([f"{ARMS[arm].title}, {words}, T = {temperature:g}", *_shown(found)])
    return _table(["minus plain DPO", "points [bootstrap 95%]", "[t 95%]", "seeds ahead"], rows)


def _frontier(results: Results) -> str:
    names = [name for name in ("dpo", "dpo scaled", *[arm for arm in results.arms() if arm != "dpo"])
             if all(name in results.frontiers(seed) for seed in _seeds(results))]  # fmt: skip
    shown = [name for name in names if name in ("dpo", "dpo scaled", *SHOWN)]
    whole, near = results.areas(shown), results.areas(shown, NEAR)
    rows = []
    for name in shown:
        title = {"dpo": "plain DPO, its runs", "dpo scaled": "plain DPO, scaled"}.get(name) or ARMS[name].title
        cells = []
        for areas in (whole, near):
            minus = _paired(areas[name], areas["dpo scaled"]) if name != "dpo scaled" else None
            cells += [_mean(itertools.chain(*areas[name].values())), _shown(minus)[0]]
        rows.append([title, *cells])
    minus_scaled = "minus plain DPO, scaled"
    return _table(["frontier", "mean score under it", minus_scaled, f"up to {NEAR:g} nats", minus_scaled], rows)


def _seeds(results: Results) -> list[int]:
    return list(results.of("main", "dpo"))


def _base(results: Results) -> str:
    lines = results.of("base", "base").values()
    rows = []
    for goal in map(str, results.size.base_goals):
        name = "no goal" if goal == "None" else f"goal {float(goal):g}"
        rows.append([name, *(_mean(line["base"][goal][f"{t:g}"] for line in lines) for t in TEMPERATURES)])
    return _table(["the base", *(f"T = {t:g}" for t in TEMPERATURES)], rows)


def _pictures(file: Path, results: Results, second: Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    longer = [arm for arm in FRESH if arm in second.arms("long")]
    panels = 3 if longer else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.5 * panels, 4.2), constrained_layout=True)
    colours = {arm: f"C{i}" for i, arm in enumerate(ARMS)} | {"dpo scaled": "C0", "soft": "black"}
    for arm in results.arms():
        lines = results.of("main", arm).values()
        goals = [
            goal
            for goal in (*results.size.goals, *results.size.beyond)
            if all(f"{goal:g}" in line["curve"] for line in lines)
        ]
        means = [statistics.fmean(line["curve"][f"{goal:g}"] for line in lines) for goal in goals]
        style, title = "o-" if arm in SHOWN else ":", ARMS[arm].title + (", scaled" if arm == "dpo" else "")
        axes[0].plot(goals, means, style, markersize=3, label=title, color=colours[arm])
    axes[0].plot(results.size.goals, results.size.goals, color="grey", linewidth=0.8)
    axes[0].set(xlabel="goal", ylabel="mean score, T = 1", title="Asked for a goal")
    axes[0].legend(fontsize=6)
    for name in ("dpo scaled", *[arm for arm in SHOWN if arm != "dpo"]):
        by_rank = [sorted(points[name])[1:] for seed in _seeds(results) if name in (points := results.frontiers(seed))]
        if not by_rank:
            continue
        xs, ys = (
            [statistics.fmean(point[i] for point in rank) for rank in zip(*by_rank, strict=False)] for i in (0, 1)
        )
        title = "plain DPO, scaled" if name == "dpo scaled" else ARMS[name].title
        axes[1].plot(xs, ys, "o-", markersize=3, label=title, color=colours[name])
    runs = [results.frontiers(seed)["dpo"][1:] for seed in _seeds(results)]
    axes[1].plot(*zip(*itertools.chain(*runs), strict=True), "x", markersize=4, label="plain DPO, its runs", color="C0")
    axes[1].set(xlabel="KL from the base, nats a response", ylabel="mean score, T = 1", title="Reward and distance")
    axes[1].set_xscale("log")
    axes[1].legend(fontsize=6)
    for arm in longer:
        scores = [
            statistics.fmean(map(statistics.fmean, second.scores(stage, arm).values())) for stage in ("main", *LONGER)
        ]
        axes[2].plot([1, *LONGER.values()], scores, "o-", markersize=3, label=ARMS[arm].title, color=colours[arm])
    if longer:
        axes[2].set(xlabel="length of training (1 is what was tuned)", title="Training for longer",
                    ylabel="mean score at the best goal, tuned temperature")  # fmt: skip
        axes[2].set_xscale("log", base=2)
        axes[2].set_xticks([1, *LONGER.values()], [f"{n} x" for n in (1, *LONGER.values())])
        axes[2].legend(fontsize=6)
    figure.savefig(file, dpi=130)
    plt.close(figure)


TABLES: dict[str, Callable[[Results], str]] = {
    "claims": _claims, "arms": _arms, "temperatures": _temperatures, "long": _long, "frontier": _frontier,
    "base": _base,
}  # fmt: skip
REAL_TABLES: dict[str, Callable[[Results], str]] = {
    "claims": _real_claims, "arms": _arms, "temperatures": _temperatures, "base": _base,
}  # fmt: skip
