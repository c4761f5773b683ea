"""A simulated GPU: a device of torch, ``simgpu``, whose tensors are computed on the CPU.

It behaves as CUDA does where host and device meet: a tensor of one and a tensor of the other don't mix, a constructor
on the device takes no generator of the host, and every copy between them is recorded with the place that asked for it.
Everything else runs for real, so that a whole fit can be compared with one on the CPU.

Not covered: kernels (attention, Triton), streams, memory, collectives. Registering the device changes the whole
process, so it is used in processes of its own.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.backend_registration
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

NAME = "simgpu"
DEVICE = f"{NAME}:0"
aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
"""Operations whose result the host must know."""


@dataclass(frozen=True)
class Meeting:
    """A copy between host and device.

    Attributes:
        to_host: its direction.
        waits: whether the host waits until the device has done all earlier work.
        pinned: whether host memory was page-locked.
        numbers: how many are copied.
        place: the innermost function of rap_lightning, else of Lightning, that led to it.
    """

    to_host: bool
    waits: bool
    pinned: bool
    numbers: int
    place: str


meetings: list[Meeting] = []


def _place() -> str:
    frames = traceback.extract_stack()
    for package in ("/rap_lightning/", "/lightning/"):
        for frame in reversed(frames):
            if package in frame.filename and "/fabric/utilities/init.py" not in frame.filename:  # a function mode
                return f"{frame.filename.rpartition('/')[2]}:{frame.name}"
    return "elsewhere"


def _met(to_host: bool, waits: bool, tensor: Tensor) -> None:
    pinned = bool(getattr(tensor, "is_page_locked", False))
    meetings.append(Meeting(to_host, waits, pinned, tensor.numel(), _place()))


class DeviceTensor(Tensor):
    """A tensor on the simulated device; ``host`` holds its numbers."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=torch.device(DEVICE),
        )  # fmt: skip
        self.host = host
        return self  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"

    def tolist(self) -> Any:
        _met(True, True, self)
        return self.host.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    ours = [x for x in tensors if isinstance(x, DeviceTensor)]
    others = [x for x in tensors if not isinstance(x, DeviceTensor)]
    copies = function in (aten.copy_.default, aten._to_copy.default)
    if kwargs.get("device") is not None:
        on_device = _is_device(kwargs["device"])
    else:
        on_device = isinstance(args[0], DeviceTensor) if function is aten.copy_.default else bool(ours)
    if ours and not copies and any(x.dim() > 0 for x in others):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found {DEVICE} and cpu")
    if on_device and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    if copies:
        source = args[1] if function is aten.copy_.default else args[0]
        queued = bool(kwargs.get("non_blocking")) or (len(args) > 2 and bool(args[2]))
        if isinstance(source, DeviceTensor) != on_device:
            _met(not on_device, not (queued and on_device), source)
    elif ours and function in READS:
        _met(True, True, ours[0])

    def lowered(x: Any) -> Any:
        if isinstance(x, DeviceTensor):
            return x.host
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x

    options = {name: value for name, value in tree_map(lowered, kwargs).items() if name != "pin_memory"}
    result = function(*tree_map(lowered, args), **options)
    if not on_device:
        if function is aten.copy_.default:
            return args[0]
        return result.clone() if copies and ours and result is ours[0].host else result
    known = {id(x.host): x for x in ours}  # what was changed in place keeps its identity

    def raised(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else DeviceTensor(x)

    return tree_map(raised, result)


class Constructors(TorchDispatchMode):
    """Makes tensors on the device where a constructor names it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _run(function, args, kwargs) if _is_device(kwargs.get("device")) else function(*args, **kwargs)


def _empty(size: Any, *strides: Any, dtype: Any = None, **_: Any) -> DeviceTensor:
    if strides and not isinstance(strides[0], torch.memory_format):
        return DeviceTensor(torch.empty_strided(size, strides[0], dtype=dtype))
    return DeviceTensor(torch.empty(size, dtype=dtype))


def _page_locked(tensor: Tensor, *_: Any) -> Tensor:
    copy = tensor.clone()
    copy.is_page_locked = True  # type: ignore[attr-defined]
    return copy


class _Backend(torch.utils.backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def register() -> torch.library.Library:
    """Make the device known to torch, for the rest of the process, and return what must be kept alive for it."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that tied weights stay tied when they are moved
    library = torch.library.Library("aten", "IMPL")
    for name in ("empty.memory_format", "empty_strided"):  # torch.tensor calls them beneath any mode
        library.impl(name, _empty, "PrivateUse1")
    library.impl("_copy_from", lambda x, to, queued=False: _run(aten.copy_.default, (to, x, queued), {}), "PrivateUse1")
    Tensor.pin_memory = _page_locked  # type: ignore[method-assign, assignment]
    return library


class Accelerator(CPUAccelerator):
    """Lightning's accelerator for the device."""

    def setup_device(self, device: torch.device) -> None:
        """Accept it."""


class OneDevice(SingleDeviceStrategy):
    """Lightning's strategy for one GPU; afterwards the weights stay where they are."""

    def __init__(self) -> None:
        super().__init__(torch.device(DEVICE), accelerator=Accelerator())

    def teardown(self) -> None:
        """Leave the weights on the device."""
