"""Read devices, strategy and precision from the trainer's parsed options, as Lightning reads them."""

from __future__ import annotations

from typing import Any

from rap_lightning.errors import ConfigError
from rap_lightning.planning.estimate import Spread

PRECISIONS = {
    "32-true": "32-true", "32": "32-true", "bf16-mixed": "bf16-mixed", "bf16-true": "bf16-true", "bf16": "bf16-mixed",
}  # fmt: skip


def precision_of(precision: Any) -> str:
    """32-true, bf16-mixed or bf16-true."""
    name = str(precision or "32-true")
    if name not in PRECISIONS:
        raise ConfigError(f"plan knows the precisions {', '.join(PRECISIONS)}, found {name}")
    return PRECISIONS[name]


def devices_of(devices: Any) -> int | None:
    """Devices of a node; None where it is left to the machine."""
    if devices in (None, "auto", -1, "-1"):
        return None
    if isinstance(devices, list):
        return len(devices)
    numbers = [number.strip() for number in str(devices).split(",")]
    if not all(number.lstrip("-").isdigit() for number in numbers if number):
        raise ConfigError(f"--trainer.devices: expected a number, a list of them, or auto; found {devices}")
    # "2" is two devices, "2," is the one of that number
    count = int(numbers[0]) if len(numbers) == 1 else sum(number != "" for number in numbers)
    if count < 1:
        raise ConfigError(f"--trainer.devices must be at least 1, found {devices}")
    return count


def spread_of(strategy: Any, ranks: int, per_node: int, precision: str) -> Spread:
    """How a strategy, given by name or by class with options, spreads a run over its ranks."""
    if isinstance(strategy, str) or strategy is None:
        name, options = str(strategy or "auto"), {}
    else:
        name, options = str(strategy["class_path"]), dict(strategy.get("init_args") or {})
    short = name.rpartition(".")[2].lower()
    half = 0.5 if precision == "bf16-mixed" else 1.0
    if short in ("auto", "ddpstrategy", "singledevicestrategy") or short.startswith("ddp"):
        separate = ranks > 1 and not options.get("gradient_as_bucket_view")
        return Spread("ddp" if ranks > 1 else "single", ranks, per_node, 1, separate_buckets=separate)
    if short == "fsdp2":
        gathers = {"bfloat16": 1.0 if precision == "bf16-true" else 0.5, "float32": 1.0}
        shard = int(options.get("shard_size") or ranks)
        if ranks % shard:
            raise ConfigError(f"--trainer.strategy.shard_size {shard} doesn't divide the {ranks} processes.")
        gather = gathers.get(str(options.get("gather")), half)
        return Spread("fsdp2", ranks, per_node, shard, bool(options.get("cpu_offload")), gather)
    if short == "modelparallelstrategy":
        return Spread("fsdp2", ranks, per_node, ranks)
    if "deepspeed" in short:  # other stages and offload are refused
        return Spread("zero2", ranks, per_node, 1, gather=half)
    raise ConfigError(f"plan doesn't know the strategy {name}: it knows auto, ddp, fsdp2 and deepspeed's stage 2.")
