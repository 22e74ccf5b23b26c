"""Rules of the error analysis for elementwise functions, sums and products (:mod:`hia_kernels.core.rounding`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .rounding import (
    UNITS,
    Analysis,
    Bounded,
    Sizes,
    accumulation_roundoff,
    analysis_of,
    aten,
    magnitude,
    of_parts,
    prims,
    rule,
    sizes_of,
)


@rule(aten.add, aten.sub, prims.add, prims.sub)
def _added(func: Any, a: Any, b: Any, alpha: float = 1) -> Bounded:
    (x, x_terms, x_size), (y, y_terms, y_size) = sizes_of(a), sizes_of(b)
    out = func(x, y, alpha=alpha) if alpha != 1 else func(x, y)
    terms = x_terms + abs(alpha) * y_terms + magnitude(out)
    spread = (x_size * x_size + (alpha * alpha) * (y_size * y_size)).sqrt()
    return Bounded(out, terms, spread, analysis_of(a, b))


@rule(aten.mul, prims.mul)
def _multiplied(func: Any, a: Any, b: Any) -> Bounded:
    (x, x_terms, x_size), (y, y_terms, y_size) = sizes_of(a), sizes_of(b)
    out = func(x, y)
    x, y = magnitude(x), magnitude(y)
    terms = x_terms * y + x * y_terms + magnitude(out)
    return Bounded(out, terms, torch.maximum(x_size * y, x * y_size), analysis_of(a, b))


@rule(aten.div, prims.div)
def _divided(func: Any, a: Any, b: Any, *, rounding_mode: str | None = None) -> Bounded:
    if rounding_mode is not None:
        raise NotImplementedError("hia_kernels.testing: no rule says what roundings do in a division to whole numbers")
    (x, x_terms, x_size), (y, y_terms, y_size) = sizes_of(a), sizes_of(b)
    out, divisor = func(x, y), magnitude(y)
    size = magnitude(out)
    terms = x_terms / divisor + size * (y_terms / divisor) + size
    spread = torch.maximum(x_size / divisor, size * (y_size / divisor))
    return Bounded(out, terms, spread, analysis_of(a, b))


def _elementwise(out: Tensor, slope: Tensor, x: Bounded) -> Bounded:
    """Analyse a smooth function of one tensor, given its derivative there."""
    slope, (_, terms, size) = magnitude(slope), sizes_of(x)
    return Bounded(out, slope * terms + magnitude(out), torch.maximum(magnitude(out), slope * size), x.analysis)


# derivatives, of the argument and of the result
SLOPES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.exp: lambda x, out: out,
    aten.expm1: lambda x, out: out + 1,
    aten.log: lambda x, out: 1 / x,
    aten.log1p: lambda x, out: 1 / (1 + x),
    aten.rsqrt: lambda x, out: out / (2 * x),
    aten.sqrt: lambda x, out: 1 / (2 * out),
    aten.reciprocal: lambda x, out: out * out,
    aten.sigmoid: lambda x, out: out * (1 - out),
    aten.tanh: lambda x, out: 1 - out * out,
    aten.erf: lambda x, out: torch.exp(-x * x) * 1.1283791670955126,
    aten.sin: lambda x, out: torch.cos(x),
    aten.cos: lambda x, out: torch.sin(x),
    aten.abs: lambda x, out: torch.ones_like(x),
}


@rule(*SLOPES)
def _smooth(func: Any, x: Bounded) -> Bounded:
    out = func(x.value)
    return _elementwise(out, SLOPES[func.overloadpacket](x.value, out), x)


SLOPES |= {getattr(prims, op.__name__): slope for op, slope in SLOPES.items() if hasattr(prims, op.__name__)}
rule(*SLOPES)(_smooth)


@rule(aten.pow)
def _power(func: Any, x: Any, exponent: Any) -> Any:
    if not isinstance(x, Bounded) or isinstance(exponent, Tensor):
        raise NotImplementedError(
            f"hia_kernels.testing: no rule says what roundings do in {func} with a tensor's powers"
        )
    slope = exponent * x.value ** (exponent - 1) if exponent else torch.zeros_like(x.value)
    return _elementwise(func(x.value, exponent), slope, x)


@rule(aten.maximum, aten.minimum)
def _greater(func: Any, a: Any, b: Any) -> Any:
    (x, _, _), (y, _, _) = sizes_of(a), sizes_of(b)
    return torch.where(x >= y if func.overloadpacket is aten.maximum else x <= y, a, b)


@rule(aten.gelu)
def _gelu(func: Any, x: Bounded, **options: Any) -> Bounded:
    """Analyse x (1 + erf(x / sqrt 2)) / 2, which cancels where x is negative: its terms are of the size of x."""
    slope = aten.gelu_backward(torch.ones_like(x.value), x.value, **options)
    found = _elementwise(func(x.value, **options), slope, x)
    return Bounded(found.value, found.terms + magnitude(x.value), found.spread, x.analysis)


@rule(aten.gelu_backward)
def _gelu_backward(func: Any, grad: Any, x: Bounded, **options: Any) -> Bounded:
    """Analyse GELU's slope, at most 1.13, with roundings of its own; its own slope is (2 - x^2) phi(x)."""
    (g, g_terms, g_size), (value, terms, size) = sizes_of(grad), sizes_of(x)
    slope = magnitude(func(torch.ones_like(value), value, **options))
    density = torch.exp(-value * value / 2) * 0.3989422804014327
    bend = magnitude((2 - value * value) * density)
    out_terms = g_terms * slope + magnitude(g) * (bend * terms + 2)
    spread = torch.maximum(g_size * slope, magnitude(g) * torch.maximum(bend * size, slope))
    return Bounded(func(g, value, **options), out_terms, spread, analysis_of(grad, x))


@rule(aten.relu)
def _relu(func: Any, x: Bounded) -> Bounded:
    alive = x.value > -x.bound()  # below that, every rounded value gives 0
    return Bounded(func(x.value), x.terms * alive, x.spread * alive, x.analysis)


@rule(aten.threshold_backward)
def _relu_backward(func: Any, grad: Any, x: Bounded, threshold: float) -> Bounded:
    g, terms, size = sizes_of(grad)
    out = func(g, x.value, threshold)
    undecided = (x.value - threshold).abs() <= x.bound()
    alive = (x.value > threshold) | undecided & (x.spread > 0)
    flipped = torch.where(undecided & (x.spread > 0), as_terms(g, x.analysis), 0.0)
    x.analysis.undecided |= bool(flipped.any())
    return Bounded(out, terms * alive + flipped, size * alive, x.analysis)


def as_terms(size: Tensor, analysis: Analysis) -> Tensor:
    """Return terms whose bound is all of ``size``: what a branch taken the other way would change."""
    return magnitude(size) / (UNITS * accumulation_roundoff(analysis.dtype))


@rule(aten.clamp)
def _clamped(func: Any, x: Bounded, *limits: Any, **options: Any) -> Bounded:
    """Clamp: a value beyond the limits by more than its roundings is a limit, and exact."""
    out = func(x.value, *limits, **options)
    inside = (out - x.value).abs() <= x.bound()
    return Bounded(out, x.terms * inside, torch.where(inside, x.spread, magnitude(out)), x.analysis)


@rule(aten.sum, aten.mean, prims.sum)
def _summed(func: Any, x: Bounded, *args: Any, **options: Any) -> Bounded:
    value, terms, size = sizes_of(x)
    out = func(value, *args, **options)
    count = max(value.numel() // max(out.numel(), 1), 1) if func.overloadpacket is aten.mean else 1
    total = func(terms, *args, **_in_fp32(options)) + func(magnitude(value), *args, **_in_fp32(options))
    # a mean divides them by the count once; the root needs twice
    squares = func(size * size, *args, **_in_fp32(options))
    return Bounded(out, total, (squares / count).sqrt(), x.analysis)


def _in_fp32(options: dict[str, Any]) -> dict[str, Any]:
    return {name: option for name, option in options.items() if name not in ("dtype", "output_dtype")}


@rule(aten.var, prims.var)
def _variance(
    func: Any, x: Bounded, dims: Any = None, correction: Any = 1, keepdim: bool = False, **_options: Any
) -> Any:
    dims = list(range(x.dim())) if dims is None else dims
    centred = x - aten.mean(x, dims, True)
    count = math.prod(x.shape[dim] for dim in dims)
    return aten.sum(centred * centred, dims, keepdim) / max(count - (1 if correction is None else correction), 0)


@rule(aten.cumsum)
def _running_sum(func: Any, x: Bounded, dim: int, **options: Any) -> Bounded:
    value, terms, size = sizes_of(x)
    total = (terms + magnitude(value)).cumsum(dim)
    return Bounded(func(value, dim, **options), total, size.square().cumsum(dim).sqrt(), x.analysis)


@rule(aten.amax, prims.amax)
def _largest(func: Any, x: Bounded, *args: Any, **options: Any) -> Bounded:
    return of_parts([func(part, *args, **options) for part in (x.value, x.terms, x.spread)], x.analysis)


@rule(aten.logsumexp)
def _log_sum_exp(func: Any, x: Bounded, dims: list[int], keepdim: bool = False) -> Bounded:
    value, terms, size = sizes_of(x)
    kept = func(value, dims, True)
    p = magnitude(torch.exp(value - kept))
    out = func(value, dims, keepdim)
    total = (p * terms).sum(dims, keepdim) + 1 + magnitude(out)
    return Bounded(out, total, (p * size).square().sum(dims, keepdim).sqrt(), x.analysis)


def product_of(func: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Sizes:
    """Analyse a sum of products: a matrix product or a convolution."""
    (x, x_terms, x_size), (y, y_terms, y_size) = sizes_of(a), sizes_of(b)
    out, terms = func(x, y), func(magnitude(x), magnitude(y) + y_terms)
    if bool(x_terms.any()):
        terms = terms + func(x_terms, magnitude(y))
    return out, terms, func(x_size.square(), y_size.square()).clamp_min(0).sqrt()  # Winograd's sums may be negative


@rule(aten.mm, aten.bmm)
def _matrix_product(func: Any, a: Any, b: Any) -> Bounded:
    return of_parts(product_of(func, a, b), analysis_of(a, b))


@rule(aten.addmm)
def _matrix_product_added(func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    product = aten.mm(a, b)
    return (product if alpha == 1 else product * alpha) + (bias if beta == 1 else bias * beta)
