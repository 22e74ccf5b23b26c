"""A CUDA (or HIP) device that isn't there: Python code believes in it up to its kernels' launches.

Tensors of the fake device are PyTorch's meta tensors, which have shapes, strides and dtypes but no values. Inside
:func:`fake_device` they say that they are on ``cuda:0``, whatever asks for a CUDA device gets one of them, and
``torch.cuda`` describes the chosen GPU. The ops of the namespace ``hia`` run what their tables of backends choose for
that GPU, launchers included; gradients are recorded as usual. Anything that reads a value fails, as on meta tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hia_kernels.core import backend, registration, tuning

CUDA, META = torch.device("cuda", 0), torch.device("meta")
GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A GPU as Triton compiles for it and as PyTorch describes it.

    Attributes:
        name: of the architecture, e.g. "sm_90".
        device_name: what ``torch.cuda.get_device_name`` returns.
        kind: Triton's backend, "cuda" or "hip".
        arch: as Triton names it.
        warp: threads of a warp.
        capability: (major, minor).
        multiprocessors: of the whole device.
        shared: bytes of shared memory that a block may have. CUDA C++ programming guide, table "technical
            specifications"; CDNA 3 ISA, LDS.
        memory: bytes.
        matrix: the instruction that products of 16-bit operands should become.
    """

    name: str
    device_name: str
    kind: str
    arch: int | str
    warp: int
    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    memory: int
    matrix: str

    def gpu_target(self) -> Any:
        """Return the target as ``triton.compile`` takes it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.kind, self.arch, self.warp)

    def properties(self) -> SimpleNamespace:
        """Return what ``torch.cuda.get_device_properties`` does, as far as code here asks for it."""
        return SimpleNamespace(
            name=self.device_name,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=self.memory,
            multi_processor_count=self.multiprocessors,
            warp_size=self.warp,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_block=min(self.shared, 48 * 1024),
            regs_per_multiprocessor=64 * 1024,
            gcnArchName=str(self.arch),
            L2_cache_size=50 * 2**20,
        )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "NVIDIA A100-SXM4-80GB", "cuda", 80, 32, (8, 0), 108, 163 * 1024, 80 * GIB, "mma.sync"),
        Target("sm_90", "NVIDIA H100 80GB HBM3", "cuda", 90, 32, (9, 0), 132, 227 * 1024, 80 * GIB, "wgmma"),
        Target("sm_100", "NVIDIA B200", "cuda", 100, 32, (10, 0), 148, 227 * 1024, 180 * GIB, "tcgen05"),
        Target("gfx942", "AMD Instinct MI300X", "hip", "gfx942", 64, (9, 4), 304, 64 * 1024, 192 * GIB, "mfma"),
    )
}


def target_of(capability: tuple[int, int]) -> str | None:
    """Name the target of a CUDA capability; None where kernels are recorded for no such GPU."""
    name = f"sm_{capability[0]}{capability[1]}"
    return name if name in TARGETS else None


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _on_meta(value: Any) -> Any:
    return META if _is_cuda(value) else value


def _convolution(x: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    """Run the general convolution: cuDNN's own has no meta implementation, its result the same shape and strides."""
    names = ("padding", "stride", "dilation", "groups")
    options = {**dict(zip(names, args)), **options}
    padding, stride, dilation, groups = (options[name] for name in names)
    return torch.ops.aten.convolution(x, weight, None, stride, padding, dilation, False, [0, 0], groups)


def _efficient_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
    """Return gradients: PyTorch's meta function lacks the argument ``out`` of its schema, as late as torch 2.13."""
    return (*(torch.empty_like(x) for x in (q, k, v)), q.new_empty(0))


_DISPATCHED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._efficient_attention_backward.default: _efficient_backward,
}
_DEVICE, _IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
_REPLACED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.cuda: lambda tensor, *args, **options: tensor.to(META),
    torch.Tensor.pin_memory: lambda tensor, *args, **options: tensor,
    torch.cudnn_convolution: _convolution,
}


class _Devices(TorchFunctionMode):
    """Meta tensors say that they are on ``cuda:0``; tensors asked for there are meta tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == _DEVICE:
            device = func(*args)
            return CUDA if device.type == "meta" else device
        if func == _IS_CUDA:
            return args[0].is_meta
        if func is torch.device:  # a name, with a number or without one: no tensor is made
            return func(*args, **(kwargs or {}))
        kwargs = {name: _on_meta(value) for name, value in (kwargs or {}).items()}
        if kwargs.get("device") == META:
            kwargs.pop("generator", None)  # the host's: nothing is drawn
            kwargs.pop("pin_memory", None)
        function = _REPLACED.get(func, func)
        return function(*(_on_meta(value) for value in args), **kwargs)


class _Ops(TorchDispatchMode):
    """Ops of the namespace ``hia`` on the fake device run what their tables choose, not their fakes."""

    def __init__(self, devices: _Devices) -> None:
        super().__init__()
        self.devices = devices

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") != "hia":
            return _DISPATCHED.get(func, func)(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        table = next(table for table in backend.TABLES.values() if any(name in row.functions for row in table.backends))
        with self, self.devices:  # an op may call another one
            return table.select(name, registration.bind(name, args, kwargs))(*args, **kwargs)


class _Generator(torch.Generator):
    """Make a generator of the host, whatever the device: nothing is drawn with it on the fake one."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if _is_cuda(device) else device)


def _stand_ins(target: Target) -> dict[tuple[Any, str], Any]:
    """List what is replaced, by owner and attribute."""
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: target.capability,
        "get_device_properties": lambda device=None: target.properties(),
        "get_device_name": lambda device=None: target.device_name,
        "is_bf16_supported": lambda *args, **options: True,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    found: dict[tuple[Any, str], Any] = {(torch.cuda, name): value for name, value in cuda.items()}
    found[torch.version, "hip"] = "6.4.0" if target.kind == "hip" else None
    found[torch.version, "cuda"] = None if target.kind == "hip" else "13.0"
    found[torch.backends.cudnn, "is_available"] = lambda: True
    found[torch, "Generator"] = _Generator
    return found


def _forget() -> None:
    """Forget what modules remember of the device under index 0."""
    tuning._slug.cache_clear()
    name = "hia_kernels.ops.cross_attention.triton_split"
    if importlib.util.find_spec("triton") is not None:
        importlib.import_module(name)._properties.cache_clear()


_active: list[str] = []


@contextmanager
def fake_device(target: Target) -> Iterator[Target]:
    """Pretend inside the block that there is one CUDA device, ``cuda:0``: such a GPU, which computes nothing.

    Replaces attributes of ``torch.cuda`` for the whole process and comes back to them whatever happens inside; the
    tensors' part holds for this thread alone. Tensors of the device must not leave the block: outside they are meta
    tensors.

    Args:
        target: of :data:`TARGETS`.

    Raises:
        RuntimeError: there is one already.
    """
    if _active:
        raise RuntimeError(f"fake_device: must not be nested, got {target.name} inside {_active[-1]}")
    _active.append(target.name)
    missing = object()
    with ExitStack() as stack:
        stack.callback(_active.clear)
        stack.callback(_forget)
        for (owner, name), value in _stand_ins(target).items():
            before = vars(owner).get(name, missing)
            if before is missing:
                stack.callback(delattr, owner, name)
            else:
                stack.callback(setattr, owner, name, before)
            setattr(owner, name, value)
        _forget()
        devices = _Devices()
        stack.enter_context(_Ops(devices))
        stack.enter_context(devices)
        yield target
