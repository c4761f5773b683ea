"""On-policy training: rounds of generate, score, select, relabel and fit.

:func:`run_rounds` runs one :class:`Round` after the other; :meth:`Round.run` lists its stages in order. Every stage
writes files and is skipped if they are up to date (:mod:`rap_lightning.onpolicy.stages`).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError, DataError
from rap_lightning.onpolicy import round_fit, round_pairs
from rap_lightning.onpolicy.engines import Engine
from rap_lightning.onpolicy.jsonl_ledger import (
    digest_of,
    meta_path,
    parts_of,
    plain_values,
    read_meta,
    read_rows,
    write_json,
)
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.model_source import ModelSource
from rap_lightning.onpolicy.requested_goals import GoalOption, RequestedGoal, goal_config, resolve, template_writes
from rap_lightning.onpolicy.response_generator import ResponseGenerator
from rap_lightning.onpolicy.scoring import score_file
from rap_lightning.onpolicy.stages import Stages, digest_of_paths
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.pairs import Message
from rap_lightning.preferences.relabelling import Relabelling
from rap_lightning.preferences.rules import Rules

if TYPE_CHECKING:
    from rap_lightning.models.generation import Generation

Goals = GoalOption | list[GoalOption]
History = Sequence[Message]
SAMPLES, SCORED, PAIRS, GOAL, VIEW = "samples.jsonl", "scored.jsonl", "pairs.jsonl", "goal.yaml", "relabelled.parquet"
MODEL, CONFIG, RUN = "model", "fit.yaml", "run"


@dataclass(frozen=True)
class RoundsPlan:
    """The options of all rounds; the docstring of the command describes each."""

    folder: Path
    histories: Sequence[History]
    held_out: Sequence[History]
    initial: ModelSource
    rounds: int
    engine: Engine
    judge: Judge
    generation: Generation
    samples: int
    first_goals: Goals
    sample_goals: Goals
    rules: Rules
    scale: Literal["refit", "keep"]
    policy: Literal["latest", "initial"]
    reference: Literal["policy", "initial"]
    fit: dict[str, Any]
    parts: int
    held_out_samples: int
    max_failed: float
    max_prompt_length: int | None
    seed: int


def run_rounds(plan: RoundsPlan) -> list[dict[str, Any]]:
    """Run all unfinished stages, and write ``rounds.json``."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    latest, rows = plan.initial, []
    for number in range(1, plan.rounds + 1):
        one = Round(plan, number, latest)
        rows.append(one.run())
        latest = one.trained
        write_json(plan.folder / "rounds.json", rows)
    return rows


class Round:
    """Round ``number``, from 1, on responses of the model ``sampled``."""

    def __init__(self, plan: RoundsPlan, number: int, sampled: ModelSource) -> None:
        self.plan, self.number, self.sampled = plan, number, sampled
        self.folder = plan.folder / f"round-{number}"
        self.folder.mkdir(exist_ok=True)
        self.stages = Stages(self.folder, f"round {number}")
        self.policy = plan.initial if plan.policy == "initial" else sampled
        self.trained = ModelSource(str(self.folder / MODEL), trust_remote_code=plan.initial.trust_remote_code)

    def run(self) -> dict[str, Any]:
        """Run the stages in order; return the round's row of ``rounds.json``."""
        print(f"== round {self.number} of {self.plan.rounds}: sampling from {self.sampled.path}", flush=True)
        if not (self.folder / CONFIG).is_file():
            self.check_fit()
        generated = self._generate()
        scored = self._score(generated)
        rules = self._rules()
        pairs = self._select(scored, rules)
        relabelled = self._relabel(scored, pairs, rules)
        self._fit(pairs, relabelled)
        row: dict[str, Any] = {"round": self.number, "model": os.path.relpath(self.trained.path, self.plan.folder)}
        row |= _summary(self.folder / SCORED) | {"pairs": sum(1 for _ in read_rows([self.folder / PAIRS]))}
        if self.plan.held_out:
            measured = [self._measure("before", self.plan.initial)] if self.number == 1 else []
            measured.append(self._measure("after", self.trained))
            for one in measured:
                print("  {model}: {mean:.3f} ± {error:.3f} at the best goal, {count} responses".format_map(one))
            row["held_out"] = measured
        return row

    # -- stages: each returns the digest of its result ----------------------------------------------------------------

    def _generate(self) -> str:
        plan = self.plan
        histories = list(plan.histories)[(self.number - 1) % plan.parts :: plan.parts]
        goals = self._goals(plan.first_goals if self.number == 1 else plan.sample_goals)
        inputs = digest_of(
            self.sampled.identity(), type(plan.engine).__name__, plan.engine.settings(), asdict(plan.generation),
            plan.samples, [goal.stated.key for goal in goals], plan.seed, plan.max_prompt_length,
            digest_of(list(map(list, histories))),
        )  # fmt: skip
        also = [SAMPLES + ".meta.json", SAMPLES + ".failed.jsonl"]
        seed = plan.seed + self.number
        make = lambda: self._sample(self.sampled, histories, SAMPLES, goals, plan.samples, seed)  # noqa: E731
        return self.stages.run("generate", inputs, [SAMPLES], make, also)

    def _score(self, generated: str) -> str:
        inputs = digest_of(generated, self.plan.judge.settings())
        also = [meta_path(self.folder / SCORED).name]
        return self.stages.run("score", inputs, [SCORED], lambda: self._judge(SAMPLES, SCORED), also)

    def _rules(self) -> Rules:
        plan = self.plan
        goal = copy.deepcopy(plan.rules.goal)
        if plan.scale == "keep" and self.number > 1:
            goal = round_pairs.parse_goal(round_pairs.read_goal(plan.folder / "round-1" / GOAL)["goal"])
        return replace(plan.rules, goal=goal)

    def _select(self, scored: str, rules: Rules) -> str:
        inputs = digest_of(scored, rules.describe())
        source = self.folder / SCORED
        round_pairs.fit_scale_to(source, rules)
        make = lambda: round_pairs.write_pairs(source, rules, self.folder / PAIRS)  # noqa: E731
        return self.stages.run("select", inputs, [PAIRS], make, [round_pairs.REPORT])

    def _relabel(self, scored: str, pairs: str, rules: Rules) -> str:
        assert rules.goal is not None, "rounds are about goals"
        inputs = digest_of(scored, goal_config(rules.goal), vars(rules.relabelling), rules.ties)
        made = self.stages.run("relabel", inputs, [GOAL], lambda: round_pairs.write_goal(rules, self.folder / GOAL))
        view = self.folder / VIEW
        known = self.stages.state.get("view", {})
        if view.exists() and "made" in known and digest_of_paths([view]) != known["made"]:
            raise ConfigError(
                f"{view} was changed by hand, but it only shows what {PAIRS} and {GOAL} make: edit those, and "
                f"remove {VIEW}."
            )

        seed = round_fit.data_seed(self.plan.fit)

        def make() -> None:
            options = round_pairs.read_goal(self.folder / GOAL)  # possibly edited by hand
            as_edited = replace(
                rules, goal=round_pairs.parse_goal(options["goal"]), selection=None, filters=Filters(),
                relabelling=Relabelling(
                    options.get("relabel", "both"), options.get("keep_original", False), seed,
                    options.get("best_goal", False), options.get("goals_per_pair", 0),
                ),
                ties=options.get("ties", "drop"),
            )  # fmt: skip
            round_pairs.write_view(self.folder / PAIRS, as_edited, self.policy, view)

        self.stages.run("view", digest_of(made, pairs, seed), [VIEW], make)
        return made

    def _fit(self, pairs: str, relabelled: str) -> str:
        plan = self.plan
        initial = plan.initial.identity() if plan.reference == "initial" else None
        inputs = digest_of(pairs, relabelled, plan.fit, plan.reference, [self.policy.identity(), initial])
        config = self._config(round_pairs.read_goal(self.folder / GOAL))

        def make() -> None:
            record = self.policy.record()
            if record is not None and template_writes(self.policy.fit_tokenizer(), record["best"]):
                raise ConfigError(
                    f"{self.policy.path}: its chat template writes a goal by itself, and training would write a second "
                    "one. Use the template that the model was trained with."
                )
            round_fit.write_config(self.folder / CONFIG, config)
            trained = round_fit.run_fit(self.folder / CONFIG, self.folder / RUN)
            link = self.folder / MODEL
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(trained, self.folder), target_is_directory=True)

        return self.stages.run("fit", inputs, [MODEL], make, [RUN, CONFIG])

    def _measure(self, when: Literal["before", "after"], model: ModelSource) -> dict[str, Any]:
        """Return the rewards of a model at its best goal, on prompts that no round trains on."""
        plan = self.plan
        samples, scored = f"held_out-{when}.jsonl", f"held_out-{when}-scored.jsonl"
        template = round_pairs.parse_goal(round_pairs.read_goal(self.folder / GOAL)["goal"])
        goal = resolve("best", None, template)
        inputs = digest_of(
            model.identity(), plan.engine.settings(), asdict(plan.generation), goal.stated.key, plan.held_out_samples,
            plan.seed, plan.judge.settings(), digest_of(list(map(list, plan.held_out))),
        )  # fmt: skip

        def make() -> None:
            self._sample(model, plan.held_out, samples, [goal], plan.held_out_samples, plan.seed)
            self._judge(samples, scored)

        also = [f"{name}.meta.json" for name in (scored, samples)]
        self.stages.run(f"measure-{when}", inputs, [scored, samples], make, also)
        rewards = [reward for row in _rewards(self.folder / scored) for reward in row if reward is not None]
        error = stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else 0.0
        name = "before" if when == "before" else f"round {self.number}"
        return {"model": name, "mean": fmean(rewards), "error": error, "count": len(rewards)}

    # -- parts of stages ----------------------------------------------------------------------------------------------

    def _goals(self, options: Goals) -> list[RequestedGoal]:
        listed = options if isinstance(options, list) else [options]
        record = self.sampled.record()
        template = None if record is not None or set(listed) == {"none"} else self.plan.rules.goal
        return [resolve(option, record, template) for option in listed]

    def _sample(
        self, model: ModelSource, histories: Sequence[History], name: str, goals: list[RequestedGoal], samples: int,
        seed: int,
    ) -> None:  # fmt: skip
        plan = self.plan
        with ResponseGenerator(model, plan.engine, max_prompt_length=plan.max_prompt_length) as generator:
            summary = generator.run(histories, self.folder / name, goals, plan.generation, samples, seed)
        self._check_failed(
            len(summary.failed), summary.total, "generated", f"They are listed in {self.folder / name}.failed.jsonl"
        )  # fmt: skip

    def _judge(self, samples: str, scored: str) -> None:
        """Score samples. Verdicts belong to texts, so those of unchanged responses are used again."""
        output = self.folder / scored
        verdicts = self.folder / f"{scored}.verdicts.jsonl"
        if verdicts.is_file() and read_meta(verdicts).get("settings") != plain_values(self.plan.judge.settings()):
            self.stages.move_to_old("verdicts", [verdicts, meta_path(verdicts)])
        for leftover in (output, meta_path(output)):
            leftover.unlink(missing_ok=True)  # of an interrupted run with the same inputs
        summary = score_file(str(self.folder / samples), output, self.plan.judge)
        try:
            self._check_failed(summary.failed, summary.responses, "judged", "Verdicts are kept")
        except DataError:
            output.unlink()
            raise

    def _check_failed(self, failed: int, total: int, what: str, kept: str) -> None:
        if failed > self.plan.max_failed * total:
            raise DataError(
                f"{failed:,} of {total:,} responses could not be {what}, more than --max_failed "
                f"{self.plan.max_failed:g} allows. {kept}; start the same rounds again to retry them."
            )

    def _config(self, relabelling: dict[str, Any]) -> dict[str, Any]:
        policy, initial = (
            str(model.place.resolve()) if model.place.exists() else model.path
            for model in (self.policy, self.plan.initial)
        )
        return round_fit.fit_config(
            self.plan.fit, policy, initial, self.folder / PAIRS, relabelling, self.folder / RUN, self.plan.reference
        )

    def check_fit(self) -> None:
        """Have fit parse its options before hours of sampling."""
        draft = self.folder / ".fit-draft.yaml"
        try:
            round_fit.write_config(draft, self._config(round_pairs.relabel_options(self.plan.rules)))
            round_fit.check_config(draft)
        finally:
            draft.unlink(missing_ok=True)


def _rewards(scored: Path) -> list[list[float | None]]:
    """Return the rewards of each prompt's responses."""
    return [[one["overall_score"] for one in row["completions"]] for row in read_rows(parts_of(scored))]


def _summary(scored: Path) -> dict[str, Any]:
    rows = _rewards(scored)
    rewards = [reward for row in rows for reward in row if reward is not None]
    tied = sum(len(set(row)) < 2 for row in rows)
    return {"responses": len(rewards), "mean_reward": fmean(rewards), "prompts_with_tied_rewards": tied}
