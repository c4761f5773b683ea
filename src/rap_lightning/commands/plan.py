"""``rap-lightning plan``: whether a run fits, how long a step takes, and what to change."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rap_lightning.cli.help_format import PlainParser
from rap_lightning.cli.parser_internals import flags_of
from rap_lightning.cli.trainer_cli import PreferenceCLI, parse_only
from rap_lightning.errors import ConfigError
from rap_lightning.models.attention_choice import FLASH_CAPABILITY, Machine
from rap_lightning.module import PreferenceModule
from rap_lightning.planning.estimate import MFU, USABLE, Device
from rap_lightning.planning.gpus import GPU, GPUS, find_gpu
from rap_lightning.planning.planner import PlannedRun, Planner
from rap_lightning.planning.trainer_options import devices_of, precision_of, spread_of

DESCRIPTION = """Estimate what a run will take before anything is loaded, from the model's config alone, on any machine.

Example: rap-lightning plan --config configs/llama-3.1-8b-instruct.yaml --devices 8 --gpu h100-80gb

Takes every option of fit (rap-lightning fit --help), configs too, and those below. The model's real code runs one
step on tensors without memory; what strategies add is estimated (docs/scaling.md says what was measured)."""


def run(args: list[str]) -> int:
    """Parse, plan and print; 1 where the run doesn't fit."""
    parser = own_parser()
    own, rest = parser.parse_known_args(args)
    gpu = _gpu(own)
    _check(own)
    for option, flag in (("devices", "--trainer.devices"), ("nodes", "--trainer.num_nodes")):
        count = getattr(own, option)
        rest += [] if count is None else [flag, str(count)]
    cli = parse_only(rest, "plan", other_options=list(flags_of(parser)))
    if not isinstance(cli.model, PreferenceModule):
        raise ConfigError("plan knows the runs of PreferenceModule and its subclasses.")
    planned = _planned_run(cli, gpu, own)
    own.mfu = own.mfu or MFU[planned.policy.compile]
    if sys.stderr.isatty():
        print("tracing one step without weights ...", end="\r", file=sys.stderr, flush=True)
    planner = Planner(planned)
    document = planner.document(gpu, own.mfu, own.network)
    if own.json:
        print(json.dumps(document))
    else:
        guessed = str(cli.config["trainer"].get("devices")) in ("auto", "-1")
        _print_tables(planner, document, gpu, own, guessed)
    return int(not document["fits"])


def own_parser() -> argparse.ArgumentParser:
    """The parser of plan's own options; those of fit are parsed after it."""
    parser = PlainParser("plan", DESCRIPTION)
    parser.add_argument("--devices", type=int, help="on each node; by default the config's, and 1 where it says auto")
    parser.add_argument("--nodes", type=int, help="by default the config's")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}; without one, the plan is for a CPU and has no times")
    parser.add_argument("--memory", type=float, help="GB of a device that isn't in the table, or of this machine")
    parser.add_argument("--teraflops", type=float, help="dense bfloat16, of a device that isn't in the table")
    parser.add_argument(
        "--network",
        type=float,
        default=50.0,
        help="GB/s per device between nodes by the datasheet, of which 80%% is reached (50: 400 Gb/s)",
    )
    parser.add_argument(
        "--mfu", type=float, help="share of the peak that is reached (0.33; 0.4 with model.policy.compile)"
    )
    parser.add_argument(
        "--length", type=int, help="tokens of prompt and response; by default data.max_length, the worst case"
    )
    parser.add_argument("--prompt_share", type=float, default=0.5, help="the prompt's share of the length (0.5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    return parser


def _check(own: argparse.Namespace) -> None:
    for option, least, unit in (("devices", 1, ""), ("nodes", 1, ""), ("length", 2, " tokens")):
        if (value := getattr(own, option)) is not None and value < least:
            raise ConfigError(f"--{option} must be at least {least}{unit}, found {value}")
    for option in ("prompt_share", "mfu"):
        if (share := getattr(own, option)) is not None and not 0 < share < 1:
            raise ConfigError(f"--{option} is a share, above 0 and below 1; found {share:g}")
    for option in ("memory", "teraflops", "network"):
        if (value := getattr(own, option)) is not None and not value > 0:
            raise ConfigError(f"--{option} must be above 0, found {value:g}")


def _gpu(own: argparse.Namespace) -> GPU | None:
    if own.gpu is not None:
        gpu = find_gpu(own.gpu)
        if own.memory is not None or own.teraflops is not None:
            raise ConfigError("--memory and --teraflops have no effect with --gpu, which knows them; remove them.")
        return gpu
    if own.teraflops is None:
        return None
    if own.memory is None:
        raise ConfigError("--teraflops needs --memory too.")
    return GPU(own.memory, own.teraflops, 32.0, "as given", FLASH_CAPABILITY)


def _planned_run(cli: PreferenceCLI, gpu: GPU | None, own: argparse.Namespace) -> PlannedRun:
    module, data, trainer = cli.model, cli.datamodule, cli.config["trainer"]
    path = module.policy_config.path
    # a user's data module may create the model too, when fit begins
    hint = data.how_to_make(path) if hasattr(data, "how_to_make") and not Path(path).exists() else ""
    if hint:
        raise ConfigError(f"--model.policy.path {path} isn't there yet. {hint}")
    precision = precision_of(trainer.get("precision"))
    device = _device(str(trainer.get("accelerator") or "auto"), gpu, own)
    per_node = devices_of(trainer.get("devices")) or 1
    ranks = per_node * int(trainer.get("num_nodes") or 1)
    return PlannedRun(
        module.policy_config, module.reference, module.optimizer, precision,
        spread_of(trainer.get("strategy"), ranks, per_node, precision), device, _room(device, per_node, gpu, own),
        data.layout, data.batch_size, data.token_budget, int(trainer.get("accumulate_grad_batches") or 1),
        own.length or data.max_length, own.prompt_share,
        None if device == "cpu" else gpu.machine if gpu is not None else Machine.cuda(FLASH_CAPABILITY),
    )  # fmt: skip


def _device(accelerator: str, gpu: GPU | None, own: argparse.Namespace) -> Device:
    if accelerator == "cpu" and gpu is not None:
        raise ConfigError(
            "--gpu and --teraflops are for GPUs, and the config says --trainer.accelerator cpu. Remove one of the two."
        )
    if accelerator in ("gpu", "cuda") and gpu is None and own.memory is None:
        raise ConfigError(
            f"the config asks for --trainer.accelerator {accelerator}: say which with --gpu ({', '.join(GPUS)}), or "
            "give --memory in GB."
        )
    return "cpu" if gpu is None and accelerator not in ("gpu", "cuda") else "cuda"


def _room(device: Device, per_node: int, gpu: GPU | None, own: argparse.Namespace) -> float:
    """Bytes for a rank: of a GPU, as given, or its share of this machine's memory."""
    if gpu is not None:
        return gpu.memory * 1e9 * USABLE
    if own.memory is not None:
        return float(own.memory * 1e9 * (USABLE if device == "cuda" else 1))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / per_node


def _print_tables(
    planner: Planner, document: dict[str, Any], gpu: GPU | None, own: argparse.Namespace, guessed: bool
) -> None:
    run, spread, step, held = planner.run, planner.run.spread, planner.step, planner.memory
    shape = f"{spread.ranks} rank{'s' * (spread.ranks > 1)}" + (
        f", {spread.ranks // spread.per_node} nodes of {spread.per_node}" if spread.ranks > spread.per_node else ""
    )
    print(f"{run.policy.path}: {step.parameters:,} parameters, {step.trainable:,} trainable "
          f"({step.trainable / step.parameters:.2%})")  # fmt: skip
    print(f"{spread.kind} over {shape}; reference {run.reference_kind}; layout {run.layout}; {run.precision}; "
          f"{run.length:,} tokens each, {planner.pairs} in a forward pass, {planner.passes} passes a step")  # fmt: skip
    if step.attention:
        print(f"attention: {'; '.join(step.attention)}")
    if guessed:
        print("devices: auto depends on the machine; planned for 1. Set their number with --devices")
    print("\npeak memory of a rank, GB")
    for name in ("weights", "gradients", "optimizer", "reference", "gathered", "activations", "process"):
        note = f"  (logits at most {held.logits / 1e9:.2f})" if name == "activations" else ""
        print(f"  {name:<12}{getattr(held, name) / 1e9:>9.2f}{note}")
    room = f" of {run.room / 1e9:.1f}"
    if gpu is None and own.memory is None:
        room += ", this machine's" + (f" for each of {spread.per_node}" if spread.per_node > 1 else "")
    print(f"  {'total':<12}{held.total / 1e9:>9.2f}{room}" + ("" if document["fits"] else "   DOES NOT FIT"))
    if held.host:
        print(f"  {'on the host':<12}{held.host / 1e9:>9.2f} for each rank")
    print(f"\n{document['pairs_per_step']:,} pairs and {document['tokens_per_step']:,} tokens a step, "
          f"{document['flops_per_step'] / 1e12:,.1f} TFLOP")  # fmt: skip
    if gpu is not None and "seconds_per_step" not in document:
        print("no time: float32 runs at a fraction of the peak that is known; use --trainer.precision bf16-mixed")
    elif gpu is not None:
        print(f"a step: {document['seconds_per_step']:.2f} s ({document['compute_seconds']:.2f} s computing at "
              f"{own.mfu:.0%} of {gpu.teraflops:g} TFLOP/s, {document['communication_seconds']:.2f} s "
              f"communicating meanwhile), {document['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
        print(f"figures of the GPU: {gpu.source}")
    at_limit = ", the longest that the model takes" if document["longest_pair"] == step.context else ""
    print(f"longest pairs that fit: {document['longest_pair']:,} tokens{at_limit}")
    if document["advice"]:
        print("\nto make it fit:\n" + "\n".join(f"  {line}" for line in document["advice"]))
