"""``rap-lightning rounds``: on-policy training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.judges import Judge
from rap_lightning.onpolicy.requested_goals import GoalOption
from rap_lightning.preferences.adapter_strength import AdapterStrength
from rap_lightning.preferences.filters import Filters
from rap_lightning.preferences.goals import GoalTemplate, OverallGoal
from rap_lightning.preferences.relabelling import Mode, Relabelling
from rap_lightning.preferences.rules import Rules
from rap_lightning.preferences.selection import Selection


def rounds(
    prompts: str,
    model: str,
    output: str,
    judge: Judge,
    fit: dict,  # type: ignore[type-arg]  # dict[str, Any] would have jsonargparse fill in classes named inside
    rounds: int = 1,
    engine: Engine = Transformers(),  # noqa: B008
    samples: int = 5,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    max_prompt_length: int | None = None,
    first_goals: GoalOption | list[GoalOption] = "none",
    sample_goals: GoalOption | list[GoalOption] = "best",
    goal: GoalTemplate = OverallGoal(),  # noqa: B008
    scale: Literal["refit", "keep"] = "refit",
    policy: Literal["latest", "initial"] = "latest",
    reference: Literal["policy", "initial"] = "policy",
    relabel: Mode = "both",
    keep_original: bool = False,
    best_goal: bool = False,
    goals_per_pair: int = 0,
    ties: Literal["drop", "chosen", "error"] = "drop",
    selection: Selection | None = None,
    filters: Filters = Filters(),  # noqa: B008
    parts: int = 1,
    held_out: str | None = None,
    held_out_samples: int = 1,
    held_out_limit: int | None = None,
    split: str | None = None,
    held_out_split: str | None = None,
    limit: int | None = None,
    max_failed: float = 0.01,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> int:
    """Run on-policy training: generate, score, select, relabel, fit, and again. The paper's best result is on-policy.

    Example: rap-lightning rounds --config configs/rounds/world.yaml

    Every stage is a file in OUTPUT/round-N: samples.jsonl, scored.jsonl, pairs.jsonl, goal.yaml (how pairs are
    relabelled), relabelled.parquet (the result, for inspection), fit.yaml, model. A stopped run resumes. An edited file
    is used as it is, and what depends on it is made again; nothing is deleted, replaced files move to old/. rounds.json
    sums up, with rewards at the best goal if there are held-out prompts.

    Args:
        prompts: a file, folder or Hub id: rows with prompt, instruction or messages; training data works too.
        model: a Hugging Face folder or Hub id, the model of the first round.
        output: folder of all rounds.
        judge: RewardModel, LLMJudge or Function, or a class by import path.
        fit: options of rap-lightning fit (model, data, trainer, ...), without those that each round sets.
        rounds: number of rounds. A higher number continues a finished run.
        engine: Transformers, VLLM or Endpoint, or a class by import path.
        samples: responses for each prompt at each of the goals.
        temperature: sampling temperature.
        top_p: sample from the most likely tokens that together hold this probability.
        max_new_tokens: longest response, in tokens.
        max_prompt_length: truncate longer prompts, goal kept; by default only to what the model's context has room for.
        first_goals: goals of the first round's responses, whose model knows none yet.
        sample_goals: goals of later rounds: best, none, numbers, or a list of them.
        goal: goal template. Open numbers of its scale are fitted to the scores.
        scale: scale of later rounds: refit to their own scores, or keep the first round's.
        policy: what is trained: the latest model, or in every round the initial one on responses of the latest.
        reference: reference of each round: its policy as it begins, or the initial model.
        relabel: as in the data module: both, chosen, rejected, none or half.
        keep_original: also train on each pair without a goal.
        best_goal: also train on each pair under the best goal.
        goals_per_pair: also train on each pair under this many goals, drawn from the whole scale.
        ties: a pair whose goals print the same: drop, keep its chosen half, or error.
        selection: which pairs are made of the responses to a prompt.
        filters: what is left out on purpose.
        parts: divide the prompts into this many parts, and give each round the next one.
        held_out: prompts on which rewards at the best goal are measured, before the first round and after each.
        held_out_samples: responses for each held-out prompt.
        held_out_limit: at most this many held-out prompts.
        split: split of the prompts; by default train, or the only one.
        held_out_split: split of the held-out prompts.
        limit: at most this many prompts.
        max_failed: stop if a larger share of responses can't be generated or judged.
        seed: seed of all sampling.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, found {rounds}")
    if rounds == 1 and (scale == "keep" or policy == "initial"):
        raise ConfigError("scale keep and policy initial have no effect with one round; leave them out.")
    if reference == "initial" and policy == "initial":
        raise ConfigError(
            "reference initial has no effect beside policy initial: the policy begins as the initial model."
        )
    if held_out is None and (held_out_samples != 1 or held_out_limit is not None or held_out_split is not None):
        raise ConfigError("held_out_samples, held_out_limit and held_out_split have no effect without held_out.")
    if not engine.reads_ids and (rounds > 1 or held_out is not None):
        raise ConfigError(
            f"--engine {type(engine).__name__} can't be given the model of each round: use it for one round without "
            "held_out, or sample with Transformers or VLLM."
        )
    if not 0 <= max_failed < 1:
        raise ConfigError(f"--max_failed is a share from 0 to below 1, found {max_failed}")
    if relabel == "none" or temperature == 0:
        raise ConfigError("rounds need goals (relabel both, chosen, rejected or half) and a temperature above 0.")
    if isinstance(goal, AdapterStrength):
        raise ConfigError(
            "rounds train the model of the round before, and goal AdapterStrength a new adapter, whose strength 0 is "
            "the model it starts from. Use a goal of text (--goal OverallGoal), or train once, with fit."
        )
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.model_source import ModelSource
    from rap_lightning.onpolicy.prompt_set import read_prompts
    from rap_lightning.onpolicy.round_fit import template_options
    from rap_lightning.onpolicy.run_rounds import RoundsPlan, run_rounds

    found = read_prompts(prompts, split, None, limit)
    print("\n".join(found.lines()))
    measured = [] if held_out is None else read_prompts(held_out, held_out_split, None, held_out_limit).histories
    if both := {repr(history) for history in found.histories} & {repr(history) for history in measured}:
        raise ConfigError(f"{len(both):,} of the held-out prompts are among those that are trained on.")
    if not 1 <= parts <= len(found.histories):
        raise ConfigError(f"--parts must be from 1 to the number of prompts, {len(found.histories):,}; found {parts}")
    initial = ModelSource(model, None, trust_remote_code, template=template_options(fit))
    if initial.is_checkpoint or initial.is_adapter:
        raise ConfigError("--model: rounds begin with a whole model; rap-lightning export --merge true makes one.")
    relabelling = Relabelling.of(relabel, goal, keep_original, seed, best_goal, goals_per_pair)
    rules = Rules(goal, relabelling, ties, selection, filters, tool_turns=False)
    plan = RoundsPlan(
        folder=Path(output), histories=found.histories, held_out=measured, initial=initial, rounds=rounds,
        engine=engine, judge=judge, generation=Generation(max_new_tokens, temperature, top_p), samples=samples,
        first_goals=first_goals, sample_goals=sample_goals, scale=scale, policy=policy, reference=reference,
        rules=rules, fit=fit, parts=parts, held_out_samples=held_out_samples, max_failed=max_failed,
        max_prompt_length=max_prompt_length, seed=seed,
    )  # fmt: skip
    for row in run_rounds(plan):
        facts = f"{row['responses']:,} responses, mean reward {row['mean_reward']:.4g}, {row['pairs']:,} pairs"
        print(f"round {row['round']}: {facts}")
        for one in row.get("held_out", []):
            print(f"  {one['model']}, best goal, held out: {one['mean']:.4g} ± {one['error']:.2g} ({one['count']})")
    return 0
