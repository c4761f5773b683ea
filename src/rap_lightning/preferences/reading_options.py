"""How scored preferences are read: the options that fit, inspect and relabel share.

They are declared here once. The data module and the commands take them as ``**reading`` and pass them on; jsonargparse
follows that, and lists them in each command's help and config as if they were declared there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from rap_lightning.errors import ConfigError
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.judge import Judge, rated_goal
from rap_lightning.preferences.read_pairs import fit_scale
from rap_lightning.preferences.relabelling import UNCONDITIONED, Mode, Relabelling
from rap_lightning.preferences.rewards import RewardTable
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection
from rap_lightning.preferences.sources import VALIDATION_NAMES, Source, as_sources, having
from rap_lightning.preferences.template_options import TemplateOptions
from rap_lightning.preferences.thoughts import Thinking


class ReadingOptions:
    """Where scored pairs are read from, and what is done with them.

    Args:
        source: a parquet, arrow, json or json-lines file (text also compressed), a folder of them, or a Hub id; or a
            list of sources with weights.
        goal: how the goal reads in the prompt; null trains on the plain pairs, without goals (the usual DPO), and needs
            no scores.
        relabel: both halves of each pair (the paper), the chosen or the rejected one only, none (plain pairs, chosen by
            the same rules: the baseline), or half (both halves of a seeded half of the prompts: the paper's Half-RA).
            By default both, and none where there is no goal.
        keep_original: also train on each pair without a goal.
        best_goal: also train on each pair under the best goal, where the response with the higher reward wins. Pairs
            for which one of the own goals is the best goal already are not trained on twice, and counted.
        goals_per_pair: also train on each pair under this many goals, drawn uniformly from the whole scale: under a
            goal, the response whose reward is nearer to it wins. A pair has the same ones in any order of the data. A
            draw that reads like the midpoint of the two rewards, or like another goal of the pair, is left out, and
            counted.
        ties: a pair whose goals print the same: drop it, keep its chosen half only, or stop with an error.
        rewards: a judge that gives every response its reward before training, in the place of the scores that the data
            have or lack: ImplicitReward (the log-ratio of a trained DPO model and its base, for data without scores),
            RewardModel, or any other that score takes. Rewards are kept in ~/.cache/rap-lightning, and computed once.
            Goals then state how a reward ranks in the training split (QuantileScale), unless the goal's scale maps them
            otherwise. Where rewards contradict the data's labels the higher reward wins, and they are counted.
        selection: which pairs are made of several responses to a prompt; by default the best against a random other,
            as in the paper (BestVsRandom; also BestVsWorst, AllPairs, AdjacentPairs).
        filters: what is left out on purpose, and counted.
        outside_scale: scores outside the goal's scale: stop with an error, drop such pairs or responses, or clip them.
        bad_rows: rows that can't be used: drop and count them, or stop with an error.
        format: of the rows: auto, pairs, completions, ultrafeedback, helpsteer, ranked, sharegpt, or the import path of
            a function that makes one of these of a row.
        columns: new names for columns, {theirs: ours}, as in {chosen_score: score_chosen}.
        weight_column: the column that holds a weight for each row: a pair's loss counts that much in the mean over an
            optimizer step, times the weight of its half. Rows of weight 0 are left out and counted, and so are those
            without a weight or with one below 0. Validation and logged means are of pairs, not weighted.
        num_proc: processes that read and tokenise; by default one.
        seed: of the half that relabel half takes, of what weights and goals_per_pair draw, and of the order in which
            pairs are trained on.
        thinking: thoughts in responses, between <think> and </think> or in a field reasoning_content: keep them,
            strip them, or leave the tags empty.
        chat_template: which of several named chat templates renders; by default the one called default.
        chat_template_kwargs: values of the chat template's switches, as in {enable_thinking: false}. Everything that
            renders has them, and the exported template has them as its defaults.
        tool_turns: keep conversations with tool calls; without a chat template that shows them they can't be used.
    """

    def __init__(
        self,
        source: str | list[Source],
        *,
        goal: GoalTemplate | None = OverallGoal(),  # noqa: B008 (immutable; jsonargparse wants an instance)
        relabel: Mode | None = None,
        keep_original: bool = False,
        best_goal: bool = False,
        goals_per_pair: int = 0,
        ties: Literal["drop", "chosen", "error"] = "drop",
        rewards: Judge | None = None,
        selection: Selection | None = None,
        filters: Filters = Filters(),  # noqa: B008
        outside_scale: Literal["error", "drop", "clip"] = "error",
        bad_rows: Literal["drop", "error"] = "drop",
        format: str = "auto",
        columns: dict[str, str] | None = None,
        weight_column: str | None = None,
        num_proc: int | None = None,
        seed: int = 42,
        thinking: Thinking = "keep",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tool_turns: bool = True,
    ) -> None:
        self.rewards, self.goal = rewards, rated_goal(rewards, goal)
        if self.goal is not None and not self.goal.needs_fit:
            self.goal.check_differ()
        self.sources, self.num_proc, self.seed = as_sources(source), num_proc, seed
        self.template = TemplateOptions(chat_template, chat_template_kwargs or {})
        self.relabelling = Relabelling.of(relabel, self.goal, keep_original, seed, best_goal, goals_per_pair)
        if isinstance(self.goal, AdapterStrength) and UNCONDITIONED in self.relabelling.origins:
            option = "keep_original" if self.relabelling.conditioned else "relabel none"
            raise ConfigError(
                f"{option} has no effect with goal AdapterStrength: a pair without a goal is one at strength 0, where "
                "the adapter is off and nothing is trained. Remove one of the two."
            )
        self.rules = Rules(
            self.goal, self.relabelling, ties, selection, filters, outside_scale, bad_rows, format, columns, tool_turns,
            thinking=thinking, weight_column=weight_column,
        )  # fmt: skip

    def rules_for(self, split: str, named: str | None) -> Rules:
        """Return the rules for a split; ``named`` is the one that the user asks for, of all where it is None.

        Weights of pairs are those of training: as in fit, a validation split is read without them unless it is named.
        """
        weighted = split not in VALIDATION_NAMES or split == named
        return self.rules if weighted else replace(self.rules, weight_column=None)

    def fit_on_training_split(self, splits: Sequence[str], rewards: Mapping[str, RewardTable] | None = None) -> bool:
        """Fit the goal's scale on the training split, or on the only split; returns whether the scale needed that."""
        if self.goal is None or not self.goal.needs_fit:
            return False  # a source without a training split is then no error
        split = "train" if "train" in splits or len(splits) > 1 else splits[0]
        rules = replace(self.rules, rewards=(rewards or {}).get(split))
        return fit_scale(rules, having(self.sources, split), split, num_proc=self.num_proc)
