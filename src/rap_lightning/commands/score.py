"""``rap-lightning score``: rewards for responses."""

from __future__ import annotations

from pathlib import Path

from rap_lightning.commands.options import run as run_function
from rap_lightning.onpolicy.judges import Judge


def run(args: list[str]) -> int:
    """Parse and score."""
    return int(run_function(score, args, "score"))


def score(source: str, judge: Judge, output: str, split: str | None = None) -> int:
    """Judge responses, and write them as training data: on each line a prompt with its scored responses.

    Example: rap-lightning score --source samples.jsonl --judge RewardModel --judge.model RM --output scored.jsonl

    A language model as judge: --judge LLMJudge --judge.url http://localhost:8000/v1 --judge.model NAME
    A function of yours: --judge Function --judge.function my_judge.score
    What a model trained with DPO prefers: --judge ImplicitReward --judge.model runs/dpo/hf --judge.base BASE
    How fluent responses are to the base: --judge Likelihood --judge.model BASE

    Then: rap-lightning inspect --source scored.jsonl, and fit with --data.source scored.jsonl. A reward model's numbers
    have no fixed range: state goals by --data.goal.scale LinearScale or QuantileScale, which are fitted to them.

    Verdicts are on disk as they come, in OUTPUT.verdicts.jsonl: a run that was stopped goes on, and a response that is
    judged already is not judged again. It ends with 1 where responses are left without a reward.

    Args:
        source: what generate wrote (shards are found), or prompts with completions to be scored anew.
        judge: RewardModel, LLMJudge, Function, ImplicitReward or Likelihood, or a class of yours by import path.
        output: json lines to write. OUTPUT.meta.json holds the judge and its scale; one file never mixes two.
        split: of the source, where it has several.
    """
    from rap_lightning.onpolicy.scoring import expected, score_file

    scored = score_file(source, Path(output), judge, split)
    there = expected(source)
    if there is not None and scored.responses < there:
        print(f"  generate has {there:,} responses in mind, and {scored.responses:,} are there: it isn't finished")
    return 1 if scored.failed else 0
