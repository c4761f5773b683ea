"""The study's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.study.arms import ARMS
from benchmarks.study.figures import Results, between, guided, unlearnt
from benchmarks.study.jobs import GUIDED, GUIDED_PLAUSIBLY, PLAUSIBILITY, Plan
from benchmarks.study.settings import GOALS
from benchmarks.study.worlds import KNOBS

#: Colours that people who can't tell red from green can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw(output: Path, results: Results, plan: Plan) -> None:
    """All pictures for which there is something to show."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 110})
    for name, picture in {
        "arms": arms, "curves": curves, "unlearning": unlearning, "guidance": guidance, "knobs": knobs,
    }.items():  # fmt: skip
        figure = picture(pyplot, results, plan)
        if figure is not None:
            figure.savefig(output / f"{name}.png", bbox_inches="tight")
            pyplot.close(figure)


def short(arm: str) -> str:
    """An arm's name for a legend."""
    return {"base": "base", "combination": "best combination"}.get(arm) or ARMS[arm].title


def arms(pyplot: Any, results: Results, plan: Plan) -> Any:
    """Every arm minus DPO."""
    found = {arm: results.minus(arm, "dpo") for arm in [*ARMS, "combination"] if arm != "dpo"}
    shown = sorted(((d, arm) for arm, d in found.items() if d is not None), key=lambda one: one[0].mean)
    if not shown:
        return None
    figure, axes = pyplot.subplots(figsize=(7.5, 0.28 * len(shown) + 1))
    for place, (d, arm) in enumerate(shown):
        plain = arm != "combination" and ARMS[arm].asks == "none"
        axes.plot([d.low, d.high], [place, place], color=COLOURS[0 if plain else 1], linewidth=2.5)
        if d.t_low is not None:
            axes.plot([d.t_low, d.t_high], [place, place], color=COLOURS[0 if plain else 1], linewidth=0.8)
        axes.plot(d.mean, place, "o", color=COLOURS[0 if plain else 1], markersize=5)
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [short(arm) for _, arm in shown])
    axes.set_xlabel("mean score minus DPO's, held-out prompts (thick: bootstrap 95%, thin: t over seeds)")
    axes.plot([], [], "o-", color=COLOURS[0], label="asked without a goal")
    axes.plot([], [], "o-", color=COLOURS[1], label="asked with goal 10")
    axes.legend(frameon=False, loc="lower right")
    return figure


def curves(pyplot: Any, results: Results, plan: Plan) -> Any:
    """Mean score by goal."""
    names = ["base", "dpo", "ra", "sft", "chosen", "ra-sft", "combination"]
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    drawn = 0
    for arm, colour in zip(names, ("0.6", *COLOURS), strict=False):
        stage = "base" if arm == "base" else "main"
        lines = [line for seed, line in results.of(stage, arm).items() if seed in plan.size.seeds]
        if not lines:
            continue
        drawn += 1
        means = [sum(line["conditions"][f"{g:g}"]["score"] for line in lines) / len(lines) for g in GOALS]
        axes.plot(GOALS, means, "o-", color=colour, markersize=4, label=short(arm))
        none = sum(line["conditions"]["none"]["score"] for line in lines) / len(lines)
        axes.plot(0.2, none, "o", color=colour, markersize=5, markerfacecolor="none")
    axes.plot([1, 10], [1, 10], color="0.85", linewidth=0.8, zorder=0)
    axes.set_xticks([0.2, *GOALS], ["none", *(f"{g:g}" for g in GOALS)])
    axes.set_xlabel("goal in the prompt (left: none; the grey line is what was asked for)")
    axes.set_ylabel("mean rule score")
    axes.legend(frameon=False, fontsize=8)
    return figure if drawn else None


def unlearning(pyplot: Any, results: Results, plan: Plan) -> Any:
    """Good rejected responses against the score that was reached, every run of every arm."""
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    kinds = unlearnt(results)
    for colour, (kind, points) in zip(COLOURS, kinds.items(), strict=False):
        x, y = [score for score, _ in points], [change for _, change in points]
        axes.plot(x, y, "o", color=colour, markersize=4, alpha=0.7, label=kind)
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.set_xlabel("mean score, as the arm is asked for its best")
    axes.set_ylabel("change of log-probability of rejected\nresponses worth 6 or more (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure if any(kinds.values()) else None


def guidance(pyplot: Any, results: Results, plan: Plan) -> Any:
    """Score and fluency by guidance weight: above without a floor, below with one."""
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 6.5), gridspec_kw={"wspace": 0.3}, sharex=True)
    colours = dict(zip(dict.fromkeys((*GUIDED, *GUIDED_PLAUSIBLY)), ("0.6", *COLOURS), strict=False))
    drawn: set[str] = set()
    kinds = (("guide", "no floor"), ("plausible", f"floor {PLAUSIBILITY:g}"))
    for (left, right), (stage, floor) in zip(grid, kinds, strict=True):
        for arm, colour in colours.items():
            rows = guided(results, arm, stage)
            for low, style in ((GOALS[0], "o-"), (None, "s--")):
                mine = sorted(((w, f) for of, w, f in rows if of == low or w == 0), key=lambda one: one[0])
                if len(mine) < 2:
                    continue
                weights = [w for w, _ in mine]
                label = f"{short(arm)}, against {'goal 1' if low else 'no goal'}"
                shown = {} if label in drawn else {"label": label}
                drawn.add(label)
                left.plot(weights, [f["score"] for _, f in mine], style, color=colour, markersize=4, **shown)
                right.plot(weights, [f["base_nats_per_token"] for _, f in mine], style, color=colour, markersize=4)
        left.set_ylabel(f"mean score at goal 10, {floor}")
        right.set_ylabel("log-probability under the base,\nnats per token")
    for axes in grid[1]:
        axes.set_xlabel("guidance weight")
    if drawn:
        figure.legend(frameon=False, fontsize=7, loc="lower center", ncol=3, bbox_to_anchor=(0.5, -0.08))
    return figure if drawn else None


def knobs(pyplot: Any, results: Results, plan: Plan) -> Any:
    """RA and the best way minus DPO, by world."""
    best = plan.best_conditioned()
    names = [name for name in KNOBS if results.dosed("ra", name) and results.dosed("dpo", name)]
    if len(names) < 2:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(names) + 1))
    for arm, colour, off in (("ra", COLOURS[1], 0.12), (best, COLOURS[2], -0.12)):
        for place, name in enumerate(reversed(names)):
            d = between(results.dosed(arm, name), results.dosed("dpo", name)) if arm else None
            if d is not None:
                axes.plot([d.low, d.high], [place + off] * 2, color=colour, linewidth=2)
                axes.plot(d.mean, place + off, "o", color=colour, markersize=5)
        axes.plot([], [], "o-", color=colour, label=short(arm) if arm else "")
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("mean score minus DPO's (bootstrap 95%)")
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
