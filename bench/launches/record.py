"""Records the launches of Triton kernels: exactly what a launch on the target would compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .device import Target, fake_device

INDICES = ("*i32", "*i64")  # pointers that say nothing of a launch's precision
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # blocks along x, y and z; CUDA C++ programming guide


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton specialises and compiles it.

    Attributes:
        module: dotted path of the kernel's file.
        kernel: its name there.
        signature: (argument, type) in order, types in Triton's words: "*bf16", "i32", "fp32", "constexpr".
        constexprs: (argument, value), of those declared constexpr and of what a launch makes one: None, and 1.
        attributes: (argument, what is known of it), in Triton's words: ("tt.divisibility", 16) of a multiple of 16,
            ("tt.pointer_range", 32) of a pointer into less than 2 GiB. Empty entries are part of Triton's own key.
        options: (name, value): "num_warps", "num_stages", and what else the launcher gave.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def configuration(self) -> str:
        """Describe dtypes, whether strides need 64 bits, and the constexprs that the kernel declares."""
        types = dict.fromkeys(kind[1:] for _, kind in self.signature if kind[0] == "*" and kind not in INDICES)
        wide = ["64-bit strides"] if any(kind == "i64" for _, kind in self.signature) else []
        values = [
            f"{name}={int(value) if isinstance(value, bool) else value}"
            for name, value in self.constexprs
            if name.isupper()
        ]
        return " ".join([*types, *wide, *values])

    @property
    def num_warps(self) -> int:
        """Return the warps of a block."""
        return dict(self.options)["num_warps"]

    @property
    def num_stages(self) -> int:
        """Return the iterations of a loop that Triton is asked to overlap."""
        return dict(self.options)["num_stages"]


@dataclass
class Uses:
    """Workloads that launch a kernel in one way.

    Attributes:
        workloads: names, in the order of recording.
        grids: the largest number of blocks along each axis.
    """

    workloads: dict[str, None] = field(default_factory=dict)
    grids: tuple[int, int, int] = (1, 1, 1)


@dataclass
class Recording:
    """Launches recorded on one target.

    Attributes:
        target: whose.
        launches: each distinct launch and its uses.
        refused: (workload, reasons) of backends that can't serve it there.
        workload: to which launches are counted now.
    """

    target: Target
    launches: dict[Launch, Uses] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    workload: str = ""

    def add(self, launch: Launch, grid: tuple[int, ...]) -> None:
        """Count a launch by the current workload.

        Raises:
            ValueError: more blocks than an axis may have, or none.
        """
        sizes = (*grid, 1, 1)[:3]
        if any(not 1 <= size <= limit for size, limit in zip(sizes, GRID_LIMITS, strict=True)):
            raise ValueError(
                f"{launch.kernel}: grid must be within {GRID_LIMITS}, got {tuple(grid)} in {self.workload!r}"
            )
        uses = self.launches.setdefault(launch, Uses())
        uses.workloads[self.workload] = None
        uses.grids = tuple(map(max, uses.grids, sizes))  # type: ignore[assignment]


class _Pointer:
    """A tensor as Triton's specialisation looks at it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = tensor.storage_offset() * tensor.element_size()  # allocations are aligned to 256 bytes or more
        self._range = tensor.untyped_storage().size()

    def data_ptr(self) -> int:
        """Return its distance from the start of its allocation, bytes."""
        return self._address

    def ptr_range(self) -> int:
        """Return the bytes of its allocation."""
        return self._range


@cache
def _binder(kernel: Any, target: Target) -> tuple[Any, Any, Any]:
    """Return Triton's backend for the target, its options where a launch gives none, and how it binds the kernel."""
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target.gpu_target())
    return backend, backend.parse_options({}), create_function_from_signature(kernel.signature, kernel.params, backend)


def launch_of(kernel: Any, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Describe what ``kernel[grid](*args, **kwargs)`` compiles on the target.

    Args:
        kernel: a ``triton.jit`` function.
        target: of :data:`bench.launches.device.TARGETS`.
        args: of the launch; tensors may have no values.
        kwargs: likewise, constexprs and options among them.
    """
    from triton import knobs

    # as JITFunction.run does it
    kwargs = {**kwargs, "debug": kwargs.get("debug", kernel.debug) or knobs.runtime.debug}
    kwargs["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    backend, default, binder = _binder(kernel, target)
    args = tuple(_Pointer(value) if isinstance(value, Tensor) else value for value in args)
    kwargs = {name: _Pointer(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    bound, specialization, given = binder(*args, **kwargs)
    options, signature, constexprs, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
    names = list(signature)
    given = {name: value for name, value in given.items() if (value or None) != (getattr(default, name) or None)}
    return Launch(
        kernel.__module__,
        kernel.__name__,
        tuple(signature.items()),
        tuple((names[path[0]], value) for path, value in constexprs.items()),
        tuple((names[path[0]], tuple(map(tuple, known))) for path, known in attributes.items()),
        tuple(sorted({"num_warps": options.num_warps, "num_stages": options.num_stages, **given}.items())),
    )


@contextmanager
def recorded(target: Target) -> Iterator[Recording]:
    """Record every launch of a Triton kernel inside the block, on a fake device, and compile none.

    Raises:
        RuntimeError: ``TRITON_INTERPRET`` is set: kernels are then no kernels.
    """
    from triton.runtime.jit import JITFunction

    from hia_kernels.core import triton_support

    if triton_support.interpreted():
        raise RuntimeError("bench.launches: TRITON_INTERPRET must not be set, got a process whose kernels are Python")
    found = Recording(target)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # what tensors are, not what they say
            launch = launch_of(self, target, args, kwargs)
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args)), **kwargs})
        found.add(launch, tuple(grid))

    before = JITFunction.run
    with fake_device(target):
        JITFunction.run = run
        try:
            yield found
        finally:
            JITFunction.run = before
