"""The study as jobs. A finished one is a line of results; what can be done next depends on the lines that are there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.study.settings import GOALS, Size
from benchmarks.study.worlds import KNOBS, times

#: Guidance weights, and what they are measured on.
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
GUIDED = ("base", "dpo", "ra", "sft", "ra-sft", "combination")
#: Added after the plan: guidance that leaves out tokens below this share of the likeliest one's probability.
PLAUSIBILITY = 0.1
TEMPERATURES = (1.0, 0.7, 0.4, 0.0)
GUIDED_PLAUSIBLY = ("base", "dpo", "ra-2x", "sft", "ra-sft")


@dataclass(frozen=True)
class Job:
    """One thing to do.

    Attributes:
        stage: ``base``, ``tune``, ``main``, ``knob``, ``guide``, ``plausible`` (guide with a floor), or ``check`` (as
            main, chosen in more worlds).
        arm: the arm; "" where there is none.
        trial: number of the setting, as the arm lists them.
        knobs: the world's setting.
        seed: the world's, the base's and the training order's.
    """

    stage: str
    arm: str
    trial: int
    knobs: str
    seed: int

    @property
    def key(self) -> str:
        """What its line is found by."""
        return f"{self.stage} {self.arm} {self.trial} {self.knobs} {self.seed}"


def slim(line: dict[str, Any]) -> dict[str, Any]:
    """The line as it is kept: without what no table reads, so that the file of results stays small.

    Scores by prompt only as the arm is asked (of DPO at the best goal too), between the ends of the goals the mean
    score alone; of tuning runs the figures of merit, and what became of rejected responses.
    """
    best, tune = f"{GOALS[-1]:g}", line["stage"] == "tune"
    kept = dict(line)
    if "conditions" in line:
        kept["conditions"] = {}
    for name, figures in line.get("conditions", {}).items():
        rich = not tune and (name == line["asks"] or (name == best and line["arm"] == "dpo"))
        wanted = ("score", "ten", "tokens", "base_nats_per_token", "by_prompt") if rich else ("score",)
        kept["conditions"][name] = {key: _rounded(figures[key]) for key in wanted if key in figures}
    if tune and "probe" in line:
        changes = line["probe"]["changes"]
        kept["probe"] = {"changes": {c: {"rejected": changes[c]["rejected"]} for c in ("none", "best")}}
    elif line["stage"] == "knob":
        kept.pop("probe", None)
    if "seen" in line:
        wanted_of = ("pairs", "training_pairs", "cut", "ways", "world")
        kept["seen"] = {k: v for k, v in line["seen"].items() if k in wanted_of and not (tune and k != "ways")}
    for name in ("guided", "cool"):
        if name in line:
            kept[name] = [{k: _rounded(v) for k, v in row.items() if k != "top"} for row in line[name]]
    return kept


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [round(v, 1) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def key_of(line: dict[str, Any]) -> str:
    """Of a line of results."""
    return Job(*(line[name] for name in ("stage", "arm", "trial", "knobs", "seed"))).key


def merit(line: dict[str, Any]) -> float:
    """The figure that arms are chosen and compared by: mean score of samples as the arm is asked for its best."""
    return float(line["conditions"][line["asks"]]["score"])


class Plan:
    """What there is to do.

    Args:
        size: of the study.
        lines: results that are there, by key.
    """

    def __init__(self, size: Size, lines: dict[str, dict[str, Any]]) -> None:
        from benchmarks.study import arms

        self.size, self.lines, self.arms = size, lines, arms

    def trials(self, arm: str, more: bool = False) -> list[Job]:
        """The tuning runs of an arm; with ``more`` those in the further tuning worlds too."""
        worlds = (*self.size.tuning, *(self.size.more_tuning if more else ()))
        return [Job("tune", arm, i, "default", seed) for i in range(self.size.trials) for seed in worlds]

    def chosen(self, arm: str, more: bool = False) -> int | None:
        """The setting with the best mean figure of merit in tuning; None while one of its runs is missing."""
        jobs = self.trials(arm, more)
        if not all(job.key in self.lines for job in jobs):
            return None
        scores: dict[int, float] = {}
        for job in jobs:
            scores[job.trial] = scores.get(job.trial, 0) + merit(self.lines[job.key])
        return max(scores, key=lambda trial: scores[trial])

    def tuned(self, arm: str, more: bool = False) -> float | None:
        """The figure of merit of the chosen setting in tuning."""
        trial = self.chosen(arm, more)
        if trial is None:
            return None
        mine = [merit(self.lines[job.key]) for job in self.trials(arm, more) if job.trial == trial]
        return sum(mine) / len(mine)

    def best_ways(self) -> tuple[str, str] | None:
        """The two ways that did best in tuning, in the order of the list; None while one is missing."""
        scores = {way: self.tuned(way) for way in self.arms.WAYS}
        if any(score is None for score in scores.values()):
            return None
        top = sorted(scores, key=lambda way: -(scores[way] or 0))[:2]
        first, second = sorted(top, key=self.arms.WAYS.index)
        return first, second

    def best_conditioned(self) -> str | None:
        """The third arm of the dose-response: the better of two ways, chosen in all tuning worlds."""
        scores = {name: self.tuned(name, more=True) for name in self.arms.DOSED}
        if any(score is None for score in scores.values()):
            return None
        return max(scores, key=lambda name: scores[name] or 0)

    def waves(self) -> Iterable[list[Job]]:
        """All jobs that can be named by now, the most telling first."""
        size = self.size
        names = [arm for arm in self.arms.ARMS if size.arms is None or arm in size.arms]
        heads = [arm for arm in names if arm in self.arms.HEADLINE]
        others = [arm for arm in names if arm not in self.arms.HEADLINE]
        ways = [a for a in others if a in self.arms.WAYS]
        rest = [a for a in others if a not in ways]
        every = (*size.tuning, *size.seeds)
        yield [Job("base", "base", 0, "default", seed) for seed in every]
        for group in (heads, ways):
            for arm in group:
                yield self.trials(arm)
            for arm in group:
                yield self._main(arm)
        yield self.trials("combination") if self.best_ways() else []
        yield self._main("combination")
        yield [Job("guide", arm, 0, "default", seed) for arm in GUIDED for seed in size.seeds]
        yield [Job("base", "base", 0, "default", seed) for seed in size.more_tuning]
        yield from self._check([arm for arm in self.arms.CHECKED if arm in names])
        yield [Job("plausible", arm, 0, "default", seed) for arm in GUIDED_PLAUSIBLY for seed in size.seeds]
        for arm in rest:
            yield self.trials(arm)
        for arm in rest:
            yield self._main(arm)
        few = size.seeds[: size.knob_seeds]
        for seeds in (few[:2], few[2:]):  # every world twice before one is seen three times
            yield from self._knobs(seeds)
        yield from self._check([arm for arm in self.arms.CHECKED_LAST if arm in (*names, "combination")])

    def _check(self, arms: list[str]) -> Iterable[list[Job]]:
        for arm in arms:
            yield self.trials(arm, more=True) if self.chosen(arm) is not None else []
        for arm in arms:
            again = self.chosen(arm, more=True)
            if again is not None and again != self.chosen(arm):
                yield [Job("check", arm, again, "default", seed) for seed in self.size.seeds]

    def _main(self, arm: str) -> list[Job]:
        trial = self.chosen(arm)
        return [] if trial is None else [Job("main", arm, trial, "default", seed) for seed in self.size.seeds]

    def _knobs(self, seeds: tuple[int, ...]) -> Iterable[list[Job]]:
        best = self.best_conditioned()
        for knobs in self.size.knobs or tuple(KNOBS):
            for arm in ("dpo", "ra", best) if knobs != "default" else ():
                trial = self.chosen(arm, more=True) if arm else None
                if arm and trial is not None:
                    yield [Job("knob", arm, trial, knobs, seed) for seed in seeds]

    def open(self) -> list[Job]:
        """The jobs that aren't done and have what they need, in order."""
        found: dict[str, Job] = {}
        for wave in self.waves():
            for job in wave:
                if job.key not in self.lines and self._ready(job):
                    found.setdefault(job.key, job)
        return list(found.values())

    def _ready(self, job: Job) -> bool:
        if job.stage == "base":
            return True
        if f"base base 0 {job.knobs} {job.seed}" not in self.lines and job.knobs == "default":
            return False
        arm = self.arms.ARMS.get(job.arm)
        if arm is not None and arm.needs:
            trial = self.chosen(arm.needs)
            stage = "tune" if job.seed in self.size.tuning else "main"
            return trial is not None and Job(stage, arm.needs, trial, "default", job.seed).key in self.lines
        if job.stage in ("guide", "plausible") and job.arm != "base":
            trial = self.chosen(job.arm)
            return trial is not None and Job("main", job.arm, trial, "default", job.seed).key in self.lines
        return True

    def total(self) -> int:
        """How many jobs there will be in all, as far as that is known."""
        size = self.size
        arms = len(size.arms or self.arms.ARMS) + 1
        guided = (len(GUIDED) + len(GUIDED_PLAUSIBLY)) * len(size.seeds)
        knobs = (len(size.knobs) if size.knobs else len(KNOBS) - 1) * 3 * size.knob_seeds
        checked = len((*self.arms.CHECKED, *self.arms.CHECKED_LAST)) * size.trials * len(size.more_tuning)
        worlds = len((*size.tuning, *size.more_tuning, *size.seeds))
        return arms * (size.trials * len(size.tuning) + len(size.seeds)) + worlds + guided + knobs + checked

    def context(self, job: Job) -> dict[str, Any]:
        """What a job must know of the others: the combination's parts, the trials of arms that it needs."""
        more: dict[str, Any] = {}
        if job.arm == "combination":
            ways = self.best_ways()
            assert ways is not None, "a combination is named when its ways are known"
            more["ways"] = [(way, self.chosen(way)) for way in ways]
        needed = self.arms.ARMS[job.arm].needs if job.arm in self.arms.ARMS else None
        if needed:
            more["needs"] = (needed, self.chosen(needed))
        if job.stage in ("guide", "plausible") and job.arm != "base":
            more["trial"] = self.chosen(job.arm)
        return more


def run(job: Job, context: dict[str, Any], root: Path, size: Size) -> dict[str, Any]:
    """Do a job; the line that says what came of it. Runs in a process of its own pool."""
    wall, cpu = time.perf_counter(), time.process_time()
    do: Callable[..., dict[str, Any]] = _guide if job.stage in ("guide", "plausible") else _fit
    line = slim({**asdict(job), **do(job, context, root, size)})
    return {**line, "cpu_s": round(time.process_time() - cpu, 2), "wall_s": round(time.perf_counter() - wall, 2)}


def _world(job: Job, root: Path, size: Size) -> tuple[Path, Any, Any]:
    """The world's folder, its base model and tokenizer."""
    import torch
    from benchmarks.study.worlds import world

    from rap_lightning.models.policy_config import PolicyConfig

    folder = world(root, job.knobs, job.seed, size)
    config = PolicyConfig(str(folder / "base"))
    return folder, config.build(torch.float32).eval(), config.load_tokenizer()


def combined(ways: list[tuple[str, int]], trial: int) -> tuple[Any, dict[str, float]]:
    """The recipe maker and setting of a combination of two ways: what each chose, at two rates and two betas."""
    from benchmarks.study import arms

    from rap_lightning.preferences.filters import Filters

    own: dict[str, float] = {}
    for way, number in ways:
        own |= {k: v for k, v in arms.ARMS[way].trials[number].items() if k not in ("lr", "beta")}
    setting = {**own, **arms.USUAL[trial]}
    names = [way for way, _ in ways]

    def data(t: dict[str, float]) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if "weight" in names:
            options["rejected_weight"] = t["weight"]
        if "gap" in names:
            options["filters"] = Filters(min_gap=t["gap"])
        if "original" in names:
            options["keep_original"] = True
        return options

    loss = arms.mixed if "ra-sft" in names else arms.dpo
    warm = arms._warm if "warm" in names else (lambda t, steps: None)
    return arms.relabelled(loss, data, warm_up=warm), setting


def _weights(root: Path, arm: str, trial: int, knobs: str, seed: int) -> Path:
    return root / "weights" / f"{arm}-{trial}-{knobs.replace(' ', '-')}-{seed}.pt"


def _fit(job: Job, context: dict[str, Any], root: Path, size: Size) -> dict[str, Any]:
    import torch
    from benchmarks.study import arms, fitting, measuring

    folder, base, tokenizer = _world(job, root, size)
    prompts, pairs = measuring.held_out(folder)
    seen: dict[str, Any]
    if job.arm == "base":
        policy, template, asks, setting = base, None, "10", {}
        record = json.loads((folder / "world.json").read_text())["figures"]
        seen = {
            "world": {k: record["train"][k] for k in ("mean_score", "top_scores", "good_losers", "bad_winners", "ties")}
        }
    else:
        if job.arm == "combination":
            recipe_of, setting = combined(context["ways"], job.trial)
            arm = arms.Arm("combination", (), recipe_of)
        else:
            arm = arms.ARMS[job.arm]
            setting = arm.trials[job.trial]
            recipe_of = arm.recipe
        if arm.needs:
            _write_implicit_rewards(folder, context["needs"], job, base, tokenizer, root)
        recipe = recipe_of(folder, setting, round(size.steps * arm.steps * times(job.knobs)))
        policy, seen = fitting.fit(folder / "base", recipe, size.batch, job.seed)
        template, asks = recipe.goal or arm.template(), "none" if arm.asks == "none" else "10"
        path = _weights(root, job.arm, job.trial, job.knobs, job.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(policy.causal_lm.state_dict(), path)
        if job.arm == "combination":
            seen["ways"] = [way for way, _ in context["ways"]]
    asker = measuring.Asker(tokenizer, template)
    lean = job.stage == "tune"  # tuning needs the figure of merit and the probe alone
    only = None if asks == "none" else GOALS[-1]
    found = measuring.sampled(policy, base, asker, prompts, size, seed=job.seed, only=(only,) if lean else None)
    line = {"asks": asks, "setting": setting, "seen": seen, **found}
    if job.seed not in size.more_tuning and job.stage != "knob":  # there nothing is looked at but scores
        line["probe"] = measuring.probed(policy, base, asker, pairs, size)
    return line


def _load(folder: Path, path: Path) -> Any:
    import torch

    from rap_lightning.models.policy_config import PolicyConfig

    policy = PolicyConfig(str(folder / "base")).build(torch.float32)
    policy.causal_lm.load_state_dict(torch.load(path, weights_only=True))
    return policy.eval()


def _write_implicit_rewards(
    folder: Path, needs: tuple[str, int], job: Job, base: Any, tokenizer: Any, root: Path
) -> None:
    """The training pairs with β-less implicit rewards of this world's DPO policy for scores (IRA)."""
    from benchmarks.study import fitting
    from benchmarks.study.worlds import derived

    def make(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        pairs = list(rows)
        policy = _load(folder, _weights(root, needs[0], needs[1], job.knobs, job.seed))
        found = fitting.implicit_rewards(policy, base, tokenizer, pairs)
        for i, pair in enumerate(pairs):
            sides = {side: pair[side] for side in ("chosen", "rejected")}
            yield {**sides, "score_chosen": found[2 * i], "score_rejected": found[2 * i + 1]}

    derived(folder, "implicit-rewards", make)


def _guide(job: Job, context: dict[str, Any], root: Path, size: Size) -> dict[str, Any]:
    """Samples at the best goal, pushed away from the lowest goal and from no goal, at several weights.

    With a floor: against the lowest goal only, and, apart from guidance, samples as the arm is asked, at temperatures.
    """
    from benchmarks.study import arms, measuring

    folder, base, tokenizer = _world(job, root, size)
    policy = (
        base if job.arm == "base" else _load(folder, _weights(root, job.arm, context["trial"], job.knobs, job.seed))
    )
    prompts, _ = measuring.held_out(folder)
    asker = measuring.Asker(tokenizer, None)
    sampler = measuring.Sampler(policy, asker, prompts, job.seed)
    floor = PLAUSIBILITY if job.stage == "plausible" else None
    rows = []
    for low in (GOALS[0], None) if floor is None else (GOALS[0],):
        for weight in WEIGHTS:
            if weight == 0 and low is None:
                continue
            samples = sampler(GOALS[-1], max(1, size.samples // 2), guidance=weight, low=low, plausibility=floor)
            figures = measuring.figures_of(samples, base, asker, by_prompt=False)
            rows.append({"low": low, "weight": weight, **figures})
    if floor is None:
        return {"guided": rows}
    asked = None if job.arm in arms.ARMS and arms.ARMS[job.arm].asks == "none" else GOALS[-1]
    cool = []
    for temperature in TEMPERATURES:
        samples = sampler(asked, max(1, size.samples // 2) if temperature else 1, temperature=temperature)
        cool.append({"temperature": temperature, **measuring.figures_of(samples, base, asker, by_prompt=False)})
    return {"guided": rows, "cool": cool}
