"""Shapes that the kernels are made for and no workload has: each is there for the launches that it alone causes.

Values don't matter on the fake device, so nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .workloads import Call

Inputs = Callable[[torch.dtype], dict[str, Any]]
FP32, INT64 = torch.float32, torch.int64
QKV = ("q", "k", "v")


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _stem(channels: int, pixels: torch.dtype, kernel: int = 7, pool: int = 3, side: int = 1001) -> Inputs:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "pixels": _empty(1, side, side, channels, dtype=pixels), "window": _empty(1, 2, dtype=FP32),
            "mean": _empty(3, dtype=FP32), "std": _empty(3, dtype=FP32),
            "weight": _empty(64, 3, kernel, kernel, dtype=dtype), "scale": _empty(64, dtype=FP32),
            "shift": _empty(64, dtype=FP32), "pool": pool,
        }  # fmt: skip

    return inputs


def _convolution(side: int, c: int, oc: int, kernel: int, activation: str = "relu") -> Inputs:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": _empty(1, side, side, c, dtype=dtype), "weight": _empty(oc, c, kernel, kernel, dtype=dtype),
            "scale": _empty(oc, dtype=FP32), "shift": _empty(oc, dtype=FP32),
            "residual": _empty(1, side, side, oc, dtype=dtype), "activation": activation,
        }  # fmt: skip

    return inputs


def _attention(heads: int, head_dim: int, queries: int = 256, keys: int = 784) -> Inputs:
    """Two images; keys and values as halves of one projection."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        k, v = _empty(2 * keys, 2, heads, head_dim, dtype=dtype).unbind(1)
        cu_seqlens_q, cu_seqlens_k = (_empty(3, dtype=torch.int32) for _ in range(2))
        return {
            "q": _empty(2 * queries, heads, head_dim, dtype=dtype), "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": queries, "max_seqlen_k": keys,
        }  # fmt: skip

    return inputs


def _condition(dim: int) -> Inputs:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden": _empty(4 * 700, 8192, dtype=dtype), "row_idx": _empty(4, dtype=INT64),
            "weight": _empty(dim, 8192, dtype=dtype), "bias": _empty(dim, dtype=dtype),
            "queries": _empty(256, dim, dtype=dtype),
        }  # fmt: skip

    return inputs


def _norm_linear(channels: int, rows: int = 1152, norms: torch.dtype | None = None) -> Inputs:
    """Of selected rows; ``norms``: dtype of the norm's weight and bias, where it isn't that of the others."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": _empty(1300, channels, dtype=dtype), "norm_weight": _empty(channels, dtype=norms or dtype),
            "norm_bias": _empty(channels, dtype=norms or dtype), "weight": _empty(1024, channels, dtype=dtype),
            "bias": _empty(1024, dtype=dtype), "row_idx": _empty(rows, dtype=INT64), "eps": 1e-5,
        }  # fmt: skip

    return inputs


def _inject(rows: int, hidden: torch.dtype | None = None) -> Inputs:
    """``hidden``: dtype of the residual stream, where it isn't that of the others."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden": _empty(1300, 5120, dtype=hidden or dtype), "update": _empty(rows, 1280, dtype=dtype),
            "weight": _empty(5120, 1280, dtype=dtype), "bias": _empty(5120, dtype=dtype),
            "row_idx": _empty(rows, dtype=INT64),
        }  # fmt: skip

    return inputs


def _softmax(tokens: int) -> Inputs:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {"scores": _empty(2048, tokens, dtype=FP32), "scale": 0.04, "out_dtype": dtype}

    return inputs


def edge_calls() -> Iterable[Call]:
    """Every edge in the dtypes that make a difference to it."""
    parameters = ("weight", "scale", "shift")
    yield Call("stem", "grey, 16 bit", "bf16", _stem(1, torch.uint16), ())
    yield Call("stem", "grey, 16 bit", "fp32", _stem(1, torch.uint16), ())
    yield Call("stem", "grey, float pixels", "fp32", _stem(1, FP32), ("pixels", *parameters))
    yield Call("stem", "rgb, float pixels", "bf16", _stem(3, FP32), ("pixels", *parameters))
    yield Call("stem", "rgb, 8 bit", "bf16", _stem(3, torch.uint8), ())
    yield Call("stem", "3x3 without pool", "fp16", _stem(1, torch.uint16, 3, 1), parameters)

    of_all = ("x", *parameters, "residual")
    yield Call("conv_norm_act", "3x3 gelu", "bf16", _convolution(56, 64, 64, 3, "gelu"), of_all)
    yield Call("conv_norm_act", "3x3, frozen weight", "bf16", _convolution(56, 256, 256, 3),
               ("x", "scale", "shift", "residual"))  # fmt: skip
    yield Call("conv_norm_act", "1x1 beyond 2^31 elements", "bf16", _convolution(6000, 64, 256, 1), ())
    yield Call("conv_norm_act", "3x3 beyond 2^31 elements", "bf16", _convolution(6000, 64, 64, 3), of_all)

    for head_dim in (64, 96, 256):  # 96: columns that are masked
        yield Call("cross_attention", f"head_dim {head_dim}", "bf16", _attention(8, head_dim), QKV)
    yield Call("cross_attention", "head_dim 272", "fp16", _attention(8, 272), QKV)
    for head_dim, dtype in ((128, "bf16"), (128, "fp32")):  # few heads, many keys: they are split
        yield Call("cross_attention", f"4 heads of {head_dim}, 16384 keys", dtype,
                   _attention(4, head_dim, 256, 16384), QKV)  # fmt: skip

    of_queries = ("hidden", "weight", "bias", "queries")
    yield Call("condition_queries", "dim 16384", "bf16", _condition(16384), of_queries)
    of_norm = ("x", "norm_weight", "norm_bias", "weight", "bias")
    yield Call("norm_linear", "16384 channels", "fp32", _norm_linear(16384), of_norm)
    yield Call("norm_linear", "64 rows", "bf16", _norm_linear(1024, 64), ())
    yield Call("inject_rows", "64 rows", "bf16", _inject(64), ())
    # autocast leaves the norm's parameters and the residual stream in fp32; only inside it do the functions take that
    yield Call("norm_linear", "autocast", "bf16", _norm_linear(5120, norms=FP32), of_norm,
               torch.ops.hia.norm_linear)  # fmt: skip
    yield Call("inject_rows", "autocast", "bf16", _inject(1152, FP32), ("hidden", "update", "weight", "bias"),
               torch.ops.hia.inject_rows)  # fmt: skip
    for tokens in (3136, 32768):
        yield Call("row_softmax", f"{tokens} tokens", "bf16", _softmax(tokens), ("scores",))
    for tokens in (16384, 32768):
        yield Call("row_softmax", f"{tokens} tokens", "fp32", _softmax(tokens), ("scores",))
