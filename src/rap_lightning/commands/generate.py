"""``rap-lightning generate``: responses of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rap_lightning.commands.options import command_line
from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError
from rap_lightning.onpolicy.asked_goals import GoalOption
from rap_lightning.onpolicy.engines import Engine, Transformers
from rap_lightning.preferences.goals import GoalTemplate


def run(args: list[str]) -> int:
    """Parse and generate."""
    return int(run_function(generate, args, "generate"))


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
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Sample responses, a json line each, at a goal or none.

    Example: rap-lightning generate --prompts my-pairs/ --model runs/version_0/hf --output samples.jsonl --samples 5

    A run that was stopped, or killed, goes on where it was when started again in the same way: nothing is done twice.
    Progress is on disk after every batch. It ends with 1 where some prompts could not be answered; they are listed
    beside the output, and asked again next time.

    At an endpoint: --engine Endpoint --engine.url http://localhost:8000/v1 --model NAME-OF-IT-THERE

    Args:
        prompts: a file, folder or Hub id: rows with prompt, instruction or messages; data to train on serve too.
        model: a Hugging Face folder or Hub id, an adapter's folder, or a checkpoint of fit; at an endpoint its name.
        output: json lines to write, or to go on with.
        engine: Transformers, VLLM or Endpoint, or a class of yours by import path.
        goal: best, none, or a number on the scale that goals state; [1, 5, 10] answers every prompt at each. By default
            the best where the model has a goal.json, otherwise none.
        template: how goals read; by default as in the model's goal.json.
        goal_from: a folder with a goal.json (or the file), where the model itself has none.
        samples: responses for each prompt at each goal.
        temperature: of sampling; 0 picks the likeliest token each time.
        top_p: sample from the likeliest tokens that hold this share of the probability.
        max_new_tokens: longest response, in tokens.
        guidance: w, how far log-probabilities at the goal are pushed away from those at a low goal, to
            (1 + w) log p(. | goal) - w log p(. | low). 0 samples plainly; at twice the time.
        against: the low goal, a number on the scale that goals state, or none for the prompt without a goal; by default
            the lowest of the scale.
        plausibility: leave out tokens whose probability at the goal is below this share of the likeliest one's; by
            default none is left out. Without guidance it is min-p, to compare guidance with.
        max_prompt_length: cut longer prompts, goal kept; by default only what the model's context has no room for.
        split: of the prompts; by default train, or the only one.
        column: of the prompts, where it has a name of its own.
        limit: at most this many prompts.
        seed: of all sampling; each response has a seed of its own, made of this.
        shard: this process's part: 0/4 is the first of four. A launcher (torchrun, srun) says so by itself.
        processes: start so many on this machine, a GPU for each where there are several.
        revision: of the model on the Hub: a branch, tag or commit.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.onpolicy.work_split import in_processes, own_part

    if processes != 1:
        if processes < 1 or shard is not None:
            raise ConfigError("--processes must be at least 1, and goes without --shard")
        return in_processes(processes, [*command_line, "--processes", "1"])
    from rap_lightning.models.generation import Generation
    from rap_lightning.onpolicy.asked_goals import guided, resolve
    from rap_lightning.onpolicy.prompts import read_prompts
    from rap_lightning.onpolicy.response_generator import Generator
    from rap_lightning.onpolicy.sampled_model import Model

    own, shards, rank = own_part(shard)
    source = Model(model, revision, trust_remote_code)
    if template is not None and goal_from is not None:
        raise ConfigError("--goal_from has no effect beside --template; remove one of the two.")
    record = source.record_or(goal_from)
    options = goal if isinstance(goal, list) else [goal]
    if set(options) == {"none"} and template is not None:
        raise ConfigError("--template has no effect with --goal none; remove one of the two.")
    generation = Generation(max_new_tokens, temperature, top_p, guidance, against, plausibility)
    asked = guided([resolve(option, record, template) for option in options], generation, record, template)
    if len({one.text for one in asked}) < len(asked):
        raise ConfigError(f"--goal {goal}: two of them read the same")
    found = read_prompts(prompts, split, column, limit)
    if shards > 1:
        print(f"part {own + 1} of {shards}", flush=True)
    if own == 0:
        print("\n".join(found.lines()))
        for one in asked:
            print(f"goal: {'none' if one.text is None else one.text.splitlines()[-1]}")
        if guidance and (low := asked[0].against):
            print(f"guidance {guidance:g} against: {'none' if low.text is None else low.text.splitlines()[-1]}")
    with Generator(source, engine, max_prompt_length=max_prompt_length, shard=own, shards=shards, rank=rank) as run:
        outcome = run.run(found.histories, Path(output), asked, generation, samples, seed)
    return 1 if outcome.failed else 0
