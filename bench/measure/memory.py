"""Bytes that a call holds: four meters behind one interface, :class:`Meter`.

- :class:`ProcessMeter`: the process's high-water mark of resident memory, which is all that a CPU's user sees.
- :class:`CudaMeter`: what torch's CUDA allocator has handed out.
- :class:`CpuMeter`: the same for torch's CPU allocator, from the profiler's record of every allocation.
- :class:`StorageMeter`: the storages alive, without running anything: for predictions under fake tensors.

The last one is ``torch.distributed._tools.mem_tracker.MemTracker``, which is private. It was tested with torch 2.13.0,
and with the tracker's sources of 2.10 to 2.12, which differ in nothing that is used here: the peaks of Table 3's
methods are the same to the byte under all four. ``tests/bench/test_memory.py`` counts small cases by hand and compares
others with the allocator's own record, so a torch whose tracker has changed is noticed.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on standard error

PROC = Path("/proc/self")
RESET_PEAK = "5"  # proc(5): clear_refs 5 sets VmHWM to the resident size
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RETURN_AT = 64 * 1024
PACKED_ATTENTION = "hia::cross_attention"


@dataclass(frozen=True)
class Memory:
    """Bytes of one call, above what there was when its meter was made.

    Attributes:
        peak: the most during the call.
        left: alive after it, its result included: of a forward that records gradients, its activations.
        result: what the call returned.
    """

    peak: int
    left: int
    result: Any


class Meter(Protocol):
    """Counts bytes, from what there is when it is made.

    Attributes:
        kind: how, for records.
    """

    kind: str

    def measure(self, call: Callable[[], Any]) -> Memory:
        """Run the call and count."""


def memory_of(call: Callable[[], Any], device: str) -> Memory:
    """Measure one call by the allocator of "cpu" or "cuda"; what a library allocates by itself isn't seen."""
    return (CudaMeter() if device == "cuda" else CpuMeter()).measure(call)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Return the most bytes alive during the call, as :func:`memory_of` counts them."""
    return memory_of(call, device).peak


def user_meter(device: str) -> Meter | None:
    """Make the meter of what a whole model takes from its user; None where it can't be measured."""
    if device == "cuda":
        return CudaMeter()
    return None if process_peak_unavailable() else ProcessMeter()


class CudaMeter:
    """torch's count of allocated bytes on the current CUDA device; cuBLAS workspaces come on top."""

    kind = "measured: torch.cuda.max_memory_allocated"

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._base = torch.cuda.memory_allocated()

    def measure(self, call: Callable[[], Any]) -> Memory:
        """Run the call, wait for the device, and ask the allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return Memory(peak - self._base, left - self._base, result)


class CpuMeter:
    """torch's CPU allocator, by the profiler: allocations and releases add up in the order of their time."""

    kind = "measured: torch.profiler"

    def measure(self, call: Callable[[], Any]) -> Memory:
        """Run the call under the profiler."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            result = call()
        level = highest = 0
        memory = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        for event in sorted(memory, key=lambda event: event.start_ns()):
            level += event.nbytes()
            highest = max(highest, level)
        return Memory(highest, level, result)


def process_peak_unavailable() -> str | None:
    """Say why :class:`ProcessMeter` can't measure here; None if it can."""
    if platform.system() != "Linux":
        return f"VmHWM needs Linux, this is {platform.system()}"
    if platform.libc_ver()[0] != "glibc":
        return "freed blocks are returned to the system through glibc's mallopt, and this libc is another"
    try:
        (PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError as error:
        return f"/proc/self/clear_refs can't be written ({error.strerror}), so VmHWM can't be reset"
    return None if "VmHWM" in (PROC / "status").read_text() else "/proc/self/status has no VmHWM"


class ProcessMeter:
    """Resident memory of this process.

    Once one is made, blocks of 64 KiB and more go back to the system when they are freed, or the high-water mark
    would show what malloc keeps rather than what is alive. There is no way back: a heap that has grown serves
    large blocks from itself, whatever the threshold says later.

    Raises:
        RuntimeError: not measurable here.
    """

    kind = "measured: VmHWM"

    def __init__(self) -> None:
        reason = process_peak_unavailable()
        if reason is not None:
            raise RuntimeError(f"ProcessMeter: {reason}")
        self._libc = ctypes.CDLL(None)
        self._return_memory()
        self._base = _status_bytes("VmRSS")

    def _return_memory(self) -> None:
        self._libc.mallopt(M_MMAP_THRESHOLD, RETURN_AT)
        self._libc.mallopt(M_TRIM_THRESHOLD, RETURN_AT)
        gc.collect()
        self._libc.malloc_trim(0)

    def measure(self, call: Callable[[], Any]) -> Memory:
        """Return freed memory, set the high-water mark to what is resident, and run the call."""
        self._return_memory()
        (PROC / "clear_refs").write_text(RESET_PEAK)
        result = call()
        # never below zero: what was resident at first may have been given back since
        return Memory(*(max(0, _status_bytes(name) - self._base) for name in ("VmHWM", "VmRSS")), result)


def _status_bytes(name: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {name}, got none")


class StorageMeter(MemTracker):
    """Counts the bytes of all storages alive, as a caching allocator sees them.

    A storage counts from the op that first returns it until it is freed, so views and in-place ops add nothing and
    temporaries stop counting when their last reference goes. Workspace that a kernel allocates inside itself (cuBLAS,
    im2col) is not seen. It adds to ``MemTracker``:

    - Sizes are rounded up to ``granule``, on every device.
    - Under fake tensors an op of the namespace ``hia`` is replaced by the plain PyTorch function behind it, unless
      ``fused``: what that allocates inside the op counts too.
    - An op all of whose inputs are real runs for real: token ids and index maps keep their values, so models may read
      them (masks, placeholder counts) as they do outside.

    Args:
        granule: bytes; every storage is rounded up to a multiple of it.
        fused: an op of the namespace ``hia`` allocates its results alone. Its kernels on a GPU have workspaces beside
            them, which are small in a forward; a backward's, and fp64's plain forms, are not in it.
    """

    kind = "predicted"

    def __init__(self, granule: int = 1, *, fused: bool = False) -> None:
        super().__init__()
        self.granule, self.fused = granule, fused

    def track(self, *tensors: Tensor) -> None:
        """Count the storages of these tensors from now on, each once; not inside :meth:`measure`."""
        self.track_external(*tensors)

    @property
    def live(self) -> int:
        """Bytes counted now."""
        return _total(self.get_tracker_snapshot("current"))

    @property
    def peak(self) -> int:
        """The most bytes since it was entered."""
        return _total(self.get_tracker_snapshot("peak"))

    def measure(self, call: Callable[[], Any]) -> Memory:
        """Follow the call; what was tracked before is alive throughout."""
        with self:
            result = call()
        return Memory(self.peak, self.live, result)

    def _pre_fw_hook(self, module: Any, inputs: Any) -> None:
        """Take no statistics by module: they hook every parameter's gradient, which frozen ones refuse."""

    def _post_fw_hook(self, module: Any, inputs: Any, outputs: Any) -> None:
        """Take none here either."""

    def _update_snap(self, u_type: Any, winfo: Any, *rest: Any, **more: Any) -> None:
        winfo.mem_consumed = -(-winfo.mem_consumed // self.granule) * self.granule
        super()._update_snap(u_type, winfo, *rest, **more)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(self._followed(func, args, kwargs or {}), types, args, kwargs)

    def _followed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        """Choose what runs in an op's place."""
        inputs = tensors_in((args, kwargs))
        if any(isinstance(tensor, FakeTensor) for tensor in inputs):
            implementation = None if self.fused else _implementation(func, args)

            def inside(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return implementation(*args, **kwargs)

            return func if implementation is None else inside

        def outside(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return func(*args, **kwargs)

        return outside if inputs else func


def _total(snapshot: dict[torch.device, dict[str, int]]) -> int:
    return sum(device["Total"] for device in snapshot.values())


def _implementation(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """Find the plain PyTorch function behind an op of ours; None for any other op, and where it can't run."""
    if getattr(func, "namespace", "") != "hia":
        return None
    from hia_kernels.core.backend import reference_implementation

    reference = reference_implementation(func)
    if reference is None or not func._schema.name.startswith(PACKED_ATTENTION):
        return reference
    packing = _even_packing(func, args)
    if packing is None:
        return None
    return lambda *_args, **_kwargs: reference(*packing)


def _even_packing(func: Any, args: tuple[Any, ...]) -> list[Any] | None:
    """Fill in cu_seqlens, which the reference reads and whose values fake tensors lack.

    They follow from the shapes when all sequences are equally long, as a benchmark's are; otherwise None, and the op's
    fake, which allocates the output alone, has to do.
    """
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False))
    for side, tensor in (("q", values["q"]), ("k", values["k"])):
        length, sequences = values[f"max_seqlen_{side}"], values[f"cu_seqlens_{side}"].shape[0] - 1
        if tensor.shape[0] != length * sequences:
            return None
        with unset_fake_temporarily():
            values[f"cu_seqlens_{side}"] = torch.tensor([length * b for b in range(sequences + 1)], dtype=torch.int32)
    return [values[name] for name in names]


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors of nested containers."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
