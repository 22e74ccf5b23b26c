"""The encoder as one CUDA graph a size: what the host would launch kernel by kernel is one launch.

The first call of a size runs kernel by kernel, the second is captured, later ones are replayed. A size is exact, never
rounded up to a bucket: padding pixels would change an image's borders.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hia_kernels.core import autocast
from hia_kernels.core.backend import debug_enabled, requested_backend

Encode = Callable[[Tensor, Tensor], Tensor]  # [N, H, W, CP], [N, 2] -> [N, H', W', C]
Key = tuple[Any, ...]

KEPT_GRAPHS = 4
RETURNS = 16  # calls of a size whose graph had to go, before it gets another: more sizes than graphs must not thrash
REMEMBERED_SIZES = 256


class Capture(Protocol):
    """Makes graphs.

    Attributes:
        nbytes: what they hold beside their inputs.
    """

    nbytes: int

    def __call__(self, function: Encode, inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        """Make what computes ``function(*inputs)`` again from the inputs' memory, into the same memory every time."""


class CudaCapture:
    """Captures CUDA graphs. All share a pool of memory and are captured on one stream, so no two may run at once."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, function: Encode, inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        """Capture a graph, as :class:`Capture` says.

        Raises:
            RuntimeError: something in the function can't be captured, or memory is short.
        """
        with torch.cuda.device(inputs[0].device):
            current = torch.cuda.current_stream()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):  # libraries allocate at their first call on a stream
                function(*inputs)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # torch.cuda.graph stays on its own stream when ending a capture fails; this goes back
                with torch.cuda.stream(current):
                    out = self._capture(graph, function, inputs)
            except BaseException:
                self._pool = None  # it may count as in use for ever
                raise

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _capture(self, graph: torch.cuda.CUDAGraph, function: Encode, inputs: tuple[Tensor, Tensor]) -> Tensor:
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved()
            out = function(*inputs)
            grown = torch.cuda.memory_reserved() - before
        self.nbytes += grown
        return out


@dataclass(frozen=True)
class _Graph:
    """A graph of one size.

    Attributes:
        inputs: pixels and window, which a replay reads.
        replay: gives the features; the next replay of any graph may write over them.
    """

    inputs: tuple[Tensor, Tensor]
    replay: Callable[[], Tensor]


class GraphCache:
    """Graphs of the sizes used last, for one set of folded weights. Safe for several threads and streams.

    Args:
        capture: makes them.
        device_type: of the tensors it can serve.
        kept: graphs at a time.
    """

    def __init__(self, capture: Capture | None = None, device_type: str = "cuda", kept: int = KEPT_GRAPHS):
        self.capture: Capture = CudaCapture() if capture is None else capture
        self.device_type, self.kept = device_type, kept
        self._graphs: OrderedDict[Key, _Graph] = OrderedDict()  # used last is last
        self._waits: OrderedDict[Key, int] = OrderedDict()  # calls to come before a size is captured
        self._refused: set[Key] = set()
        self._lock = threading.Lock()
        self._done: torch.cuda.Event | None = None  # behind the latest replay

    @property
    def nbytes(self) -> int:
        """Count the bytes it occupies: inputs, and the memory that the graphs share."""
        with self._lock:
            own = sum(tensor.nbytes for graph in self._graphs.values() for tensor in graph.inputs)
            return own + self.capture.nbytes

    @property
    def keys(self) -> list[Key]:
        """List the keys of the graphs there are, the one used last behind the others."""
        with self._lock:
            return list(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, once the device is done with them."""
        with self._lock:
            self._wait_for_device()
            self._graphs.clear()

    def eager_reasons(self, pixels: Tensor, max_pixels: int) -> list[str]:
        """List why a call has to go kernel by kernel; empty if a graph can serve it.

        Args:
            pixels: [N, H, W, CP].
            max_pixels: N * H * W above which launches cost nothing beside the kernels.
        """
        found = []
        if pixels.device.type != self.device_type or type(pixels) is not Tensor:
            found.append(f"pixels are a {type(pixels).__name__} on {pixels.device}")
        if torch.is_grad_enabled():
            found.append("gradients are recorded")
        if autocast.is_anywhere_enabled():
            found.append("autocast is on")
        if torch.compiler.is_compiling():
            found.append("torch.compile is tracing")
        if torch._C._len_torch_dispatch_stack():  # it counts or fakes ops, which a replay doesn't call
            found.append("a dispatch mode is active")
        if pixels.shape[:3].numel() > max_pixels:
            found.append(f"there are more than {max_pixels} pixels")
        if debug_enabled():
            found.append("HIA_DEBUG=1 reads values")
        if capturing(pixels):
            found.append("a graph is being captured")
        return found

    def __call__(
        self, function: Encode, pixels: Tensor, window: Tensor, weight_dtype: torch.dtype, max_pixels: int
    ) -> Tensor:
        """Compute ``function(pixels, window)``, by a graph where one can serve.

        Args:
            function: the encoder, with the folded weights that this cache belongs to.
            pixels: [N, H, W, CP].
            window: [N, 2].
            weight_dtype: of the encoder.
            max_pixels: as in :meth:`eager_reasons`.

        Returns:
            [N, H', W', C] in memory of its own.
        """
        if self.eager_reasons(pixels, max_pixels):
            return function(pixels, window)
        key = key_of(pixels, window, weight_dtype)
        with self._lock:
            graph = self._graphs.get(key)
            if graph is None and self._is_due(key):
                graph = self._captured(key, function, pixels, window)
            if graph is not None:
                self._graphs.move_to_end(key)
                return self._replayed(graph, pixels, window)
        return function(pixels, window)

    def _is_due(self, key: Key) -> bool:
        """Count a call without a graph; whether it is the one to capture."""
        if key in self._refused:
            return False
        waits = self._waits.pop(key, 1)
        if waits == 0:
            return True
        self._remember(key, waits - 1)
        return False

    def _remember(self, key: Key, waits: int) -> None:
        self._waits[key] = waits
        while len(self._waits) > REMEMBERED_SIZES:
            self._waits.popitem(last=False)

    def _captured(self, key: Key, function: Encode, pixels: Tensor, window: Tensor) -> _Graph | None:
        # graphs outlive an inference mode, whose tensors nobody may write to outside it
        with torch.inference_mode(False), torch.no_grad():
            inputs = (torch.empty_like(pixels, memory_format=torch.contiguous_format), torch.empty_like(window))
            for static, given in zip(inputs, (pixels, window), strict=True):
                static.copy_(given)
            self._order(pixels)  # the pool's memory, too, may be in use on another stream
            try:
                replay = self.capture(function, inputs)
            except RuntimeError as error:
                self._refused.add(key)
                size = " x ".join(map(str, pixels.shape))
                message = f"hia: no CUDA graph of the encoder for {size} pixels, which stay slower to launch: {error}"
                warnings.warn(message, stacklevel=2)
                return None
        graph = self._graphs[key] = _Graph(inputs, replay)
        while len(self._graphs) > self.kept:  # after the capture: the pool lives as long as a graph uses it
            self._wait_for_device()
            evicted, _ = self._graphs.popitem(last=False)
            self._remember(evicted, RETURNS)
        return graph

    def _replayed(self, graph: _Graph, pixels: Tensor, window: Tensor) -> Tensor:
        stream = self._order(pixels)
        for static, given in zip(graph.inputs, (pixels, window), strict=True):
            static.copy_(given)
        out = graph.replay().clone()
        if stream is not None and self._done is not None:
            self._done.record(stream)
        return out

    def _order(self, pixels: Tensor) -> torch.cuda.Stream | None:
        """Let the current stream wait for the latest replay, whichever stream that is on."""
        if pixels.device.type != "cuda":
            return None
        if self._done is None:
            self._done = torch.cuda.Event()
        stream = torch.cuda.current_stream(pixels.device)
        stream.wait_event(self._done)
        return stream

    def _wait_for_device(self) -> None:
        if self._done is not None:
            self._done.synchronize()


def capturing(pixels: Tensor) -> bool:
    """Tell whether somebody captures a graph on the current stream."""
    return pixels.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def key_of(pixels: Tensor, window: Tensor, weight_dtype: torch.dtype) -> Key:
    """Name what a graph is good for: exact shapes, dtypes, device, and the backend that is asked for."""
    inputs = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in (pixels, window))
    return (*inputs, weight_dtype, requested_backend())
