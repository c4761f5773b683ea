"""What an optimizer step takes on a GPU: a callback that measures it, and the floating-point operations it needs."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from measure import forget_peak, peak_gb, wait_for
from rap_lightning.batches.sampler import PairSize
from rap_lightning.models.policy import Policy, of_adapter

SIGN = "synchronizing CUDA operation"
"""In the warning that torch gives at each call for which the host waits, in its debug mode."""


@contextmanager
def synchronisations(device: torch.device) -> Iterator[Counter[str]]:
    """Count the calls of a block for which the host waits for the device, by the line of Python that made them."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            for one in seen:
                if SIGN in str(one.message):
                    found["/".join(one.filename.split("/")[-2:]) + f":{one.lineno}"] += 1


def graphs_compiled() -> int:
    """Return how many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters  # torch has no public counter (2.13)

    return int(counters["stats"]["unique_graphs"])


class StepMeter(pl.Callback):
    """Measures optimizer steps: some to warm up, some for the clock, and some in which synchronisations are counted.

    Args:
        warm_up, timed, counted: steps of each kind.

    Attributes:
        found: what was measured.
    """

    def __init__(self, device: torch.device, warm_up: int, timed: int, counted: int) -> None:
        self.device, self.warm_up, self.timed, self.counted = device, warm_up, timed, counted
        self.found: dict[str, Any] = {}
        self._counting = ExitStack()

    @property
    def steps(self) -> int:
        """How many there are; the last one only ends the counting."""
        return self.warm_up + self.timed + self.counted + 1

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Change from one kind of step to the next; a step ends where the next one's batch is on the device."""
        kind = self.device.type
        step = trainer.global_step
        if step == self.warm_up:
            forget_peak(kind)
            self._graphs = graphs_compiled()
            wait_for(kind)
            self._start = time.perf_counter()
        if step == self.warm_up + self.timed:
            wait_for(kind)
            self.found["seconds"] = (time.perf_counter() - self._start) / self.timed
            self.found["peak_gb"] = peak_gb(kind)
            if kind == "cuda":
                self.found["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
            self._waits = self._counting.enter_context(synchronisations(self.device))
        if step == self.steps - 1:
            self._counting.close()
            self.found["synchronisations"] = round(sum(self._waits.values()) / self.counted, 2)
            self.found["waits"] = dict(self._waits.most_common(6))
            self.found["recompiles"] = graphs_compiled() - self._graphs

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Nothing is counted after training."""
        self._counting.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """torch's debug mode ends with the run."""
        self._counting.close()


def useful_flops(policy: Policy, sizes: Iterable[PairSize], *, live_reference: bool) -> float:
    """Return the floating-point operations that the pairs need, by the formula that gpu.md prints (FORMULA)."""
    lm = policy.causal_lm
    base, adapter = 0, 0
    for name, module in lm.base_model.named_modules():
        if isinstance(module, nn.Linear):
            numbers = module.in_features * module.out_features  # a 4-bit weight has another shape
            adapter += numbers if of_adapter(f"{name}.") else 0
            base += 0 if of_adapter(f"{name}.") else numbers
    config: Any = lm.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_hidden_layers * config.num_attention_heads * size
    head = config.vocab_size * config.hidden_size
    full = not policy.has_adapter
    total = 0.0
    for prompt, *responses in sizes:
        tokens = prompt + sum(responses)
        seen = _below(prompt) + sum(length * prompt + _below(length) for length in responses)
        scored = sum(responses)
        of_weights, of_adapters = 2.0 * base * tokens, 2.0 * adapter * tokens
        of_head, of_scores = 2.0 * head * scored, 4.0 * attention * seen
        forward = of_weights + of_adapters + of_head + of_scores
        backward = (2 if full else 1) * (of_weights + of_head) + 2 * (of_adapters + of_scores)
        total += forward + backward + (forward if live_reference else 0)
    return total


FORMULA = (
    "Useful operations of a pair, with T tokens (the prompt once, no padding), R of them of responses, S pairs of "
    "query and key in the pair's prefix tree, W weights of linear layers in the body, A weights of adapters, V·D of "
    "the head, H query heads of size d in L layers: forward F = 2·W·T + 2·A·T + 2·V·D·R + 4·L·H·d·S; backward 2·F, "
    "and with an adapter W and the head once (their weights have no gradient); a live reference one F more. "
    "Activations that are computed again don't count, nor do a prompt's second time and padding, whoever computes "
    "them. MFU is operations per second over the published dense bfloat16 peak."
)


def _below(length: int) -> int:
    """Pairs of query and key in a causal sequence."""
    return length * (length + 1) // 2
