"""Which way attention over a forest is computed: a function of what a layer asks for and of what the machine offers.

Nothing here touches a device or a tensor, so that a run, ``plan`` and a test on a CPU get the same answer for a GPU.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

HALVES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)  # Ampere
FLASH_HEAD_SIZE = 256
NARROW_HEAD_SIZE = 192  # for the backward pass on devices with little shared memory
LITTLE_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Demand:
    """What a layer asks for.

    Attributes:
        dtype: of query, key and value.
        head_size, value_size: of queries and keys, and of values.
        softcap, window: see :class:`~rap_lightning.models.masked_attention.AttentionCall`.
        sinks: whether each head has an attention sink.
        dropout: whether weights are dropped.
    """

    dtype: torch.dtype
    head_size: int
    value_size: int
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Machine:
    """What a device offers to attention.

    Attributes:
        device_type: "cuda", "cpu", ...
        capability: compute capability of a CUDA device, else None.
        no_flash: why torch has no flash attention for it, or None where it has.
        no_flex: why FlexAttention can't be compiled for it, or None where it can.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    no_flash: str | None = None
    no_flex: str | None = None

    @classmethod
    def cuda(cls, capability: tuple[int, int], no_compiler: str | None = None) -> Machine:
        """Return what an NVIDIA GPU of this compute capability offers, with Triton or with the reason why not."""
        found = f"compute capability {capability[0]}.{capability[1]}, and {{}} needs {FLASH_CAPABILITY[0]}.0"
        old = capability < FLASH_CAPABILITY
        # Triton generates code for 7.0 and newer; bfloat16 there is emulated, and the self-check decides
        return cls(
            "cuda", capability, found.format("flash attention") if old else None,
            no_compiler or ("compute capability below 7.0" if capability < (7, 0) else None),
        )  # fmt: skip

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Return what a device of this process offers."""
        return _machine(device)


@dataclass(frozen=True)
class Choice:
    """A way to compute attention.

    Attributes:
        path: "blockwise", "varlen", "flex" or "mask".
        reason: for "mask", why not the others; else how it computes.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


def choices(demand: Demand, machine: Machine) -> tuple[Choice, ...]:
    """Return the ways in which a call can be computed, best first; the last is always "mask"."""
    refusals: list[str] = []
    found: list[Choice] = []
    for path, what, refusal in (
        ("blockwise", "flash attention run by run", _no_blockwise(demand, machine)),
        ("varlen", "flash attention over runs, merged by log-sum-exp", _no_varlen(demand, machine)),
        ("flex", "FlexAttention with block masks", _no_flex(demand, machine)),
    ):
        if refusal is None:
            found.append(Choice(path, what))
        elif refusal:
            refusals.append(f"no {path}: {refusal}")
    return (*found, Choice("mask", "; ".join(refusals)))


def choose(demand: Demand, machine: Machine) -> Choice:
    """Return the best way to compute a call."""
    return choices(demand, machine)[0]


def _no_blockwise(demand: Demand, machine: Machine) -> str | None:
    """Return why not, or None where it can; "" where the reason needs no mention."""
    if machine.device_type != "cpu":
        return ""
    return _options(demand, ("softcap", "window", "sinks", "dropout")) or _sizes(demand)


def _no_varlen(demand: Demand, machine: Machine) -> str | None:
    if machine.device_type == "cpu":
        return ""
    if machine.device_type != "cuda":
        return f"device {machine.device_type}"
    if machine.no_flash is not None:
        return machine.no_flash
    if reason := _options(demand, ("softcap", "window", "dropout")) or _sizes(demand):
        return reason
    if demand.dtype not in HALVES:
        return f"{demand.dtype}"
    if demand.head_size % 8 or demand.head_size > FLASH_HEAD_SIZE:
        return f"heads of {demand.head_size} numbers"
    if demand.head_size > NARROW_HEAD_SIZE and machine.capability in LITTLE_SHARED_MEMORY:
        return f"heads of {demand.head_size} numbers on compute capability {machine.capability}"
    return None


def _no_flex(demand: Demand, machine: Machine) -> str | None:
    if machine.device_type == "cpu":
        return ""
    if machine.device_type not in ("cuda", "xpu"):
        return f"device {machine.device_type}"
    if machine.no_flex is not None:
        return machine.no_flex
    return _options(demand, ("dropout",))


def _options(demand: Demand, names: tuple[str, ...]) -> str | None:
    asked = [name for name in names if getattr(demand, name) not in (None, False)]
    return ", ".join(asked) or None


def _sizes(demand: Demand) -> str | None:
    return None if demand.head_size == demand.value_size else "values of another size than keys"


def no_compiler() -> str | None:
    """Return why Triton can't compile kernels in this environment, or None where nothing is known to be missing."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    # as Triton looks for it, to build its launchers
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc or clang, or the variable CC), which Triton needs"
    return None


@cache
def _machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(device.type, no_flex=None if device.type == "cpu" else no_compiler())
    if torch.version.hip:  # capabilities are those of NVIDIA's devices
        return Machine("cuda", None, "a ROCm build of torch", no_compiler())
    return Machine.cuda(torch.cuda.get_device_capability(device), no_compiler())
