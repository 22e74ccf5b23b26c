"""FLOPs of every method by hand, from config numbers alone: the cross-check of what was counted.

2 per multiply-add; matrix products and convolutions; attention in full. Prefill of one sample, logits of the
last token. Which form of its maths our adapter takes is asked of :mod:`hia.layers.plan`; what the form costs is written
down here again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from hia import HiAConfig
from hia.layers.plan import AUTO, EXTRA_COLUMNS, choose, sizes_of

from . import methods
from .hosts import BASE_RESOLUTION, HostSpec, visual_tokens

RESNET_BLOCKS = (3, 4, 6, 3)


@dataclass(frozen=True)
class AdapterShape:
    """The sizes that the adapter's FLOPs depend on.

    Attributes:
        dim: D.
        queries: M.
        channels: C of the encoder's features.
        injections: number of decoder layers.
        heads: H.
        shared_projection: the features pass C -> D1 once, then D1 -> D in each layer (released maths);
            otherwise C -> D in each layer.
        forms: of extracting and of injecting, by :mod:`hia.layers.plan`'s names.
    """

    dim: int
    queries: int = 256
    channels: int = 2048
    injections: int = 2
    heads: int = 8
    shared_projection: bool = False
    forms: tuple[str, str] = ("direct", "direct")


def prefill_flops(
    method: str,
    spec: HostSpec,
    resolution: int,
    images: int,
    text_tokens: int,
    *,
    device: str = "cuda",
    itemsize: int = 2,
) -> int:
    """Count the FLOPs of one prefill.

    Args:
        method: of ``methods.METHODS``.
        spec: of the host.
        resolution: side of the images, pixels.
        images: in the sample.
        text_tokens: beside them.
        device: "cpu" or "cuda", for which our adapter plans.
        itemsize: bytes of an element.
    """
    total = outside_flops(method, spec, resolution, images, text_tokens)
    if method in ("baseline", "anyres"):
        return total
    return total + layers_flops(method, spec, resolution, images, device, itemsize)


def outside_flops(method: str, spec: HostSpec, resolution: int, images: int, text_tokens: int) -> int:
    """Count all of a prefill but the adapter's layers: LLM, CLIP, and the high-resolution encoder."""
    total = llm_flops(spec.text, methods.sequence_length(method, resolution, images, text_tokens))
    if method == "baseline":
        return total + images * _seen(spec, visual_tokens(resolution))
    base = visual_tokens(BASE_RESOLUTION)
    if method == "anyres":
        down, across = methods.anyres_grid(resolution)
        return total + images * (1 + down * across) * _seen(spec, base)
    return total + images * (_seen(spec, base) + resnet50_flops(resolution))


def layers_flops(
    method: str, spec: HostSpec, resolution: int, images: int, device: str = "cuda", itemsize: int = 2
) -> int:
    """Count the HiA layers without the encoder, of "hia" or "released"; ours with folded weights."""
    width = int(spec.text["hidden_size"])
    if method == "released":  # it conditions the queries once per image, ours once per sample
        shape = AdapterShape(width, shared_projection=True)
        return adapter_flops(shape, width, resolution, images, query_sets=images)
    host = SimpleNamespace(hidden_size=width, num_hidden_layers=int(spec.text["num_hidden_layers"]), model_type="llama")
    config = HiAConfig.paper(host)
    sizes = sizes_of(config, [(resolution, resolution)] * images, visual_tokens(BASE_RESOLUTION), 1, itemsize)
    sizes = replace(sizes, weights_folded=True)
    forms = choose("extract", AUTO, sizes, device), choose("inject", AUTO, sizes, device)
    return adapter_flops(AdapterShape(width, heads=config.num_heads, forms=forms), width, resolution, images, 1)


def llm_flops(text: dict[str, Any], tokens: int) -> int:
    """Count LLaMA's prefill."""
    width, inner = int(text["hidden_size"]), int(text["intermediate_size"])
    heads = int(text["num_attention_heads"])
    kv_width = width // heads * int(text.get("num_key_value_heads") or heads)
    weights = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    layer = 2 * tokens * weights + 4 * tokens * tokens * width
    return int(text["num_hidden_layers"]) * layer + 2 * width * int(text["vocab_size"])


def _seen(spec: HostSpec, patches: int) -> int:
    """Count one image through CLIP (all layers run, though the last one's output is not used) and the projector."""
    vision, out = spec.vision, int(spec.text["hidden_size"])
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    embed = 2 * patches * 3 * int(vision["patch_size"]) ** 2 * width
    tokens = patches + 1
    layer = 2 * tokens * (4 * width * width + 2 * width * inner) + 4 * tokens * tokens * width
    return embed + int(vision["num_hidden_layers"]) * layer + 2 * patches * (width * out + out * out)


def adapter_flops(shape: AdapterShape, host_width: int, resolution: int, images: int, query_sets: int) -> int:
    """Count all injections for ``images`` images, and the projection that the released layers share."""
    features = feature_count(resolution)
    shared = 2 * features * shape.channels * host_width if shape.shared_projection else 0
    return images * shared + shape.injections * injection_flops(shape, host_width, features, images, query_sets)


def injection_flops(shape: AdapterShape, host_width: int, features: int, images: int, query_sets: int) -> int:
    """Count one layer: condition, extract, inject; ``features`` tokens an image."""
    dim, queries = shape.dim, shape.queries
    per_set = 2 * host_width * dim + 2 * queries * dim * dim
    read = images * features * _token_flops(shape, host_width)
    if shape.forms[0].endswith("absorbed"):  # queries through W_k a sample, results through W_v an image
        read += 2 * (query_sets + images) * queries * dim * _latent_width(shape)
    out = 2 * images * queries * dim * dim
    return query_sets * per_set + read + out + images * _inject_flops(shape, host_width)


def _latent_width(shape: AdapterShape) -> int:
    return shape.channels + EXTRA_COLUMNS if shape.forms[0].startswith("ln_folded") else shape.dim


def _token_flops(shape: AdapterShape, host_width: int) -> int:
    """Count what extracting does with one feature token."""
    dim, form = shape.dim, shape.forms[0]
    wide = shape.channels + EXTRA_COLUMNS
    if form.startswith("ln_folded"):
        before = 2 * wide * min(dim, wide)  # its norm
    elif form.startswith("folded") or not shape.shared_projection:
        before = 2 * shape.channels * dim
    else:
        before = 2 * host_width * dim
    if form.endswith("absorbed"):
        return before + 4 * shape.heads * shape.queries * _latent_width(shape)
    return before + 4 * (wide if form == "ln_folded_kv" else dim) * dim + 4 * shape.queries * dim


def _inject_flops(shape: AdapterShape, host_width: int) -> int:
    """Count what injecting does for one image."""
    dim, queries, visual = shape.dim, shape.queries, visual_tokens(BASE_RESOLUTION)
    keys_values = 4 * queries * dim * dim
    if shape.forms[1] == "absorbed":
        return keys_values + 4 * queries * dim * host_width + 4 * visual * shape.heads * queries * host_width
    return keys_values + 4 * visual * host_width * dim + 4 * visual * queries * dim


def feature_count(resolution: int) -> int:
    """Return N = ceil(R / 32) ** 2, the tokens of a square image."""
    return (-(-resolution // 32)) ** 2


def resnet50_flops(resolution: int, width: int = 64) -> int:
    """Count ResNet-50's convolutions without the classifier; stride on the 3 x 3."""
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
