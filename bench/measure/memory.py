"""Really measured peaks and times of a prefill, on the CPU and on CUDA, through one interface.

On the CPU the peak is the process's high-water mark of resident memory (VmHWM), reset before the prefill,
minus what was resident before the model was built. On CUDA it is ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

PROC = Path("/proc/self")
RESET_PEAK = "5"  # proc(5): clear_refs 5 sets VmHWM to the resident size
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
RETURN_AT = 64 * 1024


class PeakMeter(Protocol):
    """Peak memory of what runs between :meth:`reset` and :meth:`peak_bytes`."""

    kind: str

    def reset(self) -> None:
        """Forget peaks so far."""

    def peak_bytes(self) -> int:
        """The most bytes held since, the model included."""


def process_peak_unavailable() -> str | None:
    """Why :class:`ProcessPeak` can't measure here; None if it can."""
    if platform.system() != "Linux":
        return f"VmHWM needs Linux, this is {platform.system()}"
    if platform.libc_ver()[0] != "glibc":
        return "freed blocks are returned to the system through glibc's mallopt, and this libc is another"
    try:
        (PROC / "clear_refs").write_text(RESET_PEAK)
    except OSError as error:
        return f"/proc/self/clear_refs can't be written ({error.strerror}), so VmHWM can't be reset"
    return None if "VmHWM" in (PROC / "status").read_text() else "/proc/self/status has no VmHWM"


class ProcessPeak:
    """Resident memory of this process above what it held when the meter was made.

    From then on blocks of 64 KiB and more go back to the system when they are freed, or the high-water mark
    would show what malloc keeps rather than what is alive. There is no way back: a heap that has grown serves
    large blocks from itself, whatever the threshold says later.

    Raises:
        RuntimeError: not measurable here.
    """

    kind = "measured: VmHWM"

    def __init__(self) -> None:
        reason = process_peak_unavailable()
        if reason is not None:
            raise RuntimeError(f"ProcessPeak: {reason}")
        self._libc = ctypes.CDLL(None)
        self._return_memory()
        self._base = _status_bytes("VmRSS")

    def _return_memory(self) -> None:
        self._libc.mallopt(M_MMAP_THRESHOLD, RETURN_AT)
        self._libc.mallopt(M_TRIM_THRESHOLD, RETURN_AT)
        gc.collect()
        self._libc.malloc_trim(0)

    def reset(self) -> None:
        """Return freed memory and set the high-water mark to what is resident now."""
        self._return_memory()
        (PROC / "clear_refs").write_text(RESET_PEAK)

    def peak_bytes(self) -> int:
        """High-water mark above the base."""
        return _status_bytes("VmHWM") - self._base


def _status_bytes(name: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status must have {name}, got none")


class CudaPeak:
    """torch's count of allocated bytes on the current CUDA device; cuBLAS workspaces come on top."""

    kind = "measured: torch.cuda.max_memory_allocated"

    def reset(self) -> None:
        """Empty the cache and forget the peak."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Most bytes allocated since."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Measured:
    """One prefill.

    Attributes:
        memory_bytes: peak; None where it can't be measured, or the run ran out of memory.
        memory_kind: how it was measured, or why not.
        prefill_ms: median of ``times_ms``; None if out of memory.
        times_ms: every timed run.
        out_of_memory: torch.OutOfMemoryError was raised.
    """

    memory_bytes: int | None
    memory_kind: str
    prefill_ms: float | None
    times_ms: tuple[float, ...] = ()
    out_of_memory: bool = False


def measure_prefill(
    model: nn.Module, inputs: dict[str, Any], meter: PeakMeter | None, *, repeats: int = 3, budget_s: float = 3.0
) -> Measured:
    """Peak and time of a prefill.

    The first run gives the peak. Runs that follow give the time; if the first took longer than ``budget_s``,
    none follow and it gives both.

    Args:
        model: in eval mode, on the inputs' device.
        inputs: its keyword arguments.
        meter: None measures time only.
        repeats: timed runs, at most.
        budget_s: seconds for all timed runs.
    """
    run = _timer(model, inputs)
    try:
        if meter is not None:
            meter.reset()
        first = run()
        peak = meter.peak_bytes() if meter is not None else None
        times = [first] if first > budget_s * 1e3 else []
        while not times or (len(times) < repeats and sum(times) + times[-1] <= budget_s * 1e3):
            times.append(run())
    except torch.OutOfMemoryError:
        return Measured(None, "out of memory, provoked", None, (), True)
    kind = meter.kind if meter is not None else f"not measured: {process_peak_unavailable()}"
    return Measured(peak, kind, statistics.median(times), tuple(times))


def _timer(model: nn.Module, inputs: dict[str, Any]) -> Callable[[], float]:
    """A function that runs one prefill and returns its milliseconds."""

    @torch.no_grad()
    def on_cpu() -> float:
        start = time.perf_counter()
        model(**inputs)
        return (time.perf_counter() - start) * 1e3

    @torch.no_grad()
    def on_cuda() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        model(**inputs)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    return on_cuda if inputs["input_ids"].is_cuda else on_cpu
