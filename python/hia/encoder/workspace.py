"""Memory for activations that folded weights keep between images on the CPU.

A map of an image at full resolution is larger than what the C library keeps for itself, so a new one is asked of the
system, and its pages are faulted in, every time. One buffer serves a chain of units instead, like ping-pong buffers:
a unit's input lies at one end of it and its output is written to the other end, then the ends change places. What the
unit needs for itself alone, its scratch, lies beside the input.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = 128 * 2**20  # bytes that are kept


class PingPongWorkspace:
    """Hands out places in a buffer while a chain of units runs.

    Args:
        buffer: flat.
    """

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.low, self.taken = True, 0  # the end where the unit's input lies, and its elements

    def output(self, shape: Sequence[int]) -> Tensor:
        """Return a tensor at the end opposite to the input's."""
        count = math.prod(shape)
        return self._at(self.buffer.numel() - count if self.low else 0, shape)

    def scratch(self, shape: Sequence[int]) -> Tensor:
        """Return a tensor next to the input."""
        count = math.prod(shape)
        return self._at(self.taken if self.low else self.buffer.numel() - self.taken - count, shape)

    def advance(self, out: Tensor) -> None:
        """Take ``out`` for the next unit's input: a tensor of :meth:`output`, or one from elsewhere."""
        if self.holds(out):
            self.low, self.taken = not self.low, out.numel()
        else:
            self.taken = 0

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in the buffer."""
        return tensor.untyped_storage().data_ptr() == self.buffer.untyped_storage().data_ptr()

    def _at(self, start: int, shape: Sequence[int]) -> Tensor:
        return self.buffer[start : start + math.prod(shape)].view(shape)


class WorkspaceCache:
    """Keeps a buffer as large as the largest chain so far needed; one call at a time has it."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Count the bytes it keeps."""
        return 0 if self._buffer is None else self._buffer.nbytes

    @contextmanager
    def lease(self, elements: int, dtype: torch.dtype) -> Iterator[PingPongWorkspace | None]:
        """Lend the buffer for the time of a block; None where it would be too large, or another call has it.

        None, too, where something looks on at every op: the buffer would keep a tracer's tensors, and a count of the
        memory would miss it.

        Args:
            elements: how many the chain needs at most.
            dtype: of the activations.
        """
        watched = torch._C._len_torch_dispatch_stack() > 0 or torch.jit.is_tracing()
        if watched or elements * dtype.itemsize > LARGEST or not self._lock.acquire(blocking=False):
            yield None
            return
        try:
            if self._buffer is None or self._buffer.numel() < elements or self._buffer.dtype != dtype:
                self._buffer = None  # before the larger one
                with torch.inference_mode(False):  # both kinds of calls use it
                    self._buffer = torch.empty(elements, dtype=dtype, device="cpu")
            yield PingPongWorkspace(self._buffer)
        finally:
            self._lock.release()


@contextmanager
def temporary_workspace(elements: int, dtype: torch.dtype) -> Iterator[PingPongWorkspace]:
    """Allocate a workspace of any size, for the time of a block."""
    yield PingPongWorkspace(torch.empty(elements, dtype=dtype, device="cpu"))
