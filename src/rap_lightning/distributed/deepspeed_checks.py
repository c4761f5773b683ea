"""What does not work under DeepSpeed, refused before anything is loaded.

Read in the source of Lightning 2.6.6 and DeepSpeed 0.19.8; DeepSpeed itself has not been run with this package
(docs/scaling.md).
"""

from __future__ import annotations

from typing import Any

from rap_lightning.errors import ConfigError

INSTEAD = "Use --trainer.strategy fsdp2, which shards the same and is tested with real processes"


def check_deepspeed_config(options: Any) -> None:
    """Raise ConfigError where parsed options ask of DeepSpeed what does not work here.

    Args:
        options: of fit, with their trainer, model and data sections.
    """
    trainer = options["trainer"]
    strategy = trainer.get("strategy") or ""
    if isinstance(strategy, str):
        if "deepspeed" not in strategy:
            return
        stage, offload = (3 if "stage_3" in strategy else 1 if "stage_1" in strategy else 2), "offload" in strategy
    elif "DeepSpeed" in str(strategy.get("class_path")):
        given = strategy.get("init_args") or {}
        if given.get("config") is not None:
            raise ConfigError(
                "--trainer.strategy.config: a DeepSpeed config of your own cannot be checked, and some of its options "
                "train incorrectly without a warning. Set stage and the other options of DeepSpeedStrategy instead."
            )
        stage = int(given.get("stage") or 2)
        offload = bool(given.get("offload_optimizer") or given.get("offload_parameters"))
    else:
        return
    data = options.get("data") or {}
    budget = (data.get("init_args") or data).get("token_budget")
    skips = (options.get("guard") or {}).get("non_finite") == "skip"
    _check(stage, offload, budget is not None, int(trainer.get("accumulate_grad_batches") or 1), skips)


def check_deepspeed_trainer(trainer: Any) -> None:
    """Raise ConfigError for the same in a trainer made in Python, whose options nobody parsed."""
    strategy = trainer.strategy
    if type(strategy).__name__ != "DeepSpeedStrategy":
        return
    zero = (getattr(strategy, "config", None) or {}).get("zero_optimization", {})
    offload = any(name in zero for name in ("offload_optimizer", "offload_param"))
    budget = getattr(getattr(trainer, "datamodule", None), "token_budget", None)
    skips = any(getattr(callback, "non_finite", None) == "skip" for callback in getattr(trainer, "callbacks", []))
    _check(int(zero.get("stage", 0)), offload, budget is not None, trainer.accumulate_grad_batches, skips)


def _check(stage: int, offload: bool, in_passes: bool, accumulate: int, skips: bool) -> None:
    """Raise ConfigError for what fails, or trains something other than what was asked for.

    ``in_passes``: a token budget splits batches into several passes; ``skips``: the guard skips non-finite steps.
    """
    if stage == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 doesn't work here: it partitions weights while the model is built, before they "
            "are read from its files, and the head's weight is read outside of the head's own forward pass. "
            f"{INSTEAD} (configs/strategy/fsdp2.yaml)."
        )
    if offload:
        raise ConfigError(
            "DeepSpeed's offload takes no torch optimizer, and DeepSpeed's own isn't used here. "
            f"{INSTEAD}, with --trainer.strategy.cpu_offload true (configs/strategy/fsdp2-offload.yaml)."
        )
    if in_passes:
        raise ConfigError(
            "--data.token_budget doesn't go with DeepSpeed: each pass of a batch has its own backward pass, which "
            "DeepSpeed counts as a batch. Set --data.batch_size to what fits at once, and use more devices. "
            f"{INSTEAD}."
        )
    if accumulate > 1:
        raise ConfigError(
            f"--trainer.accumulate_grad_batches {accumulate} doesn't go with DeepSpeed: both Lightning and DeepSpeed "
            f"would divide the loss by {accumulate}. Set it to 1, and use more devices or a larger --data.batch_size. "
            f"{INSTEAD}."
        )
    if skips:
        raise ConfigError(
            "--guard.non_finite skip has no effect under DeepSpeed, which holds gradients where no step can be "
            f"skipped. Remove it. {INSTEAD}."
        )
