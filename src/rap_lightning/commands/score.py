"""``rap-lightning score``: rewards for responses."""

from __future__ import annotations

from pathlib import Path

from rap_lightning.onpolicy.judges import Judge


def score(source: str, judge: Judge, output: str, split: str | None = None) -> int:
    """Judge responses, and write them as training data: on each line a prompt with its scored responses.

    Example: rap-lightning score --source samples.jsonl --judge RewardModel --judge.model RM --output scored.jsonl

    With a language model as judge: --judge LLMJudge --judge.url http://localhost:8000/v1 --judge.model NAME
    With a Python function: --judge Function --judge.function my_judge.score
    With the implicit reward of DPO: --judge ImplicitReward --judge.model runs/dpo/hf --judge.base BASE
    With the fluency to a base model: --judge Likelihood --judge.model BASE

    Then: rap-lightning inspect --source scored.jsonl, and fit with --data.source scored.jsonl. A reward model's numbers
    have no fixed range: state goals by --data.goal.scale LinearScale or QuantileScale, which are fitted to them.

    Verdicts are written to OUTPUT.verdicts.jsonl as they come: a stopped run resumes, and no response is judged twice.
    The exit code is 1 if responses have no reward.

    Args:
        source: output of generate (shards are found), or prompts with completions to score again.
        judge: RewardModel, LLMJudge, Function, ImplicitReward or Likelihood, or a class by import path.
        output: JSON lines to write. OUTPUT.meta.json holds the judge and its scale; one file never mixes two.
        split: split of the source, if it has several.
    """
    from rap_lightning.onpolicy.scoring import expected_responses, score_file

    summary = score_file(source, Path(output), judge, split)
    expected = expected_responses(source)
    if expected is not None and summary.responses < expected:
        print(f"  generate is unfinished: {summary.responses:,} of {expected:,} responses are there")
    return 1 if summary.failed else 0
