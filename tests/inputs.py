"""Seeded inputs of every op, by argument name, at the shapes a test asks for.

Tests choose their shapes by what can go wrong, most of them small and odd. The real shapes that the benchmarks
measure are named in ``bench/cases.py`` and drawn by ``bench/inputs.py``, on the device that uses them.

Values are drawn on the CPU in fp64 and rounded, so every dtype and device sees the same numbers. Where an op
takes strided tensors the inputs are strided: a view of something wider, as a slice of a fused projection is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]

# What each op is differentiable in; of the stem's pixels only floating ones.
DIFFERENTIABLE = {
    "stem": ("pixels", "weight", "scale", "shift"),
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


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scales and shifts that go with tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw:
    """Random tensors of one seed, dtype and device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return values.to(self.device, dtype or self.dtype)

    def strided(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Rows longer than their last dim, and a storage offset."""
        return self.normal(*shape[:-1], shape[-1] + 16, scale=scale)[..., 8 : 8 + shape[-1]]

    def rows(self, count: int, total: int, *, unique: bool) -> Tensor:
        if unique:
            index = torch.randperm(total, generator=self.generator)[:count]
        else:
            index = torch.randint(total, (count,), generator=self.generator)
        return index.to(self.device)

    def near_one(self, *shape: int) -> Tensor:
        """Scales of a norm: fp32 beside half-precision tensors."""
        return 1 + self.normal(*shape, scale=0.25, dtype=statistics_dtype(self.dtype))


def stem_inputs(
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    images: int = 2,
    pixel_dtype: torch.dtype = torch.uint8,
    channels: int = 1,
    kernel: int = 7,
    out_channels: int = 8,
    pool: int = 3,
) -> Inputs:
    """Pixels of the dtype's usual range, a little of it outside the windows; every other image inverted."""
    draw = Draw(dtype, device)
    top = {torch.uint8: 255.0, torch.uint16: 4095.0}.get(pixel_dtype, 1.0)
    pixels = torch.rand(images, *size, channels, generator=draw.generator, dtype=torch.float64) * top
    low, high = 0.05 * top, 0.95 * top
    windows = [(high, low) if image % 2 else (low, high) for image in range(images)]
    return {
        "pixels": pixels.to(pixel_dtype).to(device),
        "window": torch.tensor(windows, dtype=torch.float32).reshape(images, 2).to(device),
        "mean": torch.tensor([0.485, 0.456, 0.406], device=device),
        "std": torch.tensor([0.229, 0.224, 0.225], device=device),
        "weight": draw.normal(out_channels, 3, kernel, kernel, scale=(3 * kernel * kernel) ** -0.5),
        "scale": draw.near_one(out_channels),
        "shift": draw.normal(out_channels, scale=0.5, dtype=statistics_dtype(dtype)),
        "pool": pool,
    }


def conv_norm_act_inputs(
    size: tuple[int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    images: int = 2,
    channels: tuple[int, int] = (16, 24),
    kernel: int = 3,
    stride: int = 1,
    activation: str = "relu",
    residual: bool = False,
    nchw: bool = False,
) -> Inputs:
    """``channels``: in, out. ``nchw``: x is a view of memory that PyTorch calls contiguous."""
    draw = Draw(dtype, device)
    c, oc = channels
    x = draw.normal(images, c, *size).permute(0, 2, 3, 1) if nchw else draw.normal(images, *size, c)
    out_size = [(side - 1) // stride + 1 for side in size]
    return {
        "x": x,
        "weight": draw.normal(oc, c, kernel, kernel, scale=(c * kernel * kernel) ** -0.5),
        "scale": draw.near_one(oc),
        "shift": draw.normal(oc, scale=0.5, dtype=statistics_dtype(dtype)),
        "residual": draw.strided(images, *out_size, oc) if residual else None,
        "stride": stride,
        "activation": activation,
    }


def condition_queries_inputs(
    tokens: int,
    samples: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    channels: int = 48,
    queries: int = 5,
    dim: int = 32,
    bias: bool = True,
) -> Inputs:
    draw = Draw(dtype, device)
    return {
        "hidden": draw.strided(tokens, channels),
        "row_idx": draw.rows(samples, tokens, unique=False),
        "weight": draw.normal(dim, channels, scale=channels**-0.5),
        "bias": draw.normal(dim) if bias else None,
        "queries": draw.normal(queries, dim),
    }


def packing(lengths_q: Sequence[int], lengths_k: Sequence[int], device: str = "cpu") -> Inputs:
    """The four arguments that say how sequences are packed."""

    def cumulative(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    return {
        "cu_seqlens_q": cumulative(lengths_q),
        "cu_seqlens_k": cumulative(lengths_k),
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
    }


def cross_attention_inputs(
    lengths_q: Sequence[int],
    lengths_k: Sequence[int],
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    heads: int = 2,
    head_dim: int = 32,
) -> Inputs:
    """k and v are the two halves of one projection's output: their rows lie 2*H*D apart."""
    draw = Draw(dtype, device)
    k, v = draw.normal(sum(lengths_k), 2, heads, head_dim).unbind(1)
    q = draw.strided(sum(lengths_q), heads, head_dim)
    return {"q": q, "k": k, "v": v, **packing(lengths_q, lengths_k, device), "softmax_scale": head_dim**-0.5}


def norm_linear_inputs(
    tokens: int,
    rows: int | None,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    channels: int = 48,
    dim: int = 32,
    bias: bool = True,
    norm_dtype: torch.dtype | None = None,
    offset: float = 0.5,
) -> Inputs:
    """``rows``: how many are selected, with repetition; None takes all. ``offset``: mean of x, in its deviations."""
    draw = Draw(dtype, device)
    return {
        "x": draw.strided(tokens, channels).add_(offset),
        "norm_weight": draw.near_one(channels).to(norm_dtype or dtype),
        "norm_bias": draw.normal(channels, scale=0.25, dtype=norm_dtype or dtype),
        "weight": draw.normal(dim, channels, scale=channels**-0.5),
        "bias": draw.normal(dim) if bias else None,
        "row_idx": None if rows is None else draw.rows(rows, tokens, unique=False),
        "eps": 1e-5,
    }


def inject_rows_inputs(
    tokens: int,
    rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    channels: int = 48,
    dim: int = 32,
    bias: bool = True,
) -> Inputs:
    draw = Draw(dtype, device)
    return {
        "hidden": draw.strided(tokens, channels),
        "update": draw.strided(rows, dim),
        "weight": draw.normal(channels, dim, scale=dim**-0.5),
        "bias": draw.normal(channels) if bias else None,
        "row_idx": draw.rows(rows, tokens, unique=True),
    }


def linear_inputs(
    rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    channels: int = 48,
    dim: int = 32,
    bias: bool = True,
) -> Inputs:
    draw = Draw(dtype, device)
    return {
        "x": draw.strided(rows, channels),
        "weight": draw.normal(dim, channels, scale=channels**-0.5),
        "bias": draw.normal(dim) if bias else None,
    }


def head_linear_inputs(
    images: int,
    rows: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    heads: int = 3,
    channels: int = 48,
    dim: int = 32,
    merge_heads: bool = False,
) -> Inputs:
    """``x`` as queries are, row by row with their heads side by side."""
    draw = Draw(dtype, device)
    return {
        "x": draw.strided(images, rows, heads, channels).transpose(1, 2),
        "weight": draw.normal(heads, dim, channels, scale=channels**-0.5),
        "merge_heads": merge_heads,
    }


def row_softmax_inputs(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    scale: float = 0.25,
    spread: float = 4.0,
    out_dtype: torch.dtype | None = None,
) -> Inputs:
    """``spread``: deviation of the scores, whose products with ``scale`` the exponential sees."""
    draw = Draw(dtype, device)
    return {"scores": draw.strided(rows, columns, scale=spread), "scale": scale, "out_dtype": out_dtype}


def latent_attention_inputs(
    rows: int, width: int, lengths: Sequence[int], dtype: torch.dtype, device: str = "cpu"
) -> Inputs:
    """Scores of a few units: neither uniform nor one token alone."""
    draw = Draw(dtype, device)
    return {
        "q": draw.strided(len(lengths), rows, width),
        "latent": draw.strided(sum(lengths), width),
        "lengths": list(lengths),
        "softmax_scale": 2 * width**-0.5,
    }
