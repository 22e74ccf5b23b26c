"""CUDA graphs of calls that come again: what the host would launch kernel by kernel is one launch.

The first call of a size runs kernel by kernel, the second is captured, later ones are replayed. A graph reads and
writes memory of its own, so a call fills that memory first and takes the result out of it before another may run.
:mod:`hia.encoder.cuda_graphs` and :mod:`hia.layers.graphs` say what calls are and which of them are alike.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from hia_kernels.core import autocast
from hia_kernels.core.backend import debug_enabled

Buffers = tuple[Tensor, ...]
Key = tuple[Any, ...]

KEPT_SIZES = 4
RETURNS = 16  # calls of a size whose graph had to go, before it gets another: more sizes than graphs must not thrash
REMEMBERED_SIZES = 256


class GraphCall(Protocol):
    """A call that a graph may serve."""

    @property
    def size(self) -> Key:
        """Name all that buffers and kernels depend on but for the weights: exact sizes, dtypes, device, backend."""

    @property
    def part(self) -> Hashable:
        """Name which of the functions that share buffers of this size it is."""

    @property
    def weights(self) -> Any:
        """Name what its graph reads beside the buffers; a graph with others is dropped."""

    def allocate(self) -> Buffers:
        """Make the memory that graphs of this size read; the first tensor is on the device."""

    def fill(self, buffers: Buffers) -> None:
        """Write the call's inputs to the memory; what follows from the size may have been written before."""

    def compute(self, *buffers: Tensor) -> Tensor:
        """Compute the result from the memory, which may be written over, and from nothing else of the call."""

    def take(self, result: Tensor) -> Tensor:
        """Bring the result to memory of the caller's: the next call of any size writes over it."""

    def describe(self) -> str:
        """Name it, in a warning."""


class Capture(Protocol):
    """Makes graphs.

    Attributes:
        nbytes: what they hold beside their buffers.
    """

    nbytes: int

    def __call__(self, function: Callable[..., Tensor], buffers: Buffers) -> Callable[[], Tensor]:
        """Make what computes ``function(*buffers)`` again from the buffers, into the same memory every time."""

    def release(self) -> None:
        """Give back what graphs shared; none of them is left."""


class CudaCapture:
    """Captures CUDA graphs. All share a pool of memory and are captured on one stream, so no two may run at once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Callable[..., Tensor], buffers: Buffers) -> Callable[[], Tensor]:
        """Capture a graph, as :class:`Capture` says.

        Raises:
            RuntimeError: something in the function can't be captured, or memory is short.
        """
        with torch.cuda.device(buffers[0].device):
            current = torch.cuda.current_stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # libraries allocate at their first call on a stream
                function(*buffers)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # torch.cuda.graph stays on its own stream when ending a capture fails; this goes back
                with torch.cuda.stream(current):
                    out = self._capture(graph, function, buffers)
            except BaseException:
                self._pool = None  # it may count as in use for ever
                raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Callable[..., Tensor], buffers: Buffers) -> Tensor:
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            out = function(*buffers)
            grown = torch.cuda.memory_reserved() - before
        self.nbytes += grown
        return out

    def release(self) -> None:
        """Forget the pool: PyTorch takes its memory back with the last graph, and its handle can't be used again."""
        self._pool, self.nbytes = None, 0


@dataclass(frozen=True)
class _Graph:
    """A graph of one part.

    Attributes:
        weights: of the call it was captured from.
        replay: gives the result; the next replay of any graph may write over it.
    """

    weights: Any
    replay: Callable[[], Tensor]


@dataclass(frozen=True)
class _Size:
    """Buffers of one size, and the graphs that read them, by part."""

    buffers: Buffers
    graphs: dict[Hashable, _Graph] = field(default_factory=dict)


class GraphCache:
    """Graphs of the sizes used last, on one device. Safe for several threads and streams.

    Args:
        capture: makes them.
        device_type: of the tensors it can serve.
        kept: sizes at a time.
    """

    def __init__(self, capture: Capture | None = None, device_type: str = "cuda", kept: int = KEPT_SIZES):
        self.capture: Capture = CudaCapture() if capture is None else capture
        self.device_type, self.kept = device_type, kept
        self._sizes: OrderedDict[Key, _Size] = OrderedDict()  # used last is last
        self._waits: OrderedDict[tuple[Key, Hashable], int] = OrderedDict()  # calls to come before a capture
        self._refused: set[Key] = set()  # where one part can't be captured the others can't
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # behind the latest replay

    @property
    def nbytes(self) -> int:
        """Count the bytes it occupies: buffers, and the memory that the graphs share."""
        with self._lock:
            own = sum(tensor.nbytes for size in self._sizes.values() for tensor in size.buffers)
            return own + self.capture.nbytes

    @property
    def keys(self) -> list[Key]:
        """List the sizes there are graphs of, the one used last behind the others."""
        with self._lock:
            return list(self._sizes)

    def clear(self) -> None:
        """Drop all graphs, once the device is done with them."""
        with self._lock:
            self._drop(lambda _: True)

    def drop(self, part: Hashable) -> None:
        """Drop the graphs of one part, of every size."""
        with self._lock:
            self._drop(lambda one: one == part)

    def run(self, call: GraphCall, eager: Callable[[], Tensor]) -> Tensor:
        """Compute a call by its graph, or by ``eager`` as long as there is none.

        Args:
            call: one that :func:`eager_reasons` has nothing against.
            eager: computes the same, kernel by kernel.

        Returns:
            What ``call.take`` returns, or ``eager``.
        """
        with self._lock:
            replay = self._replay_of(call)
            if replay is not None:
                self._sizes.move_to_end(call.size)
                return self._replayed(call, replay)
        return eager()

    def _replay_of(self, call: GraphCall) -> Callable[[], Tensor] | None:
        size = self._sizes.get(call.size)
        graph = None if size is None else size.graphs.get(call.part)
        if graph is not None and graph.weights == call.weights:
            return graph.replay
        del size, graph  # or the last graph's memory would outlive it
        others = [size.graphs.get(call.part) for size in self._sizes.values()]
        if any(one is not None and one.weights != call.weights for one in others):
            del others
            self._drop(lambda part: part == call.part)
        if call.size in self._refused or not self._is_due((call.size, call.part)):
            return None
        return self._captured(call)

    def _is_due(self, key: tuple[Key, Hashable]) -> bool:
        """Count a call without a graph; whether it is the one to capture."""
        waits = self._waits.pop(key, 1)
        if waits == 0:
            return True
        self._remember(key, waits - 1)
        return False

    def _remember(self, key: tuple[Key, Hashable], waits: int) -> None:
        self._waits[key] = waits
        while len(self._waits) > REMEMBERED_SIZES:
            self._waits.popitem(last=False)

    def _captured(self, call: GraphCall) -> Callable[[], Tensor] | None:
        # graphs outlive an inference mode, whose tensors nobody may write to outside it
        with torch.inference_mode(False), torch.no_grad():
            try:
                size = self._sizes.get(call.size) or _Size(call.allocate())
                self._order(size.buffers[0].device)  # the pool's memory, too, may be in use on another stream
                call.fill(size.buffers)
                replay = self.capture(call.compute, size.buffers)
            except RuntimeError as error:
                self._refused.add(call.size)
                message = f"hia: no CUDA graph of {call.describe()}, which stay slower to launch: {error}"
                warnings.warn(message, stacklevel=2)
                return None
        size.graphs[call.part] = _Graph(call.weights, replay)
        self._sizes[call.size] = size
        self._sizes.move_to_end(call.size)
        while len(self._sizes) > self.kept:  # after the capture: the pool lives as long as a graph uses it
            self._wait_for_device()
            key, evicted = self._sizes.popitem(last=False)
            for part in evicted.graphs:
                self._remember((key, part), RETURNS)
        return replay

    def _replayed(self, call: GraphCall, replay: Callable[[], Tensor]) -> Tensor:
        buffers = self._sizes[call.size].buffers
        stream = self._order(buffers[0].device)
        call.fill(buffers)
        out = call.take(replay())
        if stream is not None and self._done is not None:
            self._done.record(stream)
        return out

    def _drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        found = [(key, part) for key, size in self._sizes.items() for part in size.graphs if unwanted(part)]
        if not found:
            return
        self._wait_for_device()
        for key, part in found:
            del self._sizes[key].graphs[part]
            if not self._sizes[key].graphs:
                del self._sizes[key]
        if not self._sizes:
            self.capture.release()

    def _order(self, device: torch.device) -> torch.cuda.Stream | None:
        """Let the current stream wait for the latest replay, whichever stream that is on."""
        if device.type != "cuda":
            return None
        if self._done is None:
            self._done = torch.cuda.Event()
        stream = torch.cuda.current_stream(device)
        stream.wait_event(self._done)
        return stream

    def _wait_for_device(self) -> None:
        if self._done is not None:
            self._done.synchronize()


def eager_reasons(name: str, tensor: Tensor, device_type: str) -> list[str]:
    """List why a call has to go kernel by kernel, whatever it computes; empty if a graph can serve it.

    Args:
        name: of the tensor, in the plural.
        tensor: an input.
        device_type: where graphs are.
    """
    found = []
    if tensor.device.type != device_type or type(tensor) is not Tensor:
        found.append(f"{name} are a {type(tensor).__name__} on {tensor.device}")
    if torch.is_grad_enabled():
        found.append("gradients are recorded")
    if autocast.is_anywhere_enabled():
        found.append("autocast is on")
    if torch.compiler.is_compiling():
        found.append("torch.compile is tracing")
    if torch._C._len_torch_dispatch_stack():  # it counts or fakes ops, which a replay doesn't call
        found.append("a dispatch mode is active")
    if debug_enabled():
        found.append("HIA_DEBUG=1 reads values")
    if capturing(tensor):
        found.append("a graph is being captured")
    return found


def capturing(tensor: Tensor) -> bool:
    """Tell whether somebody captures a graph on the current stream."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
