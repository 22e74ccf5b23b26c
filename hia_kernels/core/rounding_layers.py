"""Rules of the error analysis for layers: convolutions, pools and norms (:mod:`hia_kernels.core.rounding`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .rounding import Bounded, analysis_of, aten, magnitude, rule, sizes_of, value_of
from .rounding_rules import as_terms, product_of


def _may_be_winograd(weight: Any, stride: list[int]) -> bool:
    """Tell whether a convolution may be computed by Winograd's algorithm (Lavin and Gray, CVPR 2016).

    It adds and subtracts a tile's pixels, and a kernel's taps, before it multiplies: its roundings are relative to the
    largest terms in the neighbourhood, not to an element's own.
    """
    return tuple(weight.shape[2:]) == (3, 3) and set(stride) == {1}


def _neighbourhood_max(terms: Tensor) -> Tensor:
    """Take the largest terms within a pixel's distance, [N, C, H, W]."""
    return F.max_pool2d(terms, 3, stride=1, padding=1) if terms.numel() else terms


@rule(aten.convolution)
def _convolution(func: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    value, terms, spread = product_of(lambda a, b: func(a, b, None, *rest), x, weight)
    terms = _neighbourhood_max(terms) if _may_be_winograd(weight, rest[0]) else terms
    out = Bounded(value, terms, spread, analysis_of(x, weight))
    return out if bias is None else out + bias.reshape(-1, *[1] * (value.dim() - 2))


@rule(aten.convolution_backward)
def _convolution_backward(func: Any, grad: Any, x: Any, weight: Any, sizes: Any, *rest: Any) -> tuple[Any, ...]:
    *geometry, mask = rest

    def gradient(wanted: int) -> Callable[[Tensor, Tensor], Tensor]:
        only = [wanted == place for place in range(3)]
        other = value_of(x) if wanted == 0 else value_of(weight)

        def call(g: Tensor, operand: Tensor) -> Tensor:
            like = other.to(g.dtype)  # only its shape matters
            operands = (like, operand) if wanted == 0 else (operand, like)
            return func(g, *operands, None, *geometry, only)[wanted]

        return call

    dtype, winograd = analysis_of(grad, x, weight), _may_be_winograd(weight, geometry[0])
    dx = dweight = None
    if mask[0]:
        value, terms, spread = product_of(gradient(0), grad, weight)
        dx = Bounded(value, _neighbourhood_max(terms) if winograd else terms, spread, dtype)
    if mask[1]:
        value, terms, spread = product_of(gradient(1), grad, x)
        largest = terms.amax((2, 3), keepdim=True).expand_as(terms) if winograd and terms.numel() else terms
        dweight = Bounded(value, largest, spread, dtype)
    return dx, dweight, aten.sum(grad, [0, *range(2, grad.dim())]) if mask[2] else None


@rule(aten.native_layer_norm)
def _layer_norm(func: Any, x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Any, ...]:
    dims = list(range(-len(shape), 0))
    mean = aten.mean(x, dims, True)
    centred = x - mean
    rstd = aten.rsqrt(aten.mean(centred * centred, dims, True) + eps)
    out = centred * rstd
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, rstd


@rule(aten.native_layer_norm_backward)
def _layer_norm_backward(
    func: Any, grad: Any, x: Any, shape: list[int], mean: Any, rstd: Any, weight: Any, bias: Any, mask: list[bool]
) -> tuple[Any, ...]:
    dims, outer = list(range(-len(shape), 0)), list(range(grad.dim() - len(shape)))
    normed = (x - mean) * rstd
    scaled = grad if weight is None else grad * weight
    inner = scaled - aten.mean(scaled, dims, True) - normed * aten.mean(scaled * normed, dims, True)
    return (
        inner * rstd if mask[0] else None,
        aten.sum(grad * normed, outer) if mask[1] else None,
        aten.sum(grad, outer) if mask[2] else None,
    )


@rule(aten.avg_pool2d)
def _averaged(func: Any, x: Bounded, *window: Any) -> Bounded:
    value, terms, size = sizes_of(x)
    return Bounded(func(value, *window), func(terms + magnitude(value), *window), func(size, *window), x.analysis)


@rule(aten.max_pool2d_with_indices)
def _pooled(func: Any, x: Bounded, *window: Any) -> tuple[Bounded, Tensor]:
    out, index = func(x.value, *window)
    terms, spread = (func(part, *window)[0] for part in (x.terms, x.spread))
    return Bounded(out, terms, spread, x.analysis), index


@rule(aten.max_pool2d_with_indices_backward)
def _pooled_backward(
    func: Any,
    grad: Any,
    x: Bounded,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    index: Tensor,
) -> Bounded:
    """Give a window's gradient to every pixel that roundings could make its maximum, or take it away."""
    g, terms, size = sizes_of(grad)
    stride = list(stride) or list(kernel)  # none given means the kernel's
    window = (kernel, stride, padding, dilation, ceil_mode)

    def scattered(part: Tensor) -> Tensor:
        return func(part, x.value.to(part.dtype), *window, index)

    out, out_terms, squares = scattered(g), scattered(terms + magnitude(g)), scattered(size.square())
    shape = {"kernel_size": kernel, "dilation": dilation, "padding": 0, "stride": stride}

    def windows(part: Tensor, outside: float) -> Tensor:  # [N, C, K * K, windows]
        pad = [padding[1], padding[1], padding[0], padding[0]]
        found = F.unfold(F.pad(part, pad, value=outside), **shape)
        return found.unflatten(1, (part.shape[1], -1))

    low, high = windows(x.value - x.bound(), -1e30), windows(x.value + x.bound(), -1e30)
    candidates = high >= low.amax(2, keepdim=True)
    rivals = candidates & (candidates.sum(2, keepdim=True) > 1)
    shares = rivals * as_terms(g, x.analysis).flatten(2)[:, :, None]
    padded = [side + 2 * pad for side, pad in zip(x.value.shape[2:], padding)]
    back = F.fold(shares.flatten(1, 2), padded, **shape)
    x.analysis.undecided |= bool(shares.any())
    rows, columns = (slice(pad, pad + side) for side, pad in zip(x.value.shape[2:], padding))
    return Bounded(out, out_terms + back[:, :, rows, columns], squares.sqrt(), x.analysis)
