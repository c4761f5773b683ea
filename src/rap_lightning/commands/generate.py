"""``rap-lightning generate``: responses of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from rap_lightning.commands.options import command_line
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.onpolicy.requested_goals import GoalOption
from rap_lightning.preferences.goals import GoalTemplate
from rap_lightning.preferences.template_options import TemplateOptions


def generate(
    prompts: str,
    model: str,
    output: str,
    engine: Engine = Transformers(),  # noqa: B008
    goal: GoalOption | list[GoalOption] | None = None,
    template: GoalTemplate | None = None,
    goal_from: str | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
    guidance: float = 0.0,
    against: float | Literal["none"] | None = None,
    plausibility: float | None = None,
    max_prompt_length: int | None = None,
    split: str | None = None,
    column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    shard: str | None = None,
    processes: int = 1,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Sample responses, one JSON line each, at a goal or without one.

    Example: rap-lightning generate --prompts my-pairs/ --model runs/version_0/hf --output samples.jsonl --samples 5

    A stopped or killed run resumes when started again with the same options: nothing is generated twice. Responses are
    written to disk after every batch. The exit code is 1 if some prompts could not be answered; they are listed beside
    the output, and retried next time.

    At an endpoint: --engine Endpoint --engine.url http://localhost:8000/v1 --model NAME-ON-THE-SERVER

    Args:
        prompts: a file, folder or Hub id: rows with prompt, instruction or messages; training data works too.
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; with an endpoint its name.
        output: JSON lines to write, or to continue.
        engine: Transformers, VLLM or Endpoint, or a class by import path.
        goal: best, none, or a number on the scale that goals state; [1, 5, 10] answers every prompt at each. By default
            the best if the model has a goal.json, otherwise none.
        template: goal template; by default that of the model's goal.json.
        goal_from: a folder with a goal.json (or the file), if the model has none.
        samples: responses for each prompt at each goal.
        temperature: sampling temperature; 0 picks the most likely token each time.
        top_p: sample from the most likely tokens that together hold this probability.
        max_new_tokens: longest response, in tokens.
        guidance: w, how far log-probabilities at the goal are pushed away from those at a low goal, to
            (1 + w) log p(. | goal) - w log p(. | low). 0 is plain sampling; guidance takes twice the time.
        against: the low goal, a number on the scale that goals state, or none for the prompt without a goal; by default
            the lowest of the scale.
        plausibility: leave out tokens whose probability at the goal is below this share of the most likely one's; by
            default none is left out. Without guidance it is min-p, to compare guidance with.
        max_prompt_length: truncate longer prompts, goal kept; by default only to what the model's context has room for.
        split: split of the prompts; by default train, or the only one.
        column: column of the prompts, if it has another name.
        limit: at most this many prompts.
        seed: seed of all sampling; the seed of each response is derived from it.
        shard: this process's part: 0/4 is the first of four. torchrun and srun set it automatically.
        processes: start this many processes on this machine, one per GPU if there are several.
        chat_template: which of several named chat templates renders; by default the one called default.
        chat_template_kwargs: values of the chat template's switches, as in {enable_thinking: false}; a model that fit
            exported, or its checkpoint, has those of its training as defaults.
        revision: branch, tag or commit of the model on the Hub.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.onpolicy.work_split import own_part, run_processes

    if processes != 1:
        if processes < 1 or shard is not None:
            raise ConfigError("--processes must be at least 1, and can't be combined with --shard")
        return run_processes(processes, [*command_line, "--processes", "1"])
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.model_source import ModelSource
    from rap_lightning.onpolicy.prompt_set import read_prompts
    from rap_lightning.onpolicy.requested_goals import check_template_options, request_goals
    from rap_lightning.onpolicy.response_generator import ResponseGenerator

    options = goal if isinstance(goal, list) else [goal]
    check_template_options(template, goal_from, options)
    own, shards, rank = own_part(shard)
    source = ModelSource(
        model, revision, trust_remote_code, template=TemplateOptions(chat_template, chat_template_kwargs or {})
    )
    generation = Generation(max_new_tokens, temperature, top_p, guidance, against, plausibility)
    generator = ResponseGenerator(
        source, engine, max_prompt_length=max_prompt_length, shard=own, shards=shards, rank=rank
    )
    goals = request_goals(options, source.record(goal_from), template, generation)
    found = read_prompts(prompts, split, column, limit)
    if shards > 1:
        print(f"part {own + 1} of {shards}", flush=True)
    if own == 0:
        print("\n".join([*found.lines(), *(f"goal: {one.last_line}" for one in goals)]))
        if low := goals[0].against:
            print(f"guidance {guidance:g} against: {low.last_line}")
    with generator:
        summary = generator.run(found.histories, Path(output), goals, generation, samples, seed)
    return 1 if summary.failed else 0
