"""Seeded random inputs of every op and composite, by argument name, at a case's shapes.

Drawn on the device that uses them, in fp32 or the dtype itself: a 4096-pixel batch would take longer to draw on
the CPU than to measure. The CPU and a GPU therefore see different numbers of one distribution.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from hia.config import IMAGENET_MEAN, IMAGENET_STD
from hia.layout import CallLayout, build_layout
from hia.plan import DEEP_PAD

from .cases import CONVOLUTIONS, ImageCase, LayerCase, Size, Workload, halved

Inputs = dict[str, Any]

# what each op is differentiable in
DIFFERENTIABLE: dict[str, tuple[str, ...]] = {
    "stem": ("weight", "scale", "shift"),
    "conv_norm_act": ("x", "weight", "scale", "shift", "residual"),
    "condition_queries": ("hidden", "weight", "bias", "queries"),
    "cross_attention": ("q", "k", "v"),
    "norm_linear": ("x", "norm_weight", "norm_bias", "weight", "bias"),
    "inject_rows": ("hidden", "update", "weight", "bias"),
    "linear": ("x", "weight", "bias"),
    "head_linear": ("x", "weight"),
    "row_softmax": ("scores",),
    "latent_attention": ("q", "latent"),
}
# what is a layer's parameter rather than what flows through it
PARAMETERS: dict[str, tuple[str, ...]] = {
    "stem": ("mean", "std", "weight", "scale", "shift"),
    "conv_norm_act": ("weight", "scale", "shift"),
    "condition_queries": ("weight", "bias", "queries"),
    "cross_attention": (),
    "norm_linear": ("norm_weight", "norm_bias", "weight", "bias"),
    "inject_rows": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "head_linear": ("weight",),
    "row_softmax": (),
    "latent_attention": (),
}
STEM_KERNEL = 7


class Draw:
    """Random tensors of one seed, dtype and device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self.statistics = torch.float64 if dtype == torch.float64 else torch.float32
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal with that standard deviation."""
        dtype = dtype or self.dtype
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)
        return values.mul_(scale)

    def near_one(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A norm's weights."""
        return self.normal(*shape, scale=0.25, dtype=dtype).add_(1)

    def pixels(self, size: Size, bits: int = 8) -> Tensor:
        """[H, W, 1] uint8 or uint16."""
        shape = (*size, 1)
        values = torch.randint(0, 2**bits, shape, generator=self.generator, device=self.device, dtype=torch.int32)
        return values.to(torch.uint8 if bits == 8 else torch.uint16)


def make_inputs(workload: Workload, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """The arguments of an op, by name; of a composite, what :mod:`bench.composites` says it takes.

    Args:
        workload: op and case.
        dtype: of floating tensors; scales and shifts are fp32 beside halves.
        device: "cpu" or "cuda".
        seed: another one gives other numbers.
    """
    return _MAKERS[workload.op](workload, Draw(dtype, device, seed))


def layout_of(case: LayerCase, device: str) -> CallLayout:
    """Each sample: its images' tokens behind a first text token, the instruction's last token last."""
    image_map = torch.full((case.batch, case.seq_len), -1)
    instruction = torch.zeros(case.batch, dtype=torch.int64)
    image = 0
    for sample, images in enumerate(case.samples):
        for position in range(len(images)):
            start = 1 + position * case.visual_tokens
            image_map[sample, start : start + case.visual_tokens] = image
            image += 1
        instruction[sample] = len(images) * case.visual_tokens + case.text_tokens - 1
    layout = build_layout(image_map, instruction, case.images)
    return layout.for_call(case.batch, case.seq_len, torch.device(device))


def packing(lengths_q: list[int], lengths_k: list[int], device: str) -> Inputs:
    """How sequences are packed: cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    cumulative = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (lengths_q, lengths_k)]
    return {
        "cu_seqlens_q": cumulative[0].to(device),
        "cu_seqlens_k": cumulative[1].to(device),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_k": max(lengths_k),
    }


def _stem(workload: Workload, draw: Draw) -> Inputs:
    case = workload.case
    width = case.width
    return {
        "pixels": draw.pixels(case.sizes[0], case.bits)[None],
        "window": torch.tensor([[0.0, pixel_top(case)]], device=draw.device),
        "mean": torch.tensor(IMAGENET_MEAN, device=draw.device),
        "std": torch.tensor(IMAGENET_STD, device=draw.device),
        "weight": draw.normal(width, 3, STEM_KERNEL, STEM_KERNEL, scale=(3 * STEM_KERNEL**2) ** -0.5),
        "scale": draw.near_one(width, dtype=draw.statistics),
        "shift": draw.normal(width, scale=0.5, dtype=draw.statistics),
        "pool": 3,
    }


def _conv_norm_act(workload: Workload, draw: Draw) -> Inputs:
    case = workload.case
    stage, kernel, stride, channels_in, channels_out, has_residual = CONVOLUTIONS[workload.role]
    in_size = halved(case.sizes[0], 1 + stage - (stride - 1))
    out_size = [(side - 1) // stride + 1 for side in in_size]
    c, oc = channels_in * case.width, channels_out * case.width
    return {
        "x": draw.normal(1, *in_size, c),
        "weight": draw.normal(oc, c, kernel, kernel, scale=(c * kernel**2) ** -0.5),
        "scale": draw.near_one(oc, dtype=draw.statistics),
        "shift": draw.normal(oc, scale=0.5, dtype=draw.statistics),
        "residual": draw.normal(1, *out_size, oc) if has_residual else None,
        "stride": stride,
        "activation": "relu",
    }


def _condition_queries(workload: Workload, draw: Draw) -> Inputs:
    case, dim = workload.case, workload.case.config.dim
    channels = case.hidden_size
    return {
        "hidden": draw.normal(case.batch * case.seq_len, channels),
        "row_idx": layout_of(case, draw.device).instruction_rows,
        "weight": draw.normal(dim, channels, scale=channels**-0.5),
        "bias": draw.normal(dim),
        "queries": draw.normal(case.num_queries, dim),
    }


def _cross_attention(workload: Workload, draw: Draw) -> Inputs:
    """k and v are the two halves of one projection's output, as in the layer."""
    config = workload.case.config
    lengths_q, lengths_k = workload.case.attention_lengths(workload.role)
    k, v = draw.normal(sum(lengths_k), 2, config.num_heads, config.head_dim).unbind(1)
    q = draw.normal(sum(lengths_q), config.num_heads, config.head_dim)
    return {
        "q": q,
        "k": k,
        "v": v,
        **packing(lengths_q, lengths_k, draw.device),
        "softmax_scale": config.head_dim**-0.5,
    }


def _norm_linear(workload: Workload, draw: Draw) -> Inputs:
    case, dim = workload.case, workload.case.config.dim
    tokens, channels, out = {
        "queries": (case.batch * case.num_queries, dim, dim),
        "features": (sum(case.feature_lengths), dim, 2 * dim),
        "visual": (case.batch * case.seq_len, case.hidden_size, dim),
        "extracted": (case.images * case.num_queries, dim, 2 * dim),
    }[workload.role]
    return {
        "x": draw.normal(tokens, channels).add_(0.5),
        "norm_weight": draw.near_one(channels),
        "norm_bias": draw.normal(channels, scale=0.25),
        "weight": draw.normal(out, channels, scale=channels**-0.5),
        "bias": draw.normal(out),
        "row_idx": layout_of(case, draw.device).visual_rows if workload.role == "visual" else None,
        "eps": 1e-5,
    }


def _inject_rows(workload: Workload, draw: Draw) -> Inputs:
    case, dim = workload.case, workload.case.config.dim
    rows = layout_of(case, draw.device).visual_rows
    return {
        "hidden": draw.normal(case.batch * case.seq_len, case.hidden_size),
        "update": draw.normal(rows.shape[0], dim),
        "weight": draw.normal(case.hidden_size, dim, scale=dim**-0.5),
        "bias": draw.normal(case.hidden_size),
        "row_idx": rows,
    }


def _linear(workload: Workload, draw: Draw) -> Inputs:
    case, dim = workload.case, workload.case.config.dim
    rows, channels = {
        "features": (sum(case.feature_lengths), case.channels),
        "output": (case.images * case.num_queries, dim),
    }[workload.role]
    return {
        "x": draw.normal(rows, channels),
        "weight": draw.normal(dim, channels, scale=channels**-0.5),
        "bias": draw.normal(dim),
    }


def _head_linear(workload: Workload, draw: Draw) -> Inputs:
    """Queries as they are projected, results as the attention leaves them; weights as one linear layer's halves."""
    case, config = workload.case, workload.case.config
    heads, width, dim = config.num_heads, config.head_dim, config.dim
    if workload.role == "queries":
        x = draw.normal(case.batch, case.num_queries, heads, width).transpose(1, 2)
        weight = draw.normal(heads, width, dim, scale=width**-0.5).mT
    else:
        x = draw.normal(case.images, heads, case.num_queries, dim)
        weight = draw.normal(heads, width, dim, scale=dim**-0.5)
    return {"x": x, "weight": weight, "merge_heads": workload.role == "results"}


def _row_softmax(workload: Workload, draw: Draw) -> Inputs:
    """fp32 scores of one image, as the product before them leaves them; probabilities for the product behind."""
    case = workload.case
    rows, scale = case.num_queries * case.config.num_heads, case.config.head_dim**-0.5
    scores = draw.normal(rows, case.feature_lengths[0], scale=1 / scale, dtype=draw.statistics)
    return {"scores": scores, "scale": scale, "out_dtype": draw.dtype}


def _latent_attention(workload: Workload, draw: Draw) -> Inputs:
    """Queries that make scores of about 1, as normed ones do."""
    case, config = workload.case, workload.case.config
    width = config.dim if workload.role == "folded" else case.channels + DEEP_PAD
    scale = config.head_dim**-0.5
    return {
        "q": draw.normal(case.images, case.num_queries * config.num_heads, width, scale=width**-0.5 / scale),
        "latent": draw.normal(sum(case.feature_lengths), width),
        "lengths": case.feature_lengths,
        "softmax_scale": scale,
    }


def pixel_top(case: ImageCase | LayerCase) -> float:
    """The largest value that a pixel can have."""
    return 2.0 ** getattr(case, "bits", 8) - 1


def _images(case: ImageCase | LayerCase, draw: Draw) -> Inputs:
    windows = torch.tensor([[0.0, pixel_top(case)]] * len(case.sizes), device=draw.device)
    bits = getattr(case, "bits", 8)
    return {"images": [draw.pixels(size, bits) for size in case.sizes], "windows": windows}


def _hidden(case: LayerCase, draw: Draw) -> Inputs:
    return {"hidden": draw.normal(case.batch, case.seq_len, case.hidden_size), "layout": layout_of(case, draw.device)}


def _maps(case: LayerCase, draw: Draw) -> Inputs:
    """Features as the encoder gives them: behind a ReLU."""
    grids = [halved(size, 5) for size in case.sizes]
    return {"maps": tuple(draw.normal(*grid, case.channels).relu_() for grid in grids)}


def _encode(workload: Workload, draw: Draw) -> Inputs:
    return _images(workload.case, draw)


def _extract(workload: Workload, draw: Draw) -> Inputs:
    return _maps(workload.case, draw) | _hidden(workload.case, draw)


def _inject(workload: Workload, draw: Draw) -> Inputs:
    case = workload.case
    return _hidden(case, draw) | {"extracted": draw.normal(case.images * case.num_queries, case.config.dim)}


def _first_question(workload: Workload, draw: Draw) -> Inputs:
    return _images(workload.case, draw) | _hidden(workload.case, draw)


_MAKERS = {
    "stem": _stem,
    "conv_norm_act": _conv_norm_act,
    "condition_queries": _condition_queries,
    "cross_attention": _cross_attention,
    "norm_linear": _norm_linear,
    "inject_rows": _inject_rows,
    "linear": _linear,
    "head_linear": _head_linear,
    "row_softmax": _row_softmax,
    "latent_attention": _latent_attention,
    "encode": _encode,
    "extract": _extract,
    "inject": _inject,
    "adapter_layer": _first_question,
    "second_question": _extract,
    "adapter_train_step": _first_question,
    "encode_train_step": _encode,
}
