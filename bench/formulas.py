"""FLOPs of every method by hand, from config numbers alone: the cross-check of what was counted.

2 per multiply-add; matrix products and convolutions; attention in full. Prefill of one sample, logits of the
last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import methods
from .hosts import BASE_RESOLUTION, HostSpec, visual_tokens

RESNET_BLOCKS = (3, 4, 6, 3)


@dataclass(frozen=True)
class AdapterShape:
    """What the adapter's FLOPs depend on.

    Attributes:
        dim: D.
        queries: M.
        channels: C of the encoder's features.
        injections: number of decoder layers.
        shared_projection: the features pass C -> D1 once, then D1 -> D in each layer (released maths);
            otherwise C -> D in each layer.
    """

    dim: int
    queries: int = 256
    channels: int = 2048
    injections: int = 2
    shared_projection: bool = False


def prefill_flops(method: str, spec: HostSpec, resolution: int, images: int, text_tokens: int) -> int:
    """FLOPs of one prefill."""
    tokens = methods.sequence_length(method, resolution, images, text_tokens)
    total = llm_flops(spec.text, tokens)
    if method == "baseline":
        return total + images * _seen(spec, visual_tokens(resolution))
    base = visual_tokens(BASE_RESOLUTION)
    if method == "anyres":
        down, across = methods.anyres_grid(resolution)
        return total + images * (1 + down * across) * _seen(spec, base)
    total += images * _seen(spec, base)
    width = int(spec.text["hidden_size"])
    shape = AdapterShape(width, shared_projection=method == "released")
    # the released code conditions the queries once per image, ours once per sample
    query_sets = images if method == "released" else 1
    return total + adapter_flops(shape, width, resolution, images, query_sets)


def llm_flops(text: dict[str, Any], tokens: int) -> int:
    """LLaMA's prefill."""
    width, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    heads = int(text["num_attention_heads"])
    kv_width = width // heads * int(text.get("num_key_value_heads") or heads)
    weights = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    layer = 2 * tokens * weights + 4 * tokens * tokens * width
    return int(text["num_hidden_layers"]) * layer + 2 * width * int(text["vocab_size"])


def _seen(spec: HostSpec, patches: int) -> int:
    """One image through CLIP (all layers run, though the last one's output is not used) and the projector."""
    vision, out = spec.vision, int(spec.text["hidden_size"])
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    embed = 2 * patches * 3 * int(vision["patch_size"]) ** 2 * width
    tokens = patches + 1
    layer = 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width
    return embed + int(vision["num_hidden_layers"]) * layer + 2 * patches * (width * out + out * out)


def adapter_flops(shape: AdapterShape, host_width: int, resolution: int, images: int, query_sets: int) -> int:
    """Encoder and all injections, for ``images`` images."""
    features = feature_count(resolution)
    shared = 2 * features * shape.channels * host_width if shape.shared_projection else 0
    layers = shape.injections * injection_flops(shape, host_width, features, images, query_sets)
    return images * (resnet50_flops(resolution) + shared) + layers


def injection_flops(shape: AdapterShape, host_width: int, features: int, images: int, query_sets: int) -> int:
    """One layer: condition, extract, inject; ``features`` tokens an image."""
    dim, queries, visual = shape.dim, shape.queries, visual_tokens(BASE_RESOLUTION)
    per_set = 2 * host_width * dim + 2 * queries * dim * dim
    incoming = host_width if shape.shared_projection else shape.channels
    extract = 2 * features * (incoming * dim + 2 * dim * dim) + 4 * queries * features * dim + 2 * queries * dim * dim
    inject = 2 * visual * host_width * dim + 4 * queries * dim * dim + 4 * visual * queries * dim
    inject += 2 * visual * dim * host_width
    return query_sets * per_set + images * (extract + inject)


def feature_count(resolution: int) -> int:
    """N = ceil(R / 32) ** 2 tokens of a square image."""
    return (-(-resolution // 32)) ** 2


def resnet50_flops(resolution: int, width: int = 64) -> int:
    """ResNet-50's convolutions without the classifier; stride on the 3 x 3."""
    side = _half(resolution)
    total = 2 * side * side * 3 * width * 49
    side, channels = _half(side), width
    for stage, blocks in enumerate(RESNET_BLOCKS):
        inner, out = width * 2**stage, width * 2**stage * 4
        for block in range(blocks):
            after = _half(side) if stage and not block else side
            total += 2 * side * side * channels * inner
            total += 2 * after * after * (9 * inner * inner + inner * out)
            if not block:
                total += 2 * after * after * channels * out
            side, channels = after, out
    return total


def _half(size: int) -> int:
    return (size - 1) // 2 + 1
