"""Extract and inject as one CUDA graph a layer and size.

A graph knows neither the prompt's length nor where its tokens stand: the rows that a layer reads are gathered before it
and put back behind it. So all questions about images of the same sizes are one size, which is exact, never rounded up
to a bucket: a row too many would be read as a token, and an image's features have no row to spare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from hia_kernels.core.backend import requested_backend

from .. import cuda_graphs
from ..cuda_graphs import Buffers, Capture, CudaCapture, GraphCache, Key
from ..versions import WeightVersion, tensors_of, weight_version_of
from . import plan
from .extractor import Extractor
from .features import LayerCache, PackedFeatures
from .folded import FoldedExtractor
from .injection import Injection
from .layout import CallLayout

LONGEST_SECONDS = 2e-3  # by the plan's estimate: kernels that take longer hide their launches, 1.3 ms of a host's time
LARGEST_COPY = 2**27  # bytes read of the features, which a replay copies first: 0.1 ms, and memory of every size kept
UNFOLDED = "there are no folded weights"


class Layer(Protocol):
    """The part of :class:`hia.layers.adapter.HiALayer` that a graph needs."""

    training: bool
    extractor: Extractor
    injection: Injection


@dataclass(frozen=True)
class Weights:
    """Weights that a layer's graph reads, at their addresses.

    Attributes:
        version: of the layer's parameters.
        folded: the extractor's folded ones.
    """

    version: WeightVersion
    folded: FoldedExtractor


@dataclass(frozen=True)
class LayerCall:
    """A call of one layer, as :class:`hia.cuda_graphs.GraphCall` describes calls.

    Attributes:
        layer: whose.
        rows: [T, D1] hidden states; the visual tokens' are written to.
        features: of n images.
        layout: where their visual tokens stand.
        weights: of the layer.
        forms: of extraction and injection.
        seconds: that they take, by the plan's estimate.
        read: which tensor of the features the extraction's form reads: "tokens", "shared", "widened", "folded", "kv".
        source: that tensor.
    """

    layer: Layer
    rows: Tensor
    features: PackedFeatures
    layout: CallLayout
    weights: Weights
    forms: tuple[str, str]
    seconds: float
    read: str
    source: Tensor

    @property
    def part(self) -> int:
        """Name the layer: all layers share the buffers of a size."""
        return self.layer.extractor.layer_index

    @property
    def size(self) -> Key:
        """Name what a graph is good for: neither the prompt's length nor where rows stand is among it."""
        rows, features, layout, source = self.rows, self.features, self.layout, self.source
        images = (features.lengths, features.max_seqlen, layout.row_counts, layout.max_rows)
        samples = (layout.instruction_rows.shape[0], layout.copies)
        tensors = tuple((x.dtype, x.device, x.shape[1]) for x in (rows, source))
        return (images, samples, tensors, self.read, self.forms, requested_backend())

    def allocate(self) -> Buffers:
        """Make the instructions' rows [A, D1], the written rows [W, D1], what is read of the features, owners [n]
        int64, and, written at once, the row numbers and shares that follow from the size."""
        layout, rows = self.layout, self.rows
        asked, written = layout.instruction_rows, layout.written_rows
        return (
            rows.new_empty(asked.shape[0], rows.shape[1]),
            rows.new_empty(written.shape[0], rows.shape[1]),
            torch.empty_like(self.source, memory_format=torch.contiguous_format),
            torch.empty_like(layout.image_to_sample),
            torch.arange(asked.shape[0], dtype=asked.dtype, device=asked.device),
            torch.arange(written.shape[0], dtype=written.dtype, device=written.device),
            layout.cu_rows.clone(),
            self.features.cu_seqlens.clone(),
        )

    def fill(self, buffers: Buffers) -> None:
        """Gather the rows, copy features and owners."""
        instructions, visual, source, owners = buffers[:4]
        torch.index_select(self.rows, 0, self.layout.instruction_rows, out=instructions)
        torch.index_select(self.rows, 0, self.layout.written_rows, out=visual)
        source.copy_(self.source)
        owners.copy_(self.layout.image_to_sample)

    def compute(self, *buffers: Tensor) -> Tensor:
        """Extract and inject on the gathered rows, as the layer does on all of them: [W, D1], in place."""
        instructions, visual, source, owners, asked, written, cu_rows, cu_seqlens = buffers
        layout = replace(
            self.layout,
            instruction_rows=asked,
            image_to_sample=owners,
            visual_rows=written[: self.layout.visual_rows.shape[0]],  # the first copy's
            cu_rows=cu_rows,
            written_rows=written,
        )
        extracted = self.layer.extractor(instructions, asked, self._features(source, cu_seqlens), owners)
        return self.layer.injection(visual, layout, extracted)

    def _features(self, source: Tensor, cu_seqlens: Tensor) -> PackedFeatures:
        features, caches, memo = self.features, {}, {}
        tokens = source if self.read == "tokens" else source.new_empty(0, features.tokens.shape[1])
        if self.read in ("shared", "widened"):
            memo[self.read] = source
        elif self.read != "tokens":
            caches[self.part] = LayerCache(self.read, source, features.caches[self.part].version)
        return PackedFeatures(tokens, cu_seqlens, features.max_seqlen, features.lengths, caches, memo)

    def take(self, result: Tensor) -> Tensor:
        """Put the written rows back: [T, D1], in place."""
        return self.rows.index_copy_(0, self.layout.written_rows, result)

    def describe(self) -> str:
        """Name the size."""
        visual, features = self.layout.written_rows.shape[0], sum(self.features.lengths)
        return f"the adapter's layers for {visual} visual rows and {features} features"


class LayerGraphs:
    """Graphs of an adapter's layers: on each device one pool of memory, and the buffers of a size, serve all of them.

    Copies and pickles of it are empty.

    Attributes:
        enabled: whether graphs may be used.

    Args:
        capture: makes a device's :class:`hia.cuda_graphs.Capture`.
        device_type: of the tensors it can serve.
        kept: sizes at a time, on each device.
    """

    def __init__(
        self,
        capture: Callable[[], Capture] = CudaCapture,
        device_type: str = "cuda",
        kept: int = cuda_graphs.KEPT_SIZES,
    ):
        self.enabled = True
        self.capture, self.device_type, self.kept = capture, device_type, kept
        self.caches: dict[torch.device, GraphCache] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graphs out of copies: they read the original's weights."""
        return {**self.__dict__, "caches": {}}

    @property
    def nbytes(self) -> int:
        """Count the bytes that graphs occupy: buffers, and the memory that the graphs share."""
        return sum(cache.nbytes for cache in list(self.caches.values()))

    def clear(self) -> None:
        """Drop all graphs."""
        for cache in list(self.caches.values()):
            cache.clear()

    def eager_reasons(self, layer: Layer, rows: Tensor, features: PackedFeatures, layout: CallLayout) -> list[str]:
        """List why a call has to go kernel by kernel; empty if a graph can serve it.

        Args:
            layer: whose call it is.
            rows: [T, D1] hidden states.
            features: of the images.
            layout: where their visual tokens stand.
        """
        return self._prepared(layer, rows, features, layout)[1]

    def __call__(
        self,
        layer: Layer,
        rows: Tensor,
        features: PackedFeatures,
        layout: CallLayout,
        eager: Callable[[Tensor, PackedFeatures, CallLayout], Tensor],
    ) -> Tensor:
        """Compute ``eager(rows, features, layout)``, by a graph where one can serve.

        Args:
            layer: with the weights.
            rows: [T, D1] hidden states.
            features: of the images.
            layout: where their visual tokens stand.
            eager: extracts and injects, kernel by kernel.

        Returns:
            [T, D1]; ``rows`` themselves where a graph served.
        """
        if torch.compiler.is_compiling():  # it follows nothing below
            return eager(rows, features, layout)
        call, reasons = self._prepared(layer, rows, features, layout)
        if call is None or reasons:
            if layer.extractor.current() is None and rows.device in self.caches:
                self.caches[rows.device].drop(layer.extractor.layer_index)
            return eager(rows, features, layout)
        cache = self.caches.get(rows.device)
        if cache is None:  # of two threads that are here the first one's is taken
            cache = self.caches.setdefault(rows.device, GraphCache(self.capture(), self.device_type, self.kept))
        return cache.run(call, lambda: eager(rows, features, layout))

    def _prepared(
        self, layer: Layer, rows: Tensor, features: PackedFeatures, layout: CallLayout
    ) -> tuple[LayerCall | None, list[str]]:
        """Make the call, and list what is against a graph of it; None where it can't be made."""
        found = [] if self.enabled else ["graphs are switched off"]
        found += cuda_graphs.eager_reasons("hidden states", rows, self.device_type)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            found.append("a transform of torch.func or forward-mode AD is active")
        modules = (layer.extractor, layer.injection)
        if layer.training or any(module.training for module in modules):
            found.append("the layer is in training mode")
        if _has_any_global_hook() or any(_is_hooked(module) for module in modules):
            found.append("there are hooks on what a replay does not call")
        if any(type(x) is not Tensor or x.device != rows.device for x in (features.tokens, layout.visual_rows)):
            found.append("features or layout are elsewhere, or no plain tensors")
        if found:
            return None, found
        folded = layer.extractor.current()
        if folded is None:
            return None, [UNFOLDED]
        weights = Weights(weight_version_of(tensor for module in modules for tensor in tensors_of(module)), folded)
        if any(device != rows.device for *_, device in weights.version):
            return None, ["weights are elsewhere"]
        call = call_of(layer, rows, features, layout, weights)
        if call.seconds > LONGEST_SECONDS:
            found.append(f"the kernels are estimated to take more than {LONGEST_SECONDS * 1e3:g} ms")
        if call.source.nbytes > LARGEST_COPY:
            found.append(f"more than {LARGEST_COPY} bytes are read of the features")
        return call, found


def _is_hooked(module: nn.Module) -> bool:
    """Tell whether a call runs more than the module's own forward, as accelerate's and FSDP2's do."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def call_of(layer: Layer, rows: Tensor, features: PackedFeatures, layout: CallLayout, weights: Weights) -> LayerCall:
    """Choose the forms of a call, and find what they read of the features."""
    extractor, injection = layer.extractor, layer.injection
    samples = layout.instruction_rows.shape[0]
    extract, inject = extractor.form_for(features, samples), injection.form_for(layout, rows)
    device = rows.device.type
    seconds = plan.seconds("extract", extract, extractor.sizes(features, samples), device)
    seconds += plan.seconds("inject", inject, injection.sizes(layout, rows), device)
    read, source = extractor.read_by(extract, features)
    return LayerCall(layer, rows, features, layout, weights, (extract, inject), seconds, read, source)
