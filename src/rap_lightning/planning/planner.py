"""What a run takes, the longest pairs that fit, and what to change where it does not fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch

from rap_lightning.batches.layouts import LAYOUTS
from rap_lightning.batches.sampler import PairSize
from rap_lightning.distributed.sharded_load import blank_model
from rap_lightning.errors import ConfigError
from rap_lightning.models.attention_choice import Machine
from rap_lightning.models.policy_config import CHECKPOINTING_FROM, DTYPES, Lora, PolicyConfig
from rap_lightning.models.references.adapters_off import AdaptersOff
from rap_lightning.models.references.base import Reference
from rap_lightning.models.references.frozen import Frozen
from rap_lightning.planning.estimate import LIVE, Device, Memory, ReferenceKind, Spread, duration, memory
from rap_lightning.planning.gpus import GPU
from rap_lightning.planning.trace import Step, batch_of, trace

TRIES, CLOSE, SHORTEST = 6, 0.03, 4
"""Lengths that are traced for the longest pair; how near to the limit is near enough; tokens."""


@dataclass(frozen=True)
class PlannedRun:
    """What a run's config says about memory and time.

    Attributes:
        policy, reference, optimizer: the module's.
        precision: 32-true, bf16-mixed or bf16-true.
        spread, device: where it runs.
        room: bytes that a rank may take.
        layout, batch_size, token_budget: the data module's; pairs, tokens.
        accumulate: batches in an optimizer step.
        length: tokens of prompt and response.
        prompt_share: the prompt's share of the length.
        machine: what the device offers to attention; None on a CPU.
    """

    policy: PolicyConfig
    reference: Reference
    optimizer: Callable[[Any], Any]
    precision: str
    spread: Spread
    device: Device
    room: float
    layout: str
    batch_size: int
    token_budget: int | None
    accumulate: int
    length: int
    prompt_share: float
    machine: Machine | None = None

    @property
    def reference_kind(self) -> ReferenceKind:
        """A reference copied after warm-up is a second copy of the trained weights, as a synchronised one is."""
        name = type(self.reference).__name__
        return cast(ReferenceKind, {"NoReference": "none", "Warmed": "Synchronised"}.get(name, name))

    def sizes(self, length: int) -> tuple[int, int]:
        """Tokens of the prompt and of a response in pairs of a length."""
        prompt = min(max(1, round(length * self.prompt_share)), length - 1)
        return prompt, length - prompt

    def pair_tokens(self, length: int) -> int:
        """Tokens of one pair in a forward pass, padding included."""
        prompt, response = self.sizes(length)
        return LAYOUTS[self.layout].tokens([PairSize(prompt, response, response)])


class Planner:
    """Traces a run on tensors without memory, and estimates what each rank holds.

    Raises:
        ConfigError: the token budget is smaller than one pair, or the model cannot be built from its config.
    """

    def __init__(self, run: PlannedRun) -> None:
        # neither changes what a step takes by more than some rows of embeddings
        self.run = replace(run, policy=replace(run.policy, rope=None, resize_embeddings=False))
        self.pairs, self.passes = self._packed(run.length)
        default = DTYPES[run.policy.dtype or ("bfloat16" if run.precision == "bf16-true" else "float32")]
        mixed = run.device == "cuda" and run.precision == "bf16-mixed"
        gather = torch.bfloat16 if run.spread.gather == 0.5 else None
        self.kept, self.reference_dtype = run.policy.loading_dtypes(default, mixed=mixed, gather=gather)
        if self.kept == torch.bfloat16:  # an adapter's base: gathered as it is kept
            self.run = replace(self.run, spread=replace(run.spread, gather=1.0))
        self.step = self._trace(run.length)
        self.memory = self._memory(self.step)
        self.fits = self.memory.total <= run.room

    def _packed(self, length: int) -> tuple[int, int]:
        """Pairs of a length in a forward pass, and forward passes in an optimizer step."""
        run = self.run
        if run.token_budget is None:
            return run.batch_size, run.accumulate
        one = run.pair_tokens(length)
        if one > run.token_budget:
            raise ConfigError(
                f"--data.token_budget {run.token_budget:,} is below the {one:,} tokens of one pair of {length:,}, "
                f"{run.prompt_share:.0%} of it prompt. Raise it, lower --data.max_length, or plan for shorter pairs "
                "with --length."
            )
        count = min(run.batch_size, run.token_budget // one)
        return count, -(-run.batch_size // count) * run.accumulate

    def _trace(self, length: int, pairs: int | None = None, **changes: Any) -> Step:
        """Trace one forward and backward pass; ``changes`` are of the policy's config."""
        run = self.run
        # gathered in bfloat16, weights are cast before the layers read them, and no casted copies are kept
        dtype = torch.bfloat16 if run.spread.gather == 0.5 else self.kept
        return trace(
            replace(run.policy, **changes), dtype, batch_of(run.layout, pairs or self.pairs, *run.sizes(length)),
            run.optimizer, kept=self.kept, autocast=torch.bfloat16 if run.precision == "bf16-mixed" else None,
            reference=run.reference_kind in LIVE, foreach=run.device == "cuda", machine=run.machine,
        )  # fmt: skip

    def _memory(
        self, step: Step, spread: Spread | None = None, reference: ReferenceKind | None = None,
        passes: int | None = None,
    ) -> Memory:  # fmt: skip
        run, share = self.run, self.reference_dtype.itemsize / self.kept.itemsize
        return memory(
            step, spread or run.spread, reference or run.reference_kind, run.device, passes=passes or self.passes,
            reference_weights=self._reference_weights or int(step.weights * share),
        )  # fmt: skip

    @cached_property
    def _reference_weights(self) -> int | None:
        """Bytes of a Frozen reference that is another model than the policy."""
        reference, run = self.run.reference, self.run
        if not isinstance(reference, Frozen) or reference.path is None:
            return None
        source = reference.source(run.policy)
        model, why = blank_model(replace(source, adapter=None), self.reference_dtype)
        if model is None:
            raise ConfigError(f"plan can't build the reference {source.path} without its weights: {why}.")
        return sum(int(p.nbytes) for p in model.parameters())

    @cached_property
    def longest_pair(self) -> int:
        """Tokens of the longest pairs that fit, up to the model's context and the token budget; 0 where none fits.

        Memory is nearly linear in the length: a line through the lengths that were traced gives the next one to trace.
        What is returned was traced, and fits.
        """
        room, known = self.run.room, {self.run.length: self.memory.total}
        fits, over = (self.run.length, self._limit + 1) if self.fits else (0, self.run.length)
        guess = self._guess(known)
        for _ in range(TRIES):
            guess = min(max(guess, fits + 1), over - 1)
            if guess < SHORTEST or guess in known or over - fits <= CLOSE * fits:
                break
            if len(known) > 2 and fits < guess < (1 + CLOSE) * fits:
                break
            known[guess] = self._total_at(guess)
            fits, over = (guess, over) if known[guess] <= room else (fits, guess)
            guess = self._guess(known)
        return fits

    @cached_property
    def _limit(self) -> int:
        """Tokens of the longest pairs that the model and the token budget take."""
        limit, budget = self.step.context or 1 << 20, self.run.token_budget
        if budget is None or self.run.pair_tokens(limit) <= budget:
            return limit
        return bisect_right(range(limit), budget, lo=2, key=self.run.pair_tokens) - 1

    def _total_at(self, length: int) -> float:
        pairs, passes = self._packed(length)
        return self._memory(self._trace(length, pairs), passes=passes).total

    def _guess(self, known: dict[int, float]) -> int:
        """Where the line through the two traced lengths nearest to the room reaches it."""
        room = self.run.room
        (near, at_near), *others = sorted(known.items(), key=lambda item: abs(item[1] - room))
        if not others:  # at most the activations grow with the length
            return int(near * (1 + (room - at_near) / max(self.step.peak(0), 1)))
        slope = (at_near - others[0][1]) / (near - others[0][0])
        if slope <= 0:  # another moment is the worst
            return self._limit if at_near <= room else near // 2
        return int(near + (room - at_near) / slope)

    def document(self, gpu: GPU | None, mfu: float, network: float) -> dict[str, Any]:
        """The plan as plain values; with a GPU and bfloat16, of which its peak is known, the time of a step too."""
        run, spread, step = self.run, self.run.spread, self.step
        tokens = step.tokens * self.passes * spread.ranks
        document: dict[str, Any] = {
            "model": run.policy.path, "parameters": step.parameters, "trainable": step.trainable,
            "strategy": spread.kind, "ranks": spread.ranks, "shard": spread.shard, "layout": run.layout,
            "reference": run.reference_kind, "precision": run.precision, "length": run.length,
            "bytes_per_rank": {**asdict(self.memory), "total": self.memory.total}, "room": run.room,
            "fits": self.fits, "attention": list(step.attention), "pass_tokens": step.tokens, "passes": self.passes,
            "pairs_per_step": run.batch_size * run.accumulate * spread.ranks, "tokens_per_step": tokens,
            "flops_per_step": step.flops * self.passes * spread.ranks, "longest_pair": self.longest_pair,
        }  # fmt: skip
        if gpu is not None and run.precision.startswith("bf16"):
            time = duration(step, spread, run.reference_kind, self.passes, gpu, mfu, network)
            document |= {
                "seconds_per_step": time.step, "compute_seconds": time.compute,
                "communication_seconds": time.communication, "tokens_per_second": tokens / time.step,
            }  # fmt: skip
        return document | {"advice": [] if self.fits else self.advice()}

    def advice(self) -> list[str]:
        """Changes that make the run fit, or help most, each alone, with the memory that it leads to."""
        options = sorted(self._changes(), key=lambda option: option[1].total)
        room = self.run.room
        lines = [f"{text}: {m.total / 1e9:.1f} GB" + (", fits" if m.total <= room else "") for text, m in options]
        if self.longest_pair:
            lines.append(f"--data.max_length {self.longest_pair}, fits")
        if not any(line.endswith("fits") for line in lines):
            lines.append("none of these is enough alone: combine some")
        return lines

    def _changes(self) -> list[tuple[str, Memory]]:
        run, spread, kind = self.run, self.run.spread, self.run.reference_kind
        options: list[tuple[str, Memory]] = []
        if kind == "Frozen":
            options.append(("--model.reference Stored", self._memory(self.step, reference="Stored")))
        checkpoints = run.policy.gradient_checkpointing
        if (self.step.parameters < CHECKPOINTING_FROM) if checkpoints is None else int(checkpoints) != 1:
            again = self._trace(run.length, gradient_checkpointing=True)
            options.append(("--model.policy.gradient_checkpointing true", self._memory(again)))
        if not run.policy.adapts:
            adapter = replace(run, policy=replace(run.policy, lora=Lora()))
            if kind == "Frozen":
                adapter = replace(adapter, reference=AdaptersOff())
            options.append(("--model.policy.lora.r 16 (trains an adapter)", Planner(adapter).memory))
        if spread.kind == "ddp":
            sharded = replace(spread, kind="fsdp2", shard=spread.ranks)
            options.append(("--trainer.strategy fsdp2", self._memory(self.step, spread=sharded)))
        if spread.kind == "fsdp2":
            wider = replace(spread, ranks=2 * spread.ranks, shard=2 * spread.shard)
            devices = f"{2 * spread.ranks} devices instead of {spread.ranks}"
            options.append((devices, self._memory(self.step, spread=wider)))
            if run.device == "cuda" and not spread.offload:
                offloaded = self._memory(self.step, spread=replace(spread, offload=True))
                options.append(("--trainer.strategy.cpu_offload true (slow)", offloaded))
        if self.pairs > 1:
            one = self._trace(run.length, pairs=1)
            text = f"--data.token_budget {run.pair_tokens(run.length)} (one pair in each pass; the same gradients)"
            options.append((text, self._memory(one, passes=self.pairs * self.passes)))
        return options
