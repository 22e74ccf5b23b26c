"""Lists the kernels that a workload launches on a GPU that isn't there: Triton's, and those of PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..launches.device import Target, fake_device
from ..launches.record import Launch, launch_of

# operators that return memory without a kernel
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_")


@dataclass(frozen=True)
class Step:
    """One kernel.

    Attributes:
        name: of the Triton kernel, or of PyTorch's operator.
        launch: as Triton compiles it; None for an operator.
        programs: of the launch's grid; 0 for an operator.
        nbytes: of the tensors that it is given and that it returns, each once.
        flops: of an operator; of a launch None: they are its call's.
        call: which call of an op it belongs to; None outside of all.
        backward: whether gradients were being computed.
    """

    name: str
    launch: Launch | None
    programs: int
    nbytes: int
    flops: int | None
    call: int | None
    backward: bool

    def moving(self, nbytes: int) -> Step:
        """Return the kernel with other bytes."""
        return replace(self, nbytes=nbytes)


@dataclass
class Listing:
    """Kernels in the order of their launches.

    Attributes:
        steps: the kernels.
        flops: of each call of an op, by the op's FLOP formula.
        call: the call that is running.
    """

    steps: list[Step] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    call: int | None = None

    def clear(self) -> None:
        """Forget what was listed."""
        self.steps, self.flops = [], []

    def add(self, name: str, nbytes: int, flops: int | None, launch: Launch | None = None, programs: int = 0) -> None:
        """Append a kernel to the call that is running."""
        backward = torch._C._current_graph_task_id() != -1
        self.steps.append(Step(name, launch, programs, nbytes, flops, self.call, backward))


class _Calls(TorchDispatchMode):
    """Notes the calls of our ops: FLOPs by formula. Ops that an op calls are part of it."""

    def __init__(self, listing: Listing) -> None:
        super().__init__()
        self.listing = listing

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, listing = kwargs or {}, self.listing
        if func.namespace != "hia":
            return func(*args, **kwargs)
        listing.call = len(listing.flops)
        listing.flops.append(0)
        try:
            out = func(*args, **kwargs)
        finally:
            number, listing.call = listing.call, None
        listing.flops[number] = _flops(func, args, kwargs, out)
        return out


class _Operators(TorchDispatchMode):
    """Notes PyTorch's operators that launch a kernel."""

    def __init__(self, listing: Listing) -> None:
        super().__init__()
        self.listing = listing

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            with self:  # an operator made of others, such as aten::linear
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if func._overloadpacket.__name__ == "convolution" and _lies_channels_last(args[0]):
            out = out.contiguous(memory_format=torch.channels_last)  # as cuDNN does; meta tensors forget it
        given = [leaf for leaf in tree_leaves((args, {**kwargs, "out": None})) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in (*given, *results)) and _launches(func, given, results):
            nbytes = sum(map(_nbytes, given)) + sum(map(_nbytes, results))
            self.listing.add(func._overloadpacket.__name__, nbytes, _flops(func, args, kwargs, out))
        return out


def _lies_channels_last(image: Tensor) -> bool:
    return image.is_contiguous(memory_format=torch.channels_last)


def _launches(func: Any, given: list[Tensor], results: list[Tensor]) -> bool:
    """Tell whether an operator computes: it returns neither new memory without a value nor a view."""
    if func._overloadpacket.__name__ in ALLOCATIONS or not results:
        return False
    if func._schema.is_mutable:
        return True
    memory = {tensor.untyped_storage()._cdata for tensor in given}
    return any(tensor.untyped_storage()._cdata not in memory for tensor in results)


def _nbytes(tensor: Tensor) -> int:
    """Count a tensor's bytes; an expanded one's memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **{**kwargs, "out_val": out})) if formula else 0


@contextmanager
def listed(target: Target) -> Iterator[Listing]:
    """List every kernel inside the block, on a fake device; nothing is compiled or computed."""
    from triton.runtime.jit import JITFunction

    listing = Listing()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # what tensors are, not what they say
            launch = launch_of(self, target, args, kwargs)
            nbytes = sum(_nbytes(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        if callable(grid):
            grid = grid({**dict(zip(self.arg_names, args)), **kwargs})
        listing.add(launch.kernel, nbytes, None, launch, prod(grid))

    before = JITFunction.run
    with _Operators(listing), fake_device(target), _Calls(listing):
        JITFunction.run = run
        try:
            yield listing
        finally:
            JITFunction.run = before
