"""Rounds of generate, score, select, relabel, fit. Every stage is a file; see :mod:`rap_lightning.onpolicy.stages`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy import fitting
from rap_lightning.onpolicy import round_pairs as select
from rap_lightning.onpolicy.asked_goals import Asked, GoalOption, config_of, resolve, writes
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.jsonl_ledger import digest_of, meta_path, parts_of, read_rows, write_json
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.response_generator import Generator
from rap_lightning.onpolicy.sampled_model import Model
from rap_lightning.onpolicy.scoring import score_file
from rap_lightning.onpolicy.stages import Stages, digest_of_paths
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.pairs import Message
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

Goals = GoalOption | list[GoalOption]
SAMPLES, SCORED, PAIRS, GOAL, VIEW = "samples.jsonl", "scored.jsonl", "pairs.jsonl", "goal.yaml", "relabelled.parquet"
MODEL, CONFIG, RUN = "model", "fit.yaml", "run"


@dataclass(frozen=True)
class Plan:
    """Everything that rounds are made of; the options of the command, which says what each means."""

    folder: Path
    histories: Sequence[Sequence[Message]]
    held_out: Sequence[Sequence[Message]]
    initial: Model
    rounds: int
    engine: Engine
    judge: Judge
    generation: Generation
    samples: int
    first_goals: Goals
    sample_goals: Goals
    goal: GoalTemplate
    scale: Literal["refit", "keep"]
    policy: Literal["latest", "initial"]
    reference: Literal["policy", "initial"]
    relabelling: Relabelling
    ties: Literal["drop", "chosen", "error"]
    selection: Selection | None
    filters: Filters
    fit: dict[str, Any]
    parts: int
    held_out_samples: int
    max_failed: float
    max_prompt_length: int | None
    seed: int
    parse_goal: Callable[[dict[str, Any]], GoalTemplate] = field(repr=False)
    """Makes the goal template of a config."""


@dataclass
class Measured:
    """Rewards of a model at its best goal, on prompts that no round trains on."""

    model: str
    mean: float
    error: float
    count: int


def run_rounds(plan: Plan) -> list[dict[str, Any]]:
    """Do what isn't done yet, and write ``rounds.json``.

    Raises:
        ConfigError: options that don't go together, or a stage that failed; it has said why.
        DataError: a round that nothing can be learnt from.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    latest, rows = plan.initial, []
    for number in range(1, plan.rounds + 1):
        one = Round(plan, number, latest)
        rows.append(one.run())
        latest = one.trained
        write_json(plan.folder / "rounds.json", rows)
    return rows


class Round:
    """One round.

    Args:
        plan: of all rounds.
        number: from 1.
        sampled: the model that responses are sampled from.
    """

    def __init__(self, plan: Plan, number: int, sampled: Model) -> None:
        self.plan, self.number, self.sampled = plan, number, sampled
        self.folder = plan.folder / f"round-{number}"
        self.folder.mkdir(exist_ok=True)
        self.stages = Stages(self.folder, f"round {number}")
        self.policy = plan.initial if plan.policy == "initial" else sampled
        self.trained = Model(str(self.folder / MODEL), trust_remote_code=plan.initial.trust_remote_code)

    def run(self) -> dict[str, Any]:
        """All stages; the round's row of the summary."""
        print(f"== round {self.number} of {self.plan.rounds}: sampling from {self.sampled.path}", flush=True)
        if not (self.folder / CONFIG).is_file():
            self._check_fit()
        generated = self._generate()
        scored = self._score(generated)
        rules = self._rules()
        pairs = self._select(scored, rules)
        relabelled = self._relabel(scored, pairs, rules)
        self._fit(pairs, relabelled)
        row: dict[str, Any] = {"round": self.number, "model": os.path.relpath(self.trained.path, self.plan.folder)}
        row |= _summary(self.folder / SCORED) | {"pairs": sum(1 for _ in read_rows([self.folder / PAIRS]))}
        if self.plan.held_out:
            before = [self._measure("before", self.plan.initial)] if self.number == 1 else []
            row["held_out"] = [vars(one) for one in [*before, self._measure("after", self.trained)]]
            for one in row["held_out"]:
                print(
                    f"  {one['model']}: {one['mean']:.3f} ± {one['error']:.3f} at the best goal, {one['count']} "
                    "responses"
                )
        return row

    # -- stages ---------------------------------------------------------------------------------------------------

    def _generate(self) -> str:
        plan = self.plan
        histories = list(plan.histories)[(self.number - 1) % plan.parts :: plan.parts]
        asked = self._asked(plan.first_goals if self.number == 1 else plan.sample_goals)
        inputs = digest_of(
            self.sampled.identity(), type(plan.engine).__name__, plan.engine.settings(), vars(plan.generation),
            plan.samples, [one.text for one in asked], plan.seed, plan.max_prompt_length,
            digest_of(list(map(list, histories))),
        )  # fmt: skip

        def make() -> None:
            self._sample(self.sampled, histories, SAMPLES, asked, plan.samples, plan.seed + self.number)

        return self.stages.run(
            "generate", inputs, [SAMPLES], make, also=[SAMPLES + ".meta.json", SAMPLES + ".failed.jsonl"]
        )

    def _sample(
        self,
        model: Model,
        histories: Sequence[Sequence[Message]],
        name: str,
        asked: list[Asked],
        samples: int,
        seed: int,
    ) -> None:
        plan = self.plan
        with Generator(model, plan.engine, max_prompt_length=plan.max_prompt_length) as generator:
            outcome = generator.run(histories, self.folder / name, asked, plan.generation, samples, seed)
        if outcome.failed > plan.max_failed * outcome.total:
            raise DataError(
                f"{outcome.failed:,} of {outcome.total:,} responses could not be generated, more than --max_failed "
                f"{plan.max_failed:g} lets pass; they are listed in {self.folder / name}.failed.jsonl. Start "
                "the same rounds again "
                "to ask for them once more."
            )

    def _score(self, generated: str) -> str:
        inputs = digest_of(generated, self.plan.judge.settings())
        also = [meta_path(self.folder / SCORED).name]
        verdicts = self.folder / f"{SCORED}.verdicts.jsonl"
        return self.stages.run("score", inputs, [SCORED], lambda: self._judge(SAMPLES, SCORED, verdicts), also=also)

    def _judge(self, samples: str, scored: str, verdicts: Path) -> None:
        """Verdicts know their responses by content: those of responses that are still there are used again."""
        import json

        settings = json.loads(json.dumps(self.plan.judge.settings()))
        if verdicts.is_file():
            from rap_lightning.onpolicy.jsonl_ledger import read_meta

            if read_meta(verdicts).get("settings") != settings:
                self.stages.aside("verdicts", [verdicts, meta_path(verdicts)])
        for leftover in (self.folder / scored, meta_path(self.folder / scored)):
            leftover.unlink(missing_ok=True)  # of an interrupted run of the same inputs
        outcome = score_file(str(self.folder / samples), self.folder / scored, self.plan.judge)
        if outcome.failed > self.plan.max_failed * outcome.responses:
            (self.folder / scored).unlink()
            raise DataError(
                f"{outcome.failed:,} of {outcome.responses:,} responses could not be judged, more than --max_failed "
                f"{self.plan.max_failed:g} lets pass. Verdicts are kept; start the same rounds again to ask for "
                "the others."
            )

    def _rules(self) -> Rules:
        plan = self.plan
        goal = copy.deepcopy(plan.goal)
        if plan.scale == "keep" and self.number > 1:
            goal = plan.parse_goal(select.read_goal(plan.folder / "round-1" / GOAL)["goal"])
        return Rules(goal, plan.relabelling, plan.ties, plan.selection, plan.filters, tool_turns=False)

    def _select(self, scored: str, rules: Rules) -> str:
        inputs = digest_of(scored, rules.describe())
        select.fitted(self.folder / SCORED, rules)

        def make() -> None:
            select.write_pairs(self.folder / SCORED, rules, self.folder / PAIRS)

        return self.stages.run("select", inputs, [PAIRS], make, also=[select.REPORT])

    def _relabel(self, scored: str, pairs: str, rules: Rules) -> str:
        assert rules.goal is not None, "rounds are about goals"
        inputs = digest_of(scored, config_of(rules.goal), vars(rules.relabelling), rules.ties)
        made = self.stages.run("relabel", inputs, [GOAL], lambda: select.write_goal(rules, self.folder / GOAL))
        options = select.read_goal(self.folder / GOAL)
        view = self.folder / VIEW
        known = self.stages.state.get("view", {})
        if view.exists() and "made" in known and digest_of_paths([view]) != known["made"]:
            raise ConfigError(
                f"{view} was changed by hand, but it only shows what {PAIRS} and {GOAL} make: edit those, and "
                f"remove {VIEW}."
            )

        def make() -> None:
            relabelling = Relabelling(options.get("relabel", "both"), options.get("keep_original", False))
            as_edited = replace(
                rules, goal=self.plan.parse_goal(options["goal"]), relabelling=relabelling, selection=None,
                filters=Filters(),
                ties=options.get("ties", "drop"),
            )  # fmt: skip
            select.write_view(self.folder / PAIRS, as_edited, self.policy, view)

        self.stages.run("view", digest_of(made, pairs), [VIEW], make)
        return made

    def _fit(self, pairs: str, relabelled: str) -> str:
        plan, run = self.plan, self.folder / RUN
        config = self._config(select.read_goal(self.folder / GOAL))
        identity = [self.policy.identity(), plan.initial.identity() if plan.reference == "initial" else None]
        inputs = digest_of(pairs, relabelled, plan.fit, plan.reference, identity)

        def make() -> None:
            record = self.policy.record()
            if record is not None and writes(self.policy.fit_tokenizer(), record["best"]):
                raise ConfigError(
                    f"{self.policy.path}: its chat template writes a goal by itself, and training would write a "
                    "second one. Use "
                    "the template that the model was trained with."
                )
            fitting.write_config(self.folder / CONFIG, config)
            trained = fitting.run_fit(self.folder / CONFIG, run)
            link = self.folder / MODEL
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(trained, self.folder), target_is_directory=True)

        return self.stages.run("fit", inputs, [MODEL], make, also=[RUN, CONFIG])

    def _config(self, relabelling: dict[str, Any]) -> dict[str, Any]:
        plan = self.plan
        paths = [
            str(model.place.resolve()) if model.place.exists() else model.path for model in (self.policy, plan.initial)
        ]
        return fitting.fit_config(
            plan.fit, paths[0], paths[1], self.folder / PAIRS, relabelling, self.folder / RUN, plan.reference
        )

    def _check_fit(self) -> None:
        """Find out before hours of sampling that fit would refuse its options."""
        body = {"goal": config_of(self.plan.goal), "relabel": self.plan.relabelling.mode}
        draft = self.folder / ".fit-draft.yaml"
        try:
            fitting.write_config(draft, self._config(body))
            fitting.check(draft)
        finally:
            draft.unlink(missing_ok=True)

    def _measure(self, when: str, model: Model) -> Measured:
        plan = self.plan
        names = [f"held_out-{when}.jsonl", f"held_out-{when}-scored.jsonl"]
        template = plan.parse_goal(select.read_goal(self.folder / GOAL)["goal"])
        asked = [resolve("best", None, template)]
        inputs = digest_of(
            model.identity(), plan.engine.settings(), vars(plan.generation), asked[0].text, plan.held_out_samples,
            plan.seed,
            plan.judge.settings(), digest_of(list(map(list, plan.held_out))),
        )  # fmt: skip

        def make() -> None:
            self._sample(model, plan.held_out, names[0], asked, plan.held_out_samples, plan.seed)
            self._judge(names[0], names[1], self.folder / f"{names[1]}.verdicts.jsonl")

        self.stages.run(f"measure-{when}", inputs, [names[1], names[0]], make, also=[f"{n}.meta.json" for n in names])
        rewards = [
            c["overall_score"] for row in read_rows([self.folder / names[1]]) for c in row["completions"]
            if c["overall_score"] is not None
        ]  # fmt: skip
        error = stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0
        label = "before" if when == "before" else f"round {self.number}"
        return Measured(label, fmean(rewards), error, len(rewards))

    def _asked(self, goals: Goals) -> list[Asked]:
        options = goals if isinstance(goals, list) else [goals]
        record = self.sampled.record()
        template = None if record is not None or set(options) == {"none"} else self.plan.goal
        return [resolve(option, record, template) for option in options]


def _summary(scored: Path) -> dict[str, Any]:
    rows = list(read_rows(parts_of(scored)))
    rewards = [c["overall_score"] for row in rows for c in row["completions"] if c["overall_score"] is not None]
    tied = sum(len({c["overall_score"] for c in row["completions"]}) < 2 for row in rows)
    return {"responses": len(rewards), "mean_reward": fmean(rewards), "prompts_with_tied_rewards": tied}
