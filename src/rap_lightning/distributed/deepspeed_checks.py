"""What doesn't work under DeepSpeed, refused before anything is loaded.

Read off Lightning 2.6.6 and DeepSpeed 0.19.8; DeepSpeed itself has never run here (docs/scaling.md).
"""

from __future__ import annotations

from typing import Any

from rap_lightning.errors import ConfigError

INSTEAD = "Use --trainer.strategy fsdp2, which shards the same and is tested with real processes"


SKIPPING = (
    "--guard.non_finite skip has no effect under DeepSpeed, which holds gradients where no step can be left out. "
    f"Remove it. {INSTEAD}."
)


def refuse_in_config(options: Any) -> None:
    """Raise ConfigError where a command's parsed options ask of DeepSpeed what it can't do here.

    Args:
        options: of fit, with their trainer, model and data sections.
    """
    trainer = options["trainer"]
    strategy = trainer.get("strategy")
    if isinstance(strategy, str):
        if "deepspeed" not in strategy:
            return
        stage, offload = (3 if "stage_3" in strategy else 1 if "stage_1" in strategy else 2), "offload" in strategy
    elif strategy is not None and "DeepSpeed" in str(strategy.get("class_path")):
        given = strategy.get("init_args") or {}
        config = given.get("config")
        if config is not None:
            raise ConfigError(
                "--trainer.strategy.config: what a DeepSpeed config of your own asks for can't be checked, and some of "
                "it trains wrongly without a word. Set stage and the other options of DeepSpeedStrategy instead."
            )
        stage = int(given.get("stage") or 2)
        offload = bool(given.get("offload_optimizer") or given.get("offload_parameters"))
    else:
        return
    data = options.get("data") or {}
    budget = (data.get("init_args") or data).get("token_budget")
    refuse(stage, offload, budget is not None, int(trainer.get("accumulate_grad_batches") or 1))
    if (options.get("guard") or {}).get("non_finite") == "skip":
        raise ConfigError(SKIPPING)


def refuse(stage: int, offload: bool, in_passes: bool, accumulate: int) -> None:
    """Raise ConfigError for what fails, or trains something else than is asked for.

    Args:
        stage: of ZeRO.
        offload: of the optimizer or of parameters.
        in_passes: a batch is taken in several forward and backward passes (a token budget).
        accumulate: batches in an optimizer step.
    """
    if stage == 3:
        raise ConfigError(
            "DeepSpeed's ZeRO stage 3 doesn't work here: it takes weights apart while the model is being made, before "
            "they are read from its files, and it doesn't know that the head's weight is read outside of the head's "
            f"own forward pass. {INSTEAD} (configs/strategy/fsdp2.yaml)."
        )
    if offload:
        raise ConfigError(
            "DeepSpeed's offload takes no torch optimizer, and DeepSpeed's own isn't used here. "
            f"{INSTEAD}, with --trainer.strategy.cpu_offload true (configs/strategy/fsdp2-offload.yaml)."
        )
    if in_passes:
        raise ConfigError(
            "--data.token_budget doesn't go with DeepSpeed: each pass of a batch has a backward pass of its own, which "
            "DeepSpeed takes for a batch. Set --data.batch_size to what fits at once, and use more devices. "
            f"{INSTEAD}."
        )
    if accumulate > 1:
        raise ConfigError(
            f"--trainer.accumulate_grad_batches {accumulate} doesn't go with DeepSpeed: both Lightning and DeepSpeed "
            f"would divide the loss by {accumulate}. Set it to 1, and use more devices or a larger --data.batch_size. "
            f"{INSTEAD}."
        )


def refuse_in_trainer(trainer: Any) -> None:
    """The same for a trainer made in Python, whose options nobody parsed."""
    strategy = trainer.strategy
    if type(strategy).__name__ != "DeepSpeedStrategy":
        return
    zero = (getattr(strategy, "config", None) or {}).get("zero_optimization", {})
    offload = any(name in zero for name in ("offload_optimizer", "offload_param"))
    data = getattr(trainer, "datamodule", None)
    in_passes = getattr(data, "token_budget", None) is not None
    refuse(int(zero.get("stage", 0)), offload, in_passes, trainer.accumulate_grad_batches)
    if any(getattr(callback, "non_finite", None) == "skip" for callback in getattr(trainer, "callbacks", [])):
        raise ConfigError(SKIPPING)
