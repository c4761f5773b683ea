"""Tables and pictures of the study. Tables go between the marks of README.md; its words are written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study import pictures
from benchmarks.study.arms import ARMS
from benchmarks.study.figures import Difference, Results, between, guided, unlearnt
from benchmarks.study.jobs import GUIDED, GUIDED_PLAUSIBLY, PLAUSIBILITY, TEMPERATURES, Plan, merit
from benchmarks.study.settings import BINS, GOALS, Size
from benchmarks.study.worlds import KNOBS

BEST = f"{GOALS[-1]:g}"


def write(output: Path, lines: dict[str, dict[str, Any]], size: Size) -> None:
    """Fill the tables of ``output``/README.md and draw its pictures, from what is there."""
    results, plan = Results(list(lines.values())), Plan(size, lines)
    tables = {
        "arms": arms_table(results, plan),
        "likelihoods": likelihood_table(results),
        "matched": matched_table(results),
        "claims": claims_table(results),
        "temperatures": temperature_table(results),
        "knobs": knobs_table(results, plan),
        "guidance": guidance_table(results),
        "bases": bases_table(results),
        "check": check_table(results, plan),
        "cost": cost(results),
    }
    readme = output / "README.md"
    text = readme.read_text() if readme.is_file() else "# The study\n\n" + "".join(map(marks, tables))
    for name, table in tables.items():
        text = fill(text, name, table)
    readme.write_text(text)
    pictures.draw(output, results, plan)
    print(f"wrote {readme} and its pictures")


def marks(name: str) -> str:
    """An empty place for a table."""
    return f"<!-- {name} -->\n<!-- end of {name} -->\n\n"


def fill(text: str, name: str, table: str) -> str:
    """The text with the table between its marks.

    Raises:
        ValueError: the marks aren't there.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if start not in text or end not in text:
        raise ValueError(f"README.md has no place for the table {name}: {start} ... {end}")
    before, _, rest = text.partition(start)
    return before + start + "\n" + table.strip() + "\n" + end + rest.partition(end)[2]


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """For a table's cell."""
    return "" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def percent(value: float | None) -> str:
    """A share for a table's cell."""
    return "" if value is None else f"{100 * value:.0f}%"


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [list(head), ["---"] + ["---:"] * (len(head) - 1), *map(list, body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(d: Difference | None) -> str:
    """Mean and bootstrap interval."""
    return "" if d is None else f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"


def student(d: Difference | None) -> str:
    """The t interval."""
    return "" if d is None or d.t_low is None else f"[{d.t_low:+.2f}, {d.t_high:+.2f}]"


def title(arm: str, results: Results) -> str:
    """An arm's name; of the combination, with its parts."""
    if arm == "base":
        return "base"
    if arm == "combination":
        ways = next((line["seen"]["ways"] for line in results.lines if line["arm"] == arm and "seen" in line), [])
        return "best combination (" + ", ".join(ARMS[way].title for way in ways) + ")"
    return ARMS[arm].title


def setting(line: dict[str, Any]) -> str:
    """A line's setting in short."""
    return ", ".join(f"{name} {value:g}" for name, value in line["setting"].items())


def arms_table(results: Results, plan: Plan) -> str:
    """All arms in the default world."""
    body = []
    for arm in ["base", *ARMS, "combination"]:
        stage = "base" if arm == "base" else "main"
        found = results.of(stage, arm)
        if arm == "base":
            found = {seed: line for seed, line in found.items() if seed in plan.size.seeds}
        if not found:
            continue
        one = next(iter(found.values()))
        asks = one["asks"]
        d = None if arm in ("base", "dpo") else results.minus(arm, "dpo")
        at = sorted({line["peak"] for line in found.values()})
        peaks = [line["conditions"][f"{line['peak']:g}"]["score"] for line in found.values()]
        body.append([
            title(arm, results), setting(one), f"{len(found)}",
            "goal 10" if asks == BEST else "no goal",
            number(mean_of(found, "conditions", asks, "score")), interval(d), student(d),
            f"{d.ahead}/{d.seeds}" if d else "",
            number(mean_of(found, "conditions", "none", "score")), number(mean_of(found, "conditions", BEST, "score")),
            f"{statistics.fmean(peaks):.2f} at {', '.join(f'{g:g}' for g in at)}",
            number(mean_of(found, "spearman")), percent(mean_of(found, "conditions", asks, "ten")),
            number(mean_of(found, "conditions", asks, "tokens"), 1),
            number(mean_of(found, "conditions", asks, "base_nats_per_token")),
        ])  # fmt: skip
    head = [
        "arm", "setting chosen", "seeds", "asked with", "score", "minus DPO [bootstrap 95%]", "[t 95%]", "ahead",
        "score, no goal", "score, goal 10", "best over goals", "Spearman", "10s", "tokens", "base nats/token",
    ]  # fmt: skip
    return rows(head, body)


def mean_of(found: dict[int, dict[str, Any]], *path: str) -> float | None:
    """The mean over lines of a number in them."""
    values = []
    for line in found.values():
        value: Any = line
        for name in path:
            value = value[name]
        if value is not None:
            values.append(float(value))
    return statistics.fmean(values) if values else None


def likelihood_table(results: Results) -> str:
    """Changes of log-probability by role and true score, and what is read off the policy."""
    names = [f"{low:g}-{min(high, 10):g}" for low, high in BINS]
    good, poor = len(BINS) - 1, 0
    body = []
    for arm in [*ARMS, "combination"]:
        found = results.of("main", arm)
        if not found:
            continue
        asked = "none" if next(iter(found.values()))["asks"] == "none" else "best"
        cell = lambda condition, side, bin_, f=found: number(  # noqa: E731
            changed(list(f.values()), condition, side, bin_), 1, sign=True
        )
        body.append([
            title(arm, results), "no goal" if asked == "none" else "goal 10",
            cell(asked, "rejected", good), cell(asked, "chosen", good), cell(asked, "rejected", poor),
            cell("none", "rejected", good), cell("own", "rejected", good), cell("own", "rejected", poor),
            number(mean_of(found, "probe", "changes", "accuracy")), number(mean_of(found, "probe", "read_spearman")),
            number(mean_of(found, "probe", "read_accuracy")),
        ])  # fmt: skip
    head = [
        "arm", "asked with", f"rejected {names[good]}", f"chosen {names[good]}", f"rejected {names[poor]}",
        f"no goal: rejected {names[good]}", f"own goal: rejected {names[good]}", f"own goal: rejected {names[poor]}",
        "pair accuracy, no goal", "read off: Spearman", "read off: pairs",
    ]  # fmt: skip
    return rows(head, body)


def changed(lines: Sequence[dict[str, Any]], condition: str, side: str, bin_: int) -> float | None:
    """Mean change of log-probability, in nats a response, over lines, by how many responses each has."""
    total = count = 0.0
    for line in lines:
        value, n = line["probe"]["changes"][condition][side][bin_], line["probe"]["counts"][side][bin_]
        if value is not None:
            total, count = total + value * n, count + n
    return total / count if count else None


def matched_table(results: Results) -> str:
    """Unlearning of good rejected responses by the score that a run reached."""
    bands = ((5.0, 5.5), (5.5, 6.0), (6.0, 6.5), (6.5, 7.0), (7.0, 7.5), (7.5, 8.0))
    body = []
    for kind, points in unlearnt(results).items():
        cells = []
        for low, high in bands:
            mine = [change for value, change in points if low <= value < high]
            cells.append(f"{statistics.median(mine):+.1f} ({len(mine)})" if mine else "")
        body.append([kind, *cells])
    return rows(["median nats (runs), by score reached", *(f"{low:g}-{high:g}" for low, high in bands)], body)


def claims_table(results: Results) -> str:
    """The paper's claims, as the plan tests them."""
    asked: list[tuple[str, str, str, str | None]] = [
        ("H1: RA minus DPO", "ra", "dpo", None),
        ("RA minus DPO asked with goal 10", "ra", "dpo", BEST),
        ("H2: Half-RA minus DPO", "half", "dpo", None),
        ("Half-RA minus RA", "half", "ra", None),
        ("H4: RA minus DPO of twice the steps", "ra", "dpo-2x", None),
        ("RA of twice the steps minus DPO of twice the steps", "ra-2x", "dpo-2x", None),
        ("RA minus DPO, both of four times the pairs and steps", "ra-4x", "dpo-4x", None),
        ("RA + plain pairs minus DPO", "original", "dpo", None),
        ("H4: RA minus its data never swapped", "ra", "never-swapped", None),
        ("chosen half minus DPO", "chosen", "dpo", None),
        ("score-conditioned SFT minus RA", "sft", "ra", None),
        ("RA + SFT minus RA", "ra-sft", "ra", None),
        ("best combination minus DPO", "combination", "dpo", None),
    ]
    body = []
    for name, arm, other, condition in asked:
        d = results.minus(arm, other, other_condition=condition)
        if d is not None:
            body.append([name, interval(d), student(d), f"{d.ahead}/{d.seeds}", d.verdict])
    return rows(["comparison", "points [bootstrap 95%]", "[t 95%]", "seeds ahead", "above 0"], body)


def knobs_table(results: Results, plan: Plan) -> str:
    """The dose-response."""
    best = plan.best_conditioned()
    body = []
    for knobs in KNOBS:
        arms = {arm: results.dosed(arm, knobs) for arm in ("dpo", "ra", best) if arm}
        if not arms["dpo"] or not arms["ra"]:
            continue
        cells = {arm: number(mean_of_merit(found)) for arm, found in arms.items()}
        body.append([
            knobs, str(len(arms["ra"])), cells["dpo"], cells["ra"], interval(between(arms["ra"], arms["dpo"])),
            number(mean_of(arms["ra"], "spearman")), cells.get(best or "", ""),
            interval(between(arms[best], arms["dpo"])) if best else "",
        ])  # fmt: skip
    name = title(best, results) if best else "best way"
    return rows(["world", "seeds", "DPO", "RA", "RA minus DPO", "RA: Spearman", name, f"{name} minus DPO"], body)


def mean_of_merit(found: dict[int, dict[str, Any]]) -> float | None:
    """The mean over lines of the figure that arms are compared by."""
    return statistics.fmean(merit(line) for line in found.values()) if found else None


def check_table(results: Results, plan: Plan) -> str:
    """The same comparison, with settings chosen in more worlds, for the arms for which that was done."""
    body = []
    dpo = results.rechosen("dpo")
    for arm in [*ARMS, "combination"]:
        if plan.chosen(arm, more=True) is None:
            continue
        found = results.rechosen(arm)
        if not found:
            continue
        d = between(found, dpo) if arm != "dpo" else None
        body.append([
            title(arm, results), setting(next(iter(found.values()))), "yes" if results.of("check", arm) else "no",
            number(results.merit(arm)), number(mean_of_merit(found)), interval(d),
            student(d), f"{d.ahead}/{d.seeds}" if d else "",
        ])  # fmt: skip
    head = [
        "arm", "setting chosen", "another one", "score before", "score", "minus DPO [bootstrap 95%]", "[t 95%]",
        "ahead",
    ]  # fmt: skip
    return rows(head, body)


def guidance_table(results: Results) -> str:
    """Score and fluency by weight, means over seeds."""
    body = []
    for arm in dict.fromkeys((*GUIDED, *GUIDED_PLAUSIBLY)):
        for stage, floor in (("guide", ""), ("plausible", f", floor {PLAUSIBILITY:g}")):
            for low, weight, figures in guided(results, arm, stage):
                against = "no goal" if low is None else f"goal {low:g}"
                body.append([
                    f"{title(arm, results)}, against {against}{floor}", f"{weight:g}",
                    number(figures["score"]), percent(figures["ten"]), number(figures["tokens"], 1),
                    number(figures["base_nats_per_token"]),
                ])  # fmt: skip
    return rows(["sampled from, at goal 10", "weight", "score", "10s", "tokens", "base nats/token"], body)


def temperature_table(results: Results) -> str:
    """Mean score as each arm is asked, by the temperature of sampling, and in how many seeds it is above DPO's."""
    dpo = results.of("plausible", "dpo")
    body = []
    for arm in GUIDED_PLAUSIBLY:
        lines = results.of("plausible", arm)
        if not lines:
            continue
        cells = []
        for i in range(len(TEMPERATURES)):
            scores = {seed: line["cool"][i]["score"] for seed, line in lines.items()}
            both = [seed for seed in scores if seed in dpo]
            ahead = sum(scores[seed] > dpo[seed]["cool"][i]["score"] for seed in both)
            cells.append(
                number(statistics.fmean(scores.values())) + (f" ({ahead}/{len(both)})" if arm != "dpo" else "")
            )
        body.append([title(arm, results), *cells])
    return rows(["mean score (seeds above DPO) at temperature", *(f"{t:g}" for t in TEMPERATURES)], body)


def bases_table(results: Results) -> str:
    """The bases, and what their worlds hold."""
    body = []
    for seed, line in results.of("base", "base").items():
        world, conditions = line["seen"]["world"], line["conditions"]
        body.append([
            str(seed), number(conditions["none"]["score"]), *(number(conditions[f"{g:g}"]["score"]) for g in GOALS),
            number(line["spearman"]), percent(world["top_scores"]),
            percent(world["good_losers"]), percent(world["bad_winners"]),
        ])  # fmt: skip
    head = [
        "world",
        "no goal",
        *(f"goal {g:g}" for g in GOALS),
        "Spearman",
        "scores of 9+",
        "good losers",
        "bad winners",
    ]
    return rows(head, body)


def cost(results: Results) -> str:
    """What it took."""
    runs = len(results.lines)
    cpu = sum(line["cpu_s"] for line in results.lines)
    wall = sum(line["wall_s"] for line in results.lines)
    return (
        f"{runs} runs, {cpu / 60:.0f} CPU minutes on one thread each ({cpu / max(runs, 1):.1f} s a run, worlds and "
        f"bases included), {wall / 60:.0f} minutes of processes waiting for a core or at work."
    )
