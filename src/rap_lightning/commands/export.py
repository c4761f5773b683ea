"""``rap-lightning export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rap_lightning.models.checkpoint.saved_policy import SavedPolicy
    from rap_lightning.models.strength_record import Record


def export(
    checkpoint: str,
    output: str,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str | None = None,
    goal_in_template: bool = True,
    goals: list[float] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint of fit as a Hugging Face folder that any serving stack loads.

    The folder holds safetensors, the tokenizer, a generation config and a model card (README.md). Its chat template
    asks for the best goal by itself: a plain chat gets the policy's best responses.

    Checkpoints of one device and DDP are files, those of FSDP2 and DeepSpeed are folders; all are read as they are.
    DeepSpeed's need deepspeed installed. Nothing is overwritten: the output appears whole, or not at all.

    Example: rap-lightning export --checkpoint runs/version_0/checkpoints/last.ckpt --output my-model --merge true
             pip install "transformers[serving]"; transformers serve my-model

    Args:
        checkpoint: a .ckpt that fit wrote, file or folder.
        output: a folder that doesn't exist yet, or is empty.
        merge: add a LoRA adapter to its base model's weights, instead of writing the adapter alone. It is done in
            float32; the logits of the written model must equal those of the adapter on its base but for rounding, which
            is measured.
        dtype: of the written weights; by default those of the checkpoint, and float32 for merged ones.
        max_shard_size: of one safetensors file, as in 2GB; by default 5GB. An adapter is one file.
        goal_in_template: write the best goal into the chat template; chat_template_kwargs then ask for another
            (goal=7.5) or none (goal=false). false keeps the model's own template, and you write goals yourself.
        goals: of a policy whose goal is its adapter's strength (AdapterStrength), write one folder for each of these
            goals, output/goal-G, for servers that hold several adapters; by default the output is at the best goal.
        base_model: the base model's Hub id, for card and adapter, where it was loaded from a folder.
        license: for the card's metadata, as in apache-2.0.
        push_to_hub: also upload the folder, to ORG/NAME. The token is HF_TOKEN in the environment, or that of
            `hf auth login`.
        private: whether a repository made by the upload is private, which it is by default.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.atomic_write import refuse_non_empty
    from rap_lightning.models.hub import check_push

    if private is not None and push_to_hub is None:
        raise ConfigError("--private has no effect without --push_to_hub; remove it.")
    if max_shard_size is not None and not re.fullmatch(
        r"(?=[\d.]*[1-9])\d+(\.\d+)?[KMGT]B", max_shard_size, re.IGNORECASE
    ):
        raise ConfigError(f"--max_shard_size must be a size such as 2GB or 500MB, found {max_shard_size}")
    refuse_non_empty(Path(output))
    token = check_push(push_to_hub) if push_to_hub is not None else ""

    import torch

    from rap_lightning.models import hf_export as files
    from rap_lightning.models import hub
    from rap_lightning.models.checkpoint.open_saved import open_saved
    from rap_lightning.models.checkpoint.saved_policy import config_of, restored
    from rap_lightning.models.model_card import model_card
    from rap_lightning.models.strength_record import merged_record

    _say(f"reading {checkpoint}")
    saved = open_saved(Path(checkpoint))
    if not saved.verified:
        _say(f"{checkpoint} has no checksums, so it is loaded without being verified")
    # an adapter is written for the base model in its own precision
    config = config_of(saved.record["policy"] | {"quantize": None}, saved.path, trust_remote_code=trust_remote_code)
    as_adapter = saved.adapts and not merge
    if merge and not saved.adapts:
        raise ConfigError("--merge has no effect: the checkpoint is of a fully trained model, without an adapter.")
    if as_adapter and max_shard_size is not None:
        raise ConfigError(
            "--max_shard_size has no effect on an adapter, which is one file; remove it, or --merge true."
        )
    if push_to_hub is not None and as_adapter and base_model is None and Path(config.path).is_dir():
        raise ConfigError(
            f"the adapter names its base model by a folder of this machine, {config.path}, where others can't find it. "
            "Give its name on the Hub: --base_model ORG/NAME, or write a whole model: --merge true"
        )
    if goals is not None and push_to_hub is not None:
        raise ConfigError("--push_to_hub uploads one model, and --goals writes several; remove one of the two.")
    tokenizer = config.load_tokenizer()
    tokenizer.chat_template = saved.record.get("chat_template") or tokenizer.chat_template  # as it was trained with
    facts = _facts(saved)
    places = _places(Path(output), saved.record.get("goal"), goals)
    policy = None if merge else restored(saved, config, torch.bfloat16 if as_adapter else saved.dtype)
    for folder, (goal, strength) in places.items():
        goal = goal if as_adapter else merged_record(goal)
        card = model_card(
            facts | {"goal": goal}, adapter=as_adapter, goal_in_template=goal_in_template,
            name=push_to_hub or folder.name, base_model=base_model, license=license,
        )  # fmt: skip
        options = files.ExportOptions(
            getattr(torch, dtype) if dtype else None, max_shard_size or files.SHARD, goal, strength, goal_in_template,
            base_model, card,
        )  # fmt: skip
        if policy is None:
            _say("merging: the base model is loaded, and loaded again to compare what was written")

            def load() -> Any:
                return restored(saved, config, torch.float32).model

            _say(files.merge(load, tokenizer, folder, config, options))
        else:
            files.export(policy, policy.state_dict(), tokenizer, folder, config, options)
        print(f"wrote {folder}")
    if push_to_hub is not None:
        _say(f"uploading to {push_to_hub}")
        link = hub.push(Path(output), push_to_hub, token, private=private is not False, step=facts.get("step"))
        print(f"pushed {link}")


def _places(output: Path, record: Record, goals: list[float] | None) -> dict[Path, tuple[Record, float]]:
    """Return each folder to write, with its goal record and the factor on the adapter."""
    from rap_lightning.models.strength_record import at_best
    from rap_lightning.onpolicy.requested_goals import template_of
    from rap_lightning.preferences.adapter_strength import AdapterStrength

    if goals is None:
        return {output: at_best(record)}
    template = None if record is None or "adapter_at" not in record else template_of(record)
    if not isinstance(template, AdapterStrength):
        raise ConfigError(
            "--goals has no effect: the policy's goal is not the strength of its adapter (--data.goal AdapterStrength)."
        )
    for note in filter(None, (template.refuse_outside(goal, "--goals") for goal in goals)):
        _say(note)
    if template.prompt is not None:
        raise ConfigError(
            "--goals: prompts of this policy state the goal too, and would state another one than the folder's. Leave "
            "it out, and ask for goals with generate, or in the prompt of the adapter at its best."
        )
    if not goals or len({template.scale.printed(goal) for goal in goals}) < len(goals):
        raise ConfigError(f"--goals {goals}: give at least one, and none twice (they are printed alike).")
    # ordinary adapters, which need no goal
    return {output / f"goal-{template.scale.printed(goal)}": (None, template.strength(goal)) for goal in goals}


def _facts(saved: SavedPolicy) -> dict[str, Any]:
    """Return what a model card says of the run, as the checkpoint records it."""
    from rap_lightning.models.checkpoint.saved_policy import FACTS

    facts: dict[str, Any] = dict(saved.meta.get(FACTS) or {})
    policy = saved.record["policy"]
    local = Path(policy["path"]).is_absolute()
    facts.setdefault("base_model", {"name": Path(policy["path"]).name if local else policy["path"], "local": local})
    facts.setdefault("adapter", policy.get("lora"))
    facts["goal"] = saved.record.get("goal")
    return facts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
