"""``rap-lightning export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rap_lightning.commands.options import run as run_function
from rap_lightning.errors import ConfigError

if TYPE_CHECKING:
    from rap_lightning.models.checkpoint.saved_policy import SavedPolicy
    from rap_lightning.models.policy import PolicyConfig


def run(args: list[str]) -> int:
    """Parse and export."""
    run_function(export, args, "export")
    return 0


def export(
    checkpoint: str,
    output: str,
    merge: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: str | None = None,
    goal_in_template: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint of fit as a Hugging Face folder that any serving stack loads.

    The folder holds safetensors, the tokenizer, a generation config and a model card (README.md). Its chat template
    asks for the best goal by itself: someone who sends a plain chat gets the policy at its best.

    Checkpoints of one device and DDP are files, those of FSDP2 and DeepSpeed are folders; all are read as they are.
    DeepSpeed's need deepspeed installed. Nothing is overwritten: the output appears whole, or not at all.

    Example: rap-lightning export --checkpoint runs/version_0/checkpoints/last.ckpt --output my-model --merge true
             pip install "transformers[serving]"; transformers serve my-model

    Args:
        checkpoint: a .ckpt that fit wrote, file or folder.
        output: a folder that doesn't exist yet, or is empty.
        merge: add a LoRA adapter to its base model's weights, instead of writing the adapter alone. It is done in
            float32; the logits of the written model must equal those of the adapter on its base to 1e-4.
        dtype: of the written weights; by default those of the checkpoint, and float32 for merged ones.
        max_shard_size: of one safetensors file, as in 2GB; by default 5GB. An adapter is one file.
        goal_in_template: write the best goal into the chat template; chat_template_kwargs then ask for another
            (goal=7.5) or none (goal=false). false leaves the model's own template, and goals are yours to write.
        base_model: the base model's Hub id, for card and adapter, where it was loaded from a folder.
        license: for the card's metadata, as in apache-2.0.
        push_to_hub: also upload the folder, to ORG/NAME. The token is HF_TOKEN in the environment.
        private: whether a repository made by the upload is private, which it is by default.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    from rap_lightning.models.atomic_folder import refuse_non_empty
    from rap_lightning.models.hub import check_push

    if private is not None and push_to_hub is None:
        raise ConfigError("--private has no effect without --push_to_hub; remove it.")
    if max_shard_size is not None:
        _check_size(max_shard_size)
    refuse_non_empty(Path(output))
    token = check_push(push_to_hub) if push_to_hub is not None else ""

    import torch

    from rap_lightning.models import hf_export as files
    from rap_lightning.models import hub
    from rap_lightning.models.checkpoint.saved_policy import open_saved, restored
    from rap_lightning.models.model_card import model_card

    _say(f"reading {checkpoint}")
    saved = open_saved(Path(checkpoint))
    if not saved.verified:
        _say(f"{checkpoint} has no digest of its content, so it is read without being verified")
    config = _config(saved, trust_remote_code)
    alone = saved.adapts and not merge  # the adapter is written, without its base
    if merge and not saved.adapts:
        raise ConfigError("--merge has no effect: the checkpoint is of a fully trained model, without an adapter.")
    if alone and max_shard_size is not None:
        raise ConfigError(
            "--max_shard_size has no effect on an adapter, which is one file; remove it, or --merge true."
        )
    if push_to_hub is not None and alone and base_model is None and Path(config.path).is_dir():
        raise ConfigError(
            f"the adapter names its base model by a folder of this machine, {config.path}, where others can't find it. "
            "Say what it is called on the Hub: --base_model ORG/NAME, or write a whole model: --merge true"
        )
    facts = _facts(saved)
    card = model_card(
        facts, adapter=alone, goal_in_template=goal_in_template, name=push_to_hub or Path(output).name,
        base_model=base_model, license=license,
    )  # fmt: skip
    leaving = files.Leaving(
        getattr(torch, dtype) if dtype else None, max_shard_size or files.SHARD, saved.record.get("goal"),
        goal_in_template, base_model, card,
    )  # fmt: skip
    tokenizer = config.load_tokenizer()
    if merge:
        _say("merging: the base model is loaded, and loaded again to compare what was written")
        _say(
            files.merge(lambda: restored(saved, config, torch.float32).model, tokenizer, Path(output), config, leaving)
        )
    else:
        policy = restored(saved, config, torch.bfloat16 if alone else saved.dtype)
        files.export(policy, policy.state_dict(), tokenizer, Path(output), config, leaving)
    print(f"wrote {output}")
    if push_to_hub is not None:
        _say(f"uploading to {push_to_hub}")
        link = hub.push(Path(output), push_to_hub, token, private=private is not False, step=facts.get("step"))
        print(f"pushed {link}")


def _config(saved: SavedPolicy, trust_remote_code: bool) -> PolicyConfig:
    """The policy's config as it was recorded; an adapter leaves for a base in its own precision."""
    from rap_lightning.models.checkpoint.saved_policy import config_of

    options = saved.record["policy"] | {"quantize": None}
    return config_of(options, saved.path, trust_remote_code=trust_remote_code)


def _facts(saved: SavedPolicy) -> dict[str, Any]:
    """What the checkpoint says of its run; a checkpoint that says nothing has a run folder around it, maybe."""
    from rap_lightning.models.checkpoint.saved_policy import FACTS

    facts: dict[str, Any] = dict(saved.meta.get(FACTS) or {})
    beside = saved.path.parent.parent / "run.json"
    if not facts and beside.is_file():
        try:
            facts = dict(json.loads(beside.read_text(encoding="utf-8"))["facts"])
        except (OSError, ValueError, KeyError, TypeError):
            _say(f"{beside} can't be read; the model card does without it")
    policy = saved.record["policy"]
    local = Path(policy["path"]).is_absolute()
    facts.setdefault("base_model", {"name": Path(policy["path"]).name if local else policy["path"], "local": local})
    facts.setdefault("adapter", policy.get("lora"))
    facts["goal"] = saved.record.get("goal")
    return facts


def _check_size(size: str) -> None:
    from huggingface_hub.serialization._base import parse_size_to_int

    try:
        valid = parse_size_to_int(size) > 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"--max_shard_size must be a size such as 2GB or 500MB, found {size}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
