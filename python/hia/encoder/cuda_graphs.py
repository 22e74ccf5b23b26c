"""The encoder as one CUDA graph a size.

A size is exact, never rounded up to a bucket: padding pixels would change an image's borders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hia_kernels.core.backend import requested_backend

from .. import cuda_graphs
from ..cuda_graphs import Buffers, GraphCache, Key

Encode = Callable[[Tensor, Tensor], Tensor]  # [N, H, W, CP], [N, 2] -> [N, H', W', C]


@dataclass(frozen=True)
class EncoderCall:
    """A call of the encoder, as :class:`hia.cuda_graphs.GraphCall` describes calls.

    Attributes:
        function: the encoder, with the folded weights that the cache belongs to.
        pixels: [N, H, W, CP].
        window: [N, 2].
        size: as :func:`key_of` names it.
    """

    function: Encode
    pixels: Tensor
    window: Tensor
    size: Key
    part = weights = None

    def allocate(self) -> Buffers:
        """Make [N, H, W, CP] and [N, 2]."""
        pixels = torch.empty_like(self.pixels, memory_format=torch.contiguous_format)
        return pixels, torch.empty_like(self.window)

    def fill(self, buffers: Buffers) -> None:
        """Copy pixels and window."""
        for buffer, given in zip(buffers, (self.pixels, self.window), strict=True):
            buffer.copy_(given)

    def compute(self, *buffers: Tensor) -> Tensor:
        """Encode the buffers' pixels."""
        pixels, window = buffers
        return self.function(pixels, window)

    def take(self, result: Tensor) -> Tensor:
        """Copy the features."""
        return result.clone()

    def describe(self) -> str:
        """Name the size."""
        return f"the encoder for {' x '.join(map(str, self.pixels.shape))} pixels"


class EncoderGraphs(GraphCache):
    """Graphs of the encoder, for one set of folded weights."""

    def eager_reasons(self, pixels: Tensor, max_pixels: int) -> list[str]:
        """List why a call has to go kernel by kernel; empty if a graph can serve it.

        Args:
            pixels: [N, H, W, CP].
            max_pixels: N * H * W above which launches cost nothing beside the kernels.
        """
        found = cuda_graphs.eager_reasons("pixels", pixels, self.device_type)
        if pixels.shape[:3].numel() > max_pixels:
            found.append(f"there are more than {max_pixels} pixels")
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
        call = EncoderCall(function, pixels, window, key_of(pixels, window, weight_dtype))
        return self.run(call, lambda: function(pixels, window))


def key_of(pixels: Tensor, window: Tensor, weight_dtype: torch.dtype) -> Key:
    """Name what a graph is good for: exact shapes, dtypes, device, and the backend that is asked for."""
    inputs = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in (pixels, window))
    return (*inputs, weight_dtype, requested_backend())
