"""Published figures of GPUs: memory, dense bfloat16 matrix products, links."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from rap_lightning.errors import ConfigError
from rap_lightning.models.attention_choice import Machine


@dataclass(frozen=True)
class GPU:
    """One device.

    Attributes:
        memory: GB (10^9 bytes) as sold.
        teraflops: peak dense bfloat16 with float32 accumulation.
        link: GB/s to the other GPUs of a node, in one direction.
        source: where the figures were published.
        capability: compute capability of an NVIDIA device, by which kernels are chosen; None for AMD's.
    """

    memory: float
    teraflops: float
    link: float
    source: str
    capability: tuple[int, int] | None

    @property
    def machine(self) -> Machine:
        """What it offers to attention, with Triton and a compiler."""
        if self.capability is None:
            return Machine("cuda", None, "a ROCm build of torch")
        return Machine.cuda(self.capability)


GPUS = {
    "a100-40gb": GPU(40, 312, 300, "NVIDIA A100 datasheet (SXM)", (8, 0)),
    "a100-80gb": GPU(80, 312, 300, "NVIDIA A100 datasheet (SXM)", (8, 0)),
    "h100-80gb": GPU(80, 989, 450, "NVIDIA H100 datasheet (SXM)", (9, 0)),
    "h100-pcie": GPU(80, 756, 64, "NVIDIA H100 datasheet (PCIe, without a bridge)", (9, 0)),
    "h200": GPU(141, 989, 450, "NVIDIA H200 datasheet (SXM)", (9, 0)),
    "b200": GPU(180, 2250, 900, "NVIDIA DGX B200 datasheet, an eighth of it", (10, 0)),
    "mi300x": GPU(192, 1307, 448, "AMD Instinct MI300X datasheet", None),
    "l40s": GPU(48, 362, 32, "NVIDIA L40S datasheet", (8, 9)),
    "l4": GPU(24, 121, 32, "NVIDIA L4 datasheet", (8, 9)),
    "a10": GPU(24, 125, 32, "NVIDIA A10 datasheet", (8, 6)),
    "rtx-4090": GPU(24, 165, 32, "NVIDIA Ada architecture whitepaper", (8, 9)),
}


def find_gpu(name: str) -> GPU:
    """A GPU of the table by name.

    Raises:
        ConfigError: it isn't in the table.
    """
    if name.lower() not in GPUS:
        begun = [known for known in GPUS if known.startswith(name.lower())]
        near = begun or get_close_matches(name.lower(), GPUS, 1)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(
            f"--gpu {name}: not in the table.{hint} It has {', '.join(GPUS)}. For another, give --memory (GB) and "
            "--teraflops (dense bfloat16)."
        )
    return GPUS[name.lower()]
