"""``rap-lightning export``: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from rap_lightning.errors import ConfigError


def export(checkpoint: str, output: str, merge: bool = False, trust_remote_code: bool = False) -> None:
    """Write a checkpoint of fit as a Hugging Face folder: safetensors, tokenizer, chat template.

    Example: rap-lightning export --checkpoint runs/version_0/checkpoints/last.ckpt --output my-model

    Args:
        checkpoint: a .ckpt file that fit wrote.
        output: a folder that doesn't exist yet, or is empty.
        merge: add a LoRA adapter to its base model's weights, in float32, instead of writing the adapter alone.
        trust_remote_code: run Python code that comes with the model. Only for authors you trust.
    """
    import tempfile

    import torch

    from rap_lightning.models import export as files
    from rap_lightning.models.checkpoints import read_checkpoint
    from rap_lightning.models.policy import Lora, PolicyConfig

    files.refuse_non_empty(Path(output))
    saved = read_checkpoint(Path(checkpoint))
    options, goal = saved["rap_lightning"]["policy"], saved["rap_lightning"].get("goal")
    lora = options.pop("lora")
    options["trust_remote_code"] = trust_remote_code  # never what a file says
    config = PolicyConfig(**options, lora=Lora(**lora) if lora else None)
    if merge and not config.adapts:
        raise ConfigError("--merge has no effect: the checkpoint is of a fully trained model, without an adapter.")
    policy = config.build(torch.float32)
    state = {n.removeprefix("policy."): v for n, v in saved["state_dict"].items() if n.startswith("policy.")}
    result = policy.load_state_dict(state, strict=False)
    missing = [n for n in result.missing_keys if not config.adapts or ".lora_" in n]
    if missing or result.unexpected_keys:
        raise ConfigError(
            f"{checkpoint} doesn't fit the model at {config.path}: "
            f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}."
        )
    tokenizer = config.load_tokenizer()
    if merge:
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            files.export(policy, policy.state_dict(), tokenizer, adapter, config)
            files.merge(adapter, Path(output), config, tokenizer, goal)
    else:
        files.export(policy, policy.state_dict(), tokenizer, Path(output), config, goal)
    print(f"wrote {output}")
