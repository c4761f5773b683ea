"""``rap-lightning plan``: whether a run fits, how long a step takes, and what to change."""

from __future__ import annotations

import argparse
import json as jsonlib
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import torch

from rap_lightning.errors import ConfigError
from rap_lightning.models.policy import CHECKPOINTING_FROM, DTYPES
from rap_lightning.module import PreferenceModule
from rap_lightning.planning.estimate import USABLE, Kind, Memory, ReferenceKind, Spread, duration, memory
from rap_lightning.planning.gpus import GPU, GPUS, find_gpu
from rap_lightning.planning.trace import Step, batch_of, trace
from rap_lightning.trainer_cli import PreferenceCLI, parse_only

DESCRIPTION = """Say what a run will take, before anything is loaded: from the model's config alone, on any machine.

Example: rap-lightning plan --config configs/llama-3.1-8b-instruct.yaml --devices 8 --gpu h100-80gb

Takes every option of fit (rap-lightning fit --help), configs too, and those below. The model's real code runs one
step on tensors without memory; what strategies add is reckoned (docs/scaling.md says what was measured)."""


@dataclass(frozen=True)
class Case:
    """What plan was asked about."""

    spread: Spread
    reference: ReferenceKind
    device: Literal["cpu", "cuda"]
    layout: str
    pairs: int
    passes: int
    length: int


def run(args: list[str]) -> int:
    """Parse and print; 1 where the run doesn't fit."""
    own, rest = _parser().parse_known_args(args)
    for option, flag in (("devices", "--trainer.devices"), ("nodes", "--trainer.num_nodes")):
        if getattr(own, option) is not None:
            rest += [flag, str(getattr(own, option))]
    cli = parse_only(rest)
    if not isinstance(cli.model, PreferenceModule):
        raise ConfigError("plan knows the runs of PreferenceModule and its subclasses.")
    if own.length is not None and own.length < 2:
        raise ConfigError(f"--length must be at least 2 tokens, found {own.length}")
    if not 0 < own.prompt_share < 1 or not 0 < own.mfu <= 1:
        raise ConfigError("--prompt_share and --mfu are shares, above 0 and below 1.")
    gpu = _gpu(own)
    return _Plan(cli, gpu, own).print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rap-lightning plan", description=DESCRIPTION, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
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


class _Plan:
    def __init__(self, cli: PreferenceCLI, gpu: GPU | None, own: argparse.Namespace) -> None:
        self.module: PreferenceModule = cli.model
        self.data, self.gpu, self.own = cli.datamodule, gpu, own
        trainer = cli.config["trainer"]
        self.precision = str(trainer.get("precision") or "32-true")
        if self.precision not in ("32-true", "32", "bf16-mixed", "bf16-true"):
            raise ConfigError(f"plan knows the precisions 32-true, bf16-mixed and bf16-true, found {self.precision}")
        per_node = trainer.get("devices")
        per_node = 1 if per_node in (None, "auto", -1, "-1") else int(per_node)
        ranks = per_node * int(trainer.get("num_nodes") or 1)
        spread = _spread(trainer.get("strategy"), ranks, per_node, self.precision)
        accumulate = int(trainer.get("accumulate_grad_batches") or 1)
        length = own.length or self.data.max_length
        pairs, passes = self._packed(length)
        reference = cast(ReferenceKind, _reference_name(self.module))
        self.accumulate = accumulate
        self.case = Case(
            spread, reference, "cpu" if gpu is None else "cuda", self.data.layout, pairs, passes * accumulate, length
        )
        self.config = self.module.policy_config
        self.kept = DTYPES[self.config.dtype or ("bfloat16" if self.precision == "bf16-true" else "float32")]

    def _packed(self, length: int) -> tuple[int, int]:
        """Pairs in a forward pass, and passes in a batch."""
        from rap_lightning.batches.layouts import LAYOUTS
        from rap_lightning.batches.sampler import PairSize

        pairs, budget = self.data.batch_size, self.data.token_budget
        if budget is None:
            return pairs, 1
        prompt, response = self._sizes(length)
        size, count = PairSize(prompt, response, response), 1
        tokens = LAYOUTS[self.data.layout].tokens
        if tokens([size]) > budget:
            raise ConfigError(
                f"--data.token_budget {budget:,} is below the {tokens([size]):,} tokens of one such pair."
            )
        while count < pairs and tokens([size] * (count + 1)) <= budget:
            count += 1
        return count, -(-pairs // count)

    def _sizes(self, length: int) -> tuple[int, int]:
        prompt = min(max(1, round(length * self.own.prompt_share)), length - 1)
        return prompt, length - prompt

    def _trace(self, length: int, *, checkpointing: bool | None = None) -> Step:
        """Of one forward pass; weights counted as they are kept."""
        autocast = torch.bfloat16 if self.precision == "bf16-mixed" else None
        config = self.config if checkpointing is None else replace(self.config, gradient_checkpointing=checkpointing)
        # gathered in bfloat16, weights are cast before layers see them, and no cast copies are kept
        dtype = torch.bfloat16 if self.case.spread.gather == 0.5 else self.kept
        batch = batch_of(self.case.layout, self.case.pairs, *self._sizes(length))
        step = trace(config, dtype, batch, self.module.optimizer, autocast=autocast)
        factor = self.kept.itemsize / dtype.itemsize
        if factor == 1:
            return step
        return replace(
            step, weights=int(step.weights * factor), gradients=int(step.gradients * factor),
            optimizer=int(step.optimizer * factor), largest_unit=int(step.largest_unit * factor),
            root=int(step.root * factor), timeline=tuple((a, int(g * factor)) for a, g in step.timeline),
        )  # fmt: skip

    def _memory(self, step: Step, **changes: Any) -> Memory:
        case = replace(self.case, **changes)
        return memory(step, case.spread, case.reference, self.vocabulary, case.device)

    @property
    def room(self) -> float | None:
        """Bytes for a rank."""
        if self.gpu is not None:
            return self.gpu.memory * 1e9 * USABLE
        return self.own.memory * 1e9 if self.own.memory is not None else None

    def print(self) -> int:
        """The report; 1 where the run doesn't fit."""
        from transformers import AutoConfig

        if sys.stderr.isatty():
            print("tracing one step without weights ...", end="\r", file=sys.stderr, flush=True)
        self.vocabulary = AutoConfig.from_pretrained(
            self.config.path, revision=self.config.revision, trust_remote_code=self.config.trust_remote_code
        ).get_text_config().vocab_size  # fmt: skip
        step = self._trace(self.case.length)
        held = self._memory(step)
        longest = self._longest(step, held)
        fits = self.room is None or held.total <= self.room
        document = self._document(step, held, longest, fits)
        document["advice"] = [] if fits else self._advice(step)
        if self.own.json:
            print(jsonlib.dumps(document))
        else:
            self._table(step, held, document)
        return int(not fits)

    def _longest(self, step: Step, held: Memory) -> int | None:
        """Tokens of the longest pairs, all of a batch, that fit: memory is a line over the length."""
        if self.room is None:
            return None
        half = max(16, self.case.length // 2)
        slope = (held.total - self._memory(self._trace(half)).total) / (self.case.length - half or 1)
        if slope <= 0:
            return None
        return max(0, int(self.case.length + (self.room - held.total) / slope))

    def _document(self, step: Step, held: Memory, longest: int | None, fits: bool) -> dict[str, Any]:
        case, spread = self.case, self.case.spread
        tokens = step.tokens * case.passes * spread.ranks
        document: dict[str, Any] = {
            "model": self.config.path, "parameters": step.parameters, "trainable": step.trainable,
            "strategy": spread.kind, "ranks": spread.ranks, "shard": spread.shard, "layout": case.layout,
            "reference": case.reference, "precision": self.precision, "length": case.length,
            "bytes_per_rank": {**asdict(held), "total": held.total}, "room": self.room, "fits": fits,
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

    def _advice(self, step: Step) -> list[str]:
        """Changes that make it fit, or help most."""
        case, spread, room = self.case, self.case.spread, self.room or 0.0
        options: list[tuple[str, Memory]] = []
        if case.reference == "Frozen":
            options.append(("--model.reference Stored", self._memory(step, reference="Stored")))
        checkpoints = self.config.gradient_checkpointing
        if checkpoints is None:
            checkpoints = step.parameters >= CHECKPOINTING_FROM
        if not checkpoints:
            again = self._trace(case.length, checkpointing=True)
            options.append(("--model.policy.gradient_checkpointing true", self._memory(again)))
        if spread.kind in ("single", "ddp") and spread.ranks > 1:
            sharded = replace(spread, kind="fsdp2", shard=spread.ranks)
            options.append(("--trainer.strategy fsdp2", self._memory(step, spread=sharded)))
        if spread.kind in ("fsdp2", "zero3"):
            wider = replace(spread, ranks=2 * spread.ranks, shard=2 * spread.shard)
            options.append((f"{2 * spread.ranks} devices instead of {spread.ranks}", self._memory(step, spread=wider)))
            if self.gpu is not None and not spread.offload:
                options.append(
                    (
                        "--trainer.strategy.cpu_offload true (slow)",
                        self._memory(step, spread=replace(spread, offload=True)),
                    )
                )
        if case.pairs > 1:
            smaller = step.timeline and replace(
                step, timeline=tuple((int(a / case.pairs), g) for a, g in step.timeline)
            )
            if smaller:
                options.append(("--data.token_budget of one pair", self._memory(smaller)))
        lines = [
            f"{text}: {held.total / 1e9:.1f} GB" + (", fits" if held.total <= room else "")
            for text, held in sorted(options, key=lambda option: option[1].total)
        ]
        if self.config.lora is None:
            lines.append(
                "--model.policy.lora.r 16: no gradients and optimizer state but the adapter's, no second model"
            )
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
        print("\nmemory of a rank at the worst moment, GB")
        for name in ("weights", "gradients", "optimizer", "reference", "gathered", "activations", "process"):
            note = f"  (logits at most {held.logits / 1e9:.2f})" if name == "activations" else ""
            print(f"  {name:<12}{getattr(held, name) / 1e9:>9.2f}{note}")
        room = f" of {self.room / 1e9:.1f}" if self.room is not None else ""
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
        if document["longest_pair"] is not None:
            print(f"longest pairs that fit: about {document['longest_pair']:,} tokens")
        if document["advice"]:
            print("\nto make it fit:\n" + "\n".join(f"  {line}" for line in document["advice"]))


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
        return Spread("single" if ranks == 1 else "ddp", ranks, per_node, 1)
    if short in ("ddpstrategy", "singledevicestrategy") or short.startswith("ddp"):
        return Spread("ddp" if ranks > 1 else "single", ranks, per_node, 1)
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
    if "deepspeed" in short:
        stage = int(options.get("stage") or (3 if "3" in short else 2))
        offload = bool(options.get("offload_optimizer")) or "offload" in short
        kind: Kind = "zero3" if stage == 3 else "zero2"
        return Spread(kind, ranks, per_node, ranks if stage == 3 else 1, offload, half)
    raise ConfigError(f"plan doesn't know the strategy {name}: it knows auto, ddp, fsdp2 and deepspeed's.")
