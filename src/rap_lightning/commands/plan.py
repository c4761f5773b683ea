"""``rap-lightning plan``: whether a run fits, how long a step takes, and what to change."""

from __future__ import annotations

import argparse
import json as jsonlib
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from rap_lightning.batches.layouts import LAYOUTS
from rap_lightning.batches.sampler import PairSize
from rap_lightning.cli.help_format import PlainParser
from rap_lightning.cli.trainer_cli import PreferenceCLI, parse_only
from rap_lightning.distributed.sharded_load import blank_model
from rap_lightning.errors import ConfigError
from rap_lightning.models.policy_config import CHECKPOINTING_FROM, DTYPES, Lora
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.module import PreferenceModule
from rap_lightning.planning.estimate import LIVE, USABLE, Device, Memory, ReferenceKind, Spread, duration, memory
from rap_lightning.planning.gpus import GPU, GPUS, find_gpu
from rap_lightning.planning.trace import Step, batch_of, trace

DESCRIPTION = """Say what a run will take, before anything is loaded: from the model's config alone, on any machine.

Example: rap-lightning plan --config configs/llama-3.1-8b-instruct.yaml --devices 8 --gpu h100-80gb

Takes every option of fit (rap-lightning fit --help), configs too, and those below. The model's real code runs one
step on tensors without memory; what strategies add is reckoned (docs/scaling.md says what was measured)."""

PRECISIONS = (
    {"32-true": "32-true", "32": "32-true"} | {p: p for p in ("bf16-mixed", "bf16-true")} | {"bf16": "bf16-mixed"}
)


@dataclass(frozen=True)
class Case:
    """What plan was asked about."""

    spread: Spread
    reference: ReferenceKind
    device: Device
    layout: str
    pairs: int
    passes: int
    length: int


def run(args: list[str]) -> int:
    """Parse and print; 1 where the run doesn't fit."""
    parser = own_parser()
    own, rest = parser.parse_known_args(args)
    gpu = _gpu(own)
    for option, flag in (("devices", "--trainer.devices"), ("nodes", "--trainer.num_nodes")):
        count = getattr(own, option)
        if count is not None and count < 1:
            raise ConfigError(f"--{option} must be at least 1, found {count}")
        rest += [] if count is None else [flag, str(count)]
    if own.length is not None and own.length < 2:
        raise ConfigError(f"--length must be at least 2 tokens, found {own.length}")
    for option in ("prompt_share", "mfu"):
        if not 0 < getattr(own, option) < 1:
            raise ConfigError(f"--{option} is a share, above 0 and below 1; found {getattr(own, option):g}")
    for option in ("memory", "teraflops", "network"):
        if getattr(own, option) is not None and not getattr(own, option) > 0:
            raise ConfigError(f"--{option} must be above 0, found {getattr(own, option):g}")
    cli = parse_only(rest, "plan", beside=list(parser._option_string_actions))
    if not isinstance(cli.model, PreferenceModule):
        raise ConfigError("plan knows the runs of PreferenceModule and its subclasses.")
    return _Plan(cli, gpu, own).print()


def own_parser() -> argparse.ArgumentParser:
    """The parser of plan's own options, beside those of fit."""
    parser = PlainParser("plan", DESCRIPTION)
    parser.add_argument("--devices", type=int, help="on each node; by default the config's, and 1 where it says auto")
    parser.add_argument("--nodes", type=int, help="by default the config's")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}; without one, the plan is for a CPU and knows no time")
    parser.add_argument("--memory", type=float, help="GB of a device that isn't in the table, or of this machine")
    parser.add_argument("--teraflops", type=float, help="dense bfloat16, of a device that isn't in the table")
    parser.add_argument("--network", type=float, default=50.0, help="GB/s per device between nodes (50: 400 Gb/s)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (0.4)")
    parser.add_argument(
        "--length", type=int, help="tokens of prompt and response; by default data.max_length, the worst"
    )
    parser.add_argument("--prompt_share", type=float, default=0.5, help="share of the length that is prompt (0.5)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    return parser


def _gpu(own: argparse.Namespace) -> GPU | None:
    found = find_gpu(own.gpu) if own.gpu is not None else None
    if found is not None:
        if own.memory is not None or own.teraflops is not None:
            raise ConfigError("--memory and --teraflops have no effect with --gpu, which knows them; remove them.")
        return found
    if own.teraflops is not None:
        if own.memory is None:
            raise ConfigError("--teraflops needs --memory too.")
        return GPU(own.memory, own.teraflops, 32.0, "as given")
    return None


def _refuse_unmade(path: str, data: Any) -> None:
    """A data module of one's own may make the model too, when fit begins."""
    hint = data.how_to_make(path) if hasattr(data, "how_to_make") and not Path(path).exists() else ""
    if hint:
        raise ConfigError(f"--model.policy.path {path} isn't there yet. {hint}")


class _Plan:
    def __init__(self, cli: PreferenceCLI, gpu: GPU | None, own: argparse.Namespace) -> None:
        self.module: PreferenceModule = cli.model
        self.data, self.gpu, self.own = cli.datamodule, gpu, own
        _refuse_unmade(self.module.policy_config.path, self.data)
        trainer = cli.config["trainer"]
        self.precision = PRECISIONS.get(str(trainer.get("precision") or "32-true"), "")
        if not self.precision:
            raise ConfigError(f"plan knows the precisions {', '.join(PRECISIONS)}, found {trainer['precision']}")
        self.device = _device(str(trainer.get("accelerator") or "auto"), gpu, own)
        per_node, self.guessed = _devices(trainer.get("devices"))
        ranks = per_node * int(trainer.get("num_nodes") or 1)
        spread = _spread(trainer.get("strategy"), ranks, per_node, self.precision)
        self.accumulate = int(trainer.get("accumulate_grad_batches") or 1)
        length = own.length or self.data.max_length
        pairs, passes = self._packed(length)
        reference = cast(ReferenceKind, _reference_name(self.module))
        self.case = Case(spread, reference, self.device, self.data.layout, pairs, passes * self.accumulate, length)
        # neither changes what a step takes by more than some rows of embeddings
        self.config = replace(self.module.policy_config, rope=None, resize_embeddings=False)
        self.kept = DTYPES[self.config.dtype or ("bfloat16" if self.precision == "bf16-true" else "float32")]

    def _packed(self, length: int) -> tuple[int, int]:
        """Pairs in a forward pass, and passes in a batch."""
        pairs, budget = self.data.batch_size, self.data.token_budget
        if budget is None:
            return pairs, 1
        one = self._tokens_of_one(length)
        if one > budget:
            raise ConfigError(
                f"--data.token_budget {budget:,} is below the {one:,} tokens of one pair of {length:,}, "
                f"{self.own.prompt_share:.0%} of it prompt. Raise it, lower --data.max_length, or plan for shorter "
                "pairs with --length."
            )
        count = min(pairs, budget // one)
        return count, -(-pairs // count)

    def _tokens_of_one(self, length: int) -> int:
        """Tokens that a pair puts through the model, padding included; layouts make as many of each."""
        prompt, response = self._sizes(length)
        return LAYOUTS[self.data.layout].tokens([PairSize(prompt, response, response)])

    def _sizes(self, length: int) -> tuple[int, int]:
        prompt = min(max(1, round(length * self.own.prompt_share)), length - 1)
        return prompt, length - prompt

    def _trace(self, length: int, *, pairs: int | None = None, **changes: Any) -> Step:
        """Of one forward pass; weights counted as they are kept. ``changes`` are of the policy's config."""
        # gathered in bfloat16, weights are cast before layers see them, and no cast copies are kept
        dtype = torch.bfloat16 if self.case.spread.gather == 0.5 else self.kept
        batch = batch_of(self.case.layout, pairs or self.case.pairs, *self._sizes(length))
        step = trace(
            replace(self.config, **changes), dtype, batch, self.module.optimizer,
            autocast=torch.bfloat16 if self.precision == "bf16-mixed" else None,
            reference=self.case.reference in LIVE, foreach=self.device == "cuda",
        )  # fmt: skip
        return step.weighing(self.kept.itemsize / dtype.itemsize)

    def _memory(self, step: Step, **changes: Any) -> Memory:
        case = replace(self.case, **changes)
        return memory(
            step, case.spread, case.reference, self.vocabulary, case.device, passes=case.passes,
            reference_weights=self.reference_weights,
        )  # fmt: skip

    @cached_property
    def reference_weights(self) -> int | None:
        """Bytes of a Frozen reference that is another model than the policy."""
        if not isinstance(self.module.reference, Frozen) or self.module.reference.path is None:
            return None
        source = self.module.reference.source(self.config)
        model, why = blank_model(replace(source, adapter=None), self.kept)
        if model is None:
            raise ConfigError(f"plan can't build the reference {source.path} without its weights: {why}.")
        return sum(int(p.nbytes) for p in model.parameters())

    @cached_property
    def text_config(self) -> Any:
        """Of the model."""
        return self.config.load_config().get_text_config()

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.text_config.vocab_size)

    @property
    def room(self) -> float:
        """Bytes for a rank: of a GPU, as given, or its share of this machine's memory."""
        if self.gpu is not None:
            return self.gpu.memory * 1e9 * USABLE
        if self.own.memory is not None:
            return float(self.own.memory * 1e9 * (USABLE if self.device == "cuda" else 1))
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.case.spread.per_node

    def print(self) -> int:
        """The report; 1 where the run doesn't fit."""
        if sys.stderr.isatty():
            print("tracing one step without weights ...", end="\r", file=sys.stderr, flush=True)
        step = self._trace(self.case.length)
        held = self._memory(step)
        longest = self._longest(step, held)
        fits = held.total <= self.room
        document = self._document(step, held, longest, fits)
        document["advice"] = [] if fits else self._advice(step, longest)
        if self.own.json:
            print(jsonlib.dumps(document))
        else:
            self._table(step, held, document)
        return int(not fits)

    def _longest(self, step: Step, held: Memory) -> int:
        """Tokens of the longest pairs, all of a batch, that fit, up to what the model takes; 0 where none does.

        Memory is nearly a line over the length, so what a line says is traced once, and corrected by that.
        """
        limit = getattr(self.text_config, "max_position_embeddings", None) or 1 << 20
        here, there = self.case.length, max(4, self.case.length // 2)
        at_here, at_there = held.total, self._memory(self._trace(there)).total
        slope = (at_here - at_there) / (here - there or 1)
        if slope <= 0:  # nothing grows: another moment is the worst
            return int(limit if at_here <= self.room else 0)
        found = min(int(here + (self.room - at_here) / slope), limit)
        if found < 4:
            return 0
        at_found = self._memory(self._trace(found)).total
        if at_found <= self.room:
            return found
        slope = max(slope, (at_found - at_here) / (found - here or 1))
        return max(0, int(found - (at_found - self.room) / slope))

    def _document(self, step: Step, held: Memory, longest: int, fits: bool) -> dict[str, Any]:
        case, spread = self.case, self.case.spread
        tokens = step.tokens * case.passes * spread.ranks
        document: dict[str, Any] = {
            "model": self.config.path, "parameters": step.parameters, "trainable": step.trainable,
            "strategy": spread.kind, "ranks": spread.ranks, "shard": spread.shard, "layout": case.layout,
            "reference": case.reference, "precision": self.precision, "length": case.length,
            "bytes_per_rank": {**asdict(held), "total": held.total}, "room": self.room, "fits": fits,
            "pass_tokens": step.tokens, "passes": case.passes,
            "pairs_per_step": self.data.batch_size * self.accumulate * spread.ranks, "tokens_per_step": tokens,
            "flops_per_step": step.flops * case.passes * spread.ranks, "longest_pair": longest,
        }  # fmt: skip
        if self.gpu is not None and self.precision.startswith("bf16"):  # the table's peaks are of bfloat16
            time = duration(step, spread, case.reference, case.passes, self.gpu, self.own.mfu, self.own.network)
            document |= {
                "seconds_per_step": time.step, "compute_seconds": time.compute,
                "communication_seconds": time.communication, "tokens_per_second": tokens / time.step,
            }  # fmt: skip
        return document

    def _advice(self, step: Step, longest: int) -> list[str]:
        """Changes that make it fit, or help most, each alone, with what it comes to."""
        case, spread = self.case, self.case.spread
        options: list[tuple[str, Memory]] = []
        if case.reference == "Frozen":
            options.append(("--model.reference Stored", self._memory(step, reference="Stored")))
        checkpoints = self.config.gradient_checkpointing
        if checkpoints is None:
            checkpoints = step.parameters >= CHECKPOINTING_FROM
        if not checkpoints:
            again = self._trace(case.length, gradient_checkpointing=True)
            options.append(("--model.policy.gradient_checkpointing true", self._memory(again)))
        if not self.config.adapts:
            adapter = self._trace(case.length, lora=Lora())
            kind: ReferenceKind = "AdaptersOff" if case.reference == "Frozen" else case.reference
            options.append(("--model.policy.lora.r 16 (an adapter is trained)", self._memory(adapter, reference=kind)))
        if spread.kind in ("single", "ddp") and spread.ranks > 1:
            sharded = replace(spread, kind="fsdp2", shard=spread.ranks)
            options.append(("--trainer.strategy fsdp2", self._memory(step, spread=sharded)))
        if spread.kind == "fsdp2":
            wider = replace(spread, ranks=2 * spread.ranks, shard=2 * spread.shard)
            options.append((f"{2 * spread.ranks} devices instead of {spread.ranks}", self._memory(step, spread=wider)))
            if self.device == "cuda" and not spread.offload:
                away = replace(spread, offload=True)
                options.append(("--trainer.strategy.cpu_offload true (slow)", self._memory(step, spread=away)))
        if case.pairs > 1:
            one = self._trace(case.length, pairs=1)
            budget = self._tokens_of_one(case.length)
            text = f"--data.token_budget {budget:,} (a pair in each pass; the same gradients)".replace(",", "")
            options.append((text, self._memory(one, passes=case.pairs * case.passes)))
        lines = [
            f"{text}: {held.total / 1e9:.1f} GB" + (", fits" if held.total <= self.room else "")
            for text, held in sorted(options, key=lambda option: option[1].total)
        ]
        if longest:
            lines.append(f"--data.max_length {longest}, fits")
        if not any(line.endswith("fits") for line in lines):
            lines.append("none of these is enough alone: put some together")
        return lines

    def _table(self, step: Step, held: Memory, document: dict[str, Any]) -> None:
        case, spread = self.case, self.case.spread
        shape = f"{spread.ranks} rank{'s' * (spread.ranks > 1)}" + (
            f", {spread.ranks // spread.per_node} nodes of {spread.per_node}" if spread.ranks > spread.per_node else ""
        )
        print(f"{self.config.path}: {step.parameters:,} parameters, {step.trainable:,} trainable "
              f"({step.trainable / step.parameters:.2%})")  # fmt: skip
        print(f"{spread.kind} over {shape}; reference {case.reference}; layout {case.layout}; {self.precision}; "
              f"{case.length:,} tokens each, {case.pairs} in a forward pass, {case.passes} passes a step")  # fmt: skip
        if self.guessed:
            print("devices: auto, which a plan can't ask: 1 is meant. Say how many with --devices")
        print("\nmemory of a rank at the worst moment, GB")
        for name in ("weights", "gradients", "optimizer", "reference", "gathered", "activations", "process"):
            note = f"  (logits at most {held.logits / 1e9:.2f})" if name == "activations" else ""
            print(f"  {name:<12}{getattr(held, name) / 1e9:>9.2f}{note}")
        room = f" of {self.room / 1e9:.1f}"
        if self.gpu is None and self.own.memory is None:
            room += ", this machine's" + (f" for each of {spread.per_node}" if spread.per_node > 1 else "")
        print(f"  {'total':<12}{held.total / 1e9:>9.2f}{room}" + ("" if document["fits"] else "   DOES NOT FIT"))
        if held.host:
            print(f"  {'on the host':<12}{held.host / 1e9:>9.2f} for each rank")
        print(f"\n{document['pairs_per_step']:,} pairs and {document['tokens_per_step']:,} tokens a step, "
              f"{document['flops_per_step'] / 1e12:,.1f} TFLOP")  # fmt: skip
        if self.gpu is not None and "seconds_per_step" not in document:
            print("no time: float32 runs at a fraction of the peak that is known; use --trainer.precision bf16-mixed")
        elif self.gpu is not None:
            print(f"a step: {document['seconds_per_step']:.2f} s ({document['compute_seconds']:.2f} s computing at "
                  f"{self.own.mfu:.0%} of {self.gpu.teraflops:g} TFLOP/s, {document['communication_seconds']:.2f} s "
                  f"travelling meanwhile), {document['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
            print(f"figures of the GPU: {self.gpu.source}")
        limit = getattr(self.text_config, "max_position_embeddings", None)
        at_limit = ", the longest that the model takes" if document["longest_pair"] == limit else ""
        print(f"longest pairs that fit: about {document['longest_pair']:,} tokens{at_limit}")
        if document["advice"]:
            print("\nto make it fit:\n" + "\n".join(f"  {line}" for line in document["advice"]))


def _device(accelerator: str, gpu: GPU | None, own: argparse.Namespace) -> Device:
    """What the run is on, by its config and what was asked."""
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


def _devices(asked: Any) -> tuple[int, bool]:
    """Devices of a node, and whether their number is not said and taken to be 1."""
    if asked in (None, "auto", -1, "-1"):
        return 1, asked in ("auto", -1, "-1")
    if isinstance(asked, list):
        return len(asked), False
    numbers = [number.strip() for number in str(asked).split(",")]
    if not all(number.lstrip("-").isdigit() for number in numbers if number):
        raise ConfigError(f"--trainer.devices: expected a number, a list of them, or auto; found {asked}")
    # as Lightning reads it: "2" is two devices, "2," is the one of that number
    count = int(numbers[0]) if len(numbers) == 1 else sum(number != "" for number in numbers)
    if count < 1:
        raise ConfigError(f"--trainer.devices must be at least 1, found {asked}")
    return count, False


def _reference_name(module: PreferenceModule) -> str:
    name = type(module.reference).__name__
    # a warmed reference is a copy of what is trained, too
    return {"NoReference": "none", "Warmed": "Synchronised"}.get(name, name)


def _spread(strategy: Any, ranks: int, per_node: int, precision: str) -> Spread:
    """What a strategy's name or class and options come to."""
    if isinstance(strategy, str) or strategy is None:
        name, options = str(strategy or "auto"), {}
    else:
        name, options = str(strategy["class_path"]), dict(strategy.get("init_args") or {})
    short = name.rpartition(".")[2].lower()
    half = 0.5 if precision == "bf16-mixed" else 1.0
    if short == "auto":
        return Spread("single" if ranks == 1 else "ddp", ranks, per_node, 1, buckets_apart=ranks > 1)
    if short in ("ddpstrategy", "singledevicestrategy") or short.startswith("ddp"):
        apart = not options.get("gradient_as_bucket_view")
        return Spread("ddp" if ranks > 1 else "single", ranks, per_node, 1, buckets_apart=apart and ranks > 1)
    if short == "fsdp2":
        gather = {"bfloat16": 0.5 if precision != "bf16-true" else 1.0, "float32": 1.0}.get(
            str(options.get("gather")), half
        )
        shard = int(options.get("shard_size") or ranks)
        if ranks % shard:
            raise ConfigError(f"--trainer.strategy.shard_size {shard} doesn't divide the {ranks} processes.")
        return Spread("fsdp2", ranks, per_node, shard, bool(options.get("cpu_offload")), gather)
    if short == "modelparallelstrategy":
        return Spread("fsdp2", ranks, per_node, ranks)
    if "deepspeed" in short:  # other stages and offload are refused
        return Spread("zero2", ranks, per_node, 1, gather=half)
    raise ConfigError(f"plan doesn't know the strategy {name}: it knows auto, ddp, fsdp2 and deepspeed's stage 2.")
