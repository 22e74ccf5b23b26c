"""How far roundings alone can take a result: a running error analysis over plain PyTorch.

A :class:`Bounded` tensor goes through a reference like any other and carries, element by element, two sizes beside
its value:

- ``terms``, the sum of the magnitudes of what was added up to make it, through every step so far. In units of the
  roundoff that is what the roundings of all sums and products can have moved the value by (Higham, "Accuracy and
  Stability of Numerical Algorithms", 2nd ed., sections 3.1, 3.5 and, for running bounds, 3.3). A sum that cancels has
  a small value and large terms.
- ``spread``, the size that the value would have if the terms had random signs: the root of the sum of their squares.
  In units of the roundoff it is what independent roundings of stored values move a sum by, as in a probabilistic
  analysis (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

Gradients are analysed too: PyTorch's autograd runs on top and calls the same operators. An operator without a rule is
decomposed by PyTorch's own table, or is an error. Where rounding decides between two branches (ReLU near 0, two
maxima in one pooling window), the terms hold the whole of what either branch would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

UNITS = 6  # roundings that a result may be off by; 3,610 random cases of the ops in fp32 stayed within
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

aten = torch.ops.aten
Sizes = tuple[Tensor, Tensor, Tensor]  # value, terms, spread; the latter two in fp32, which is precise enough


def accumulation_roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff of sums whose operands are of ``dtype``: halves are added up in fp32."""
    return UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


class Bounded(Tensor):
    """A tensor with its ``terms`` and its ``spread``; see the module."""

    value: Tensor
    terms: Tensor
    spread: Tensor
    dtype_tested: torch.dtype

    @staticmethod
    def __new__(cls, value: Tensor, terms: Tensor, spread: Tensor, dtype_tested: torch.dtype) -> Bounded:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=value.device,
        )  # fmt: skip
        made.value, made.terms, made.spread, made.dtype_tested = value, terms, spread, dtype_tested
        return made

    @classmethod
    def of_input(cls, value: Tensor, dtype_tested: torch.dtype) -> Bounded:
        """Wrap an argument: exact, its size its own."""
        return cls(value, torch.zeros_like(value, dtype=torch.float32), magnitude(value), dtype_tested)

    def unit(self) -> Tensor:
        """One rounding of a result of ``dtype_tested``, element by element: of its terms, as they are added up
        (halves in fp32), and of what is stored.

        Returns:
            Shape of the value, fp32, not negative.
        """
        stored = torch.maximum(self.spread, magnitude(self.value))
        unit = UNIT_ROUNDOFF[self.dtype_tested]
        # Below the normal range a result may be flushed to zero, as on GPUs; fp16, whose range is short, keeps it.
        least = torch.finfo(self.dtype_tested).smallest_normal * (unit if self.dtype_tested == torch.float16 else 1)
        return accumulation_roundoff(self.dtype_tested) * self.terms + unit * stored + least

    def bound(self) -> Tensor:
        """How far from the value :data:`UNITS` roundings can lead; twice that where the value is of the same dtype,
        for it has roundings of its own."""
        return (UNITS if self.value.dtype != self.dtype_tested else 2 * UNITS) * self.unit()

    def __repr__(self, **_options: Any) -> str:
        return f"Bounded({self.value!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(func, *args, **kwargs)
        if func in decomposition_table:
            return decomposition_table[func](*args, **kwargs)
        found = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_flatten(found)[0]):
            raise NotImplementedError(f"hia_kernels.testing: no rule says what roundings do in {func}")
        return found  # indices, comparisons


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Bounded) else x


def magnitude(x: Any) -> Any:
    """Of a tensor in fp32, or of a number."""
    return x.abs().float() if isinstance(x, Tensor) else abs(x)


def _sizes(x: Any) -> tuple[Any, Any, Any]:
    """Value, terms and size of an operand; a plain tensor or number is exact."""
    if isinstance(x, Bounded):
        return x.value, x.terms, torch.maximum(x.spread, magnitude(x.value))
    if isinstance(x, Tensor):
        return x, torch.zeros_like(x, dtype=torch.float32), magnitude(x)
    return x, 0.0, abs(x)


def _of_parts(parts: Sequence[Tensor], dtype: torch.dtype) -> Bounded:
    value, terms, spread = parts
    return Bounded(value, terms, spread, dtype)


def _dtype(*operands: Any) -> torch.dtype:
    return next(x.dtype_tested for x in operands if isinstance(x, Bounded))


RULES: dict[Any, Callable[..., Any]] = {}


def _rule(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


# Operators that move elements and compute nothing: each part moves alike.
@_rule(
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.expand, aten.unsqueeze,
    aten.squeeze, aten.select, aten.slice, aten.split, aten.split_with_sizes, aten.unbind, aten.cat, aten.stack,
    aten.clone, aten.detach, aten.alias, aten.index, aten.index_select, aten.gather, aten.slice_backward,
    aten.select_backward, aten.constant_pad_nd, aten.index_copy, aten.where, aten.flip, aten.diagonal,
    aten.as_strided, aten.clamp, aten.lift_fresh,
)  # fmt: skip
def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, structure = tree_flatten((args, kwargs))
    parts = []
    for part in range(3):
        chosen = [_sizes(leaf)[part] if isinstance(leaf, Bounded) or _is_float(leaf) else leaf for leaf in leaves]
        if part and func.overloadpacket is aten.clamp:  # its slope is at most 1
            parts.append(chosen[0])
            continue
        inner_args, inner_kwargs = tree_unflatten(chosen, structure)
        parts.append(func(*inner_args, **inner_kwargs))
    dtype = _dtype(*leaves)
    if isinstance(parts[0], Tensor):
        return _of_parts(parts, dtype)
    return type(parts[0])(_of_parts(each, dtype) for each in zip(*parts))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@_rule(aten._to_copy)
def _converted(func: Any, x: Bounded, **options: Any) -> Any:
    """The analysis is in exact arithmetic: a conversion rounds nothing here, but is a stored value."""
    value = func(x.value, **options)
    return Bounded(value, x.terms, x.spread, x.dtype_tested) if value.is_floating_point() else value


@_rule(aten.neg)
def _negated(func: Any, x: Bounded) -> Bounded:
    return Bounded(-x.value, x.terms, x.spread, x.dtype_tested)


@_rule(aten.add, aten.sub)
def _added(func: Any, a: Any, b: Any, alpha: float = 1) -> Bounded:
    (x, x_terms, x_size), (y, y_terms, y_size) = _sizes(a), _sizes(b)
    out = func(x, y, alpha=alpha) if alpha != 1 else func(x, y)
    terms = x_terms + abs(alpha) * y_terms + magnitude(out)
    spread = (x_size * x_size + (alpha * alpha) * (y_size * y_size)).sqrt()
    return Bounded(out, terms, spread, _dtype(a, b))


@_rule(aten.mul)
def _multiplied(func: Any, a: Any, b: Any) -> Bounded:
    (x, x_terms, x_size), (y, y_terms, y_size) = _sizes(a), _sizes(b)
    out = func(x, y)
    x, y = magnitude(x), magnitude(y)
    terms = x_terms * y + x * y_terms + magnitude(out)
    return Bounded(out, terms, torch.maximum(x_size * y, x * y_size), _dtype(a, b))


@_rule(aten.div)
def _divided(func: Any, a: Any, b: Any) -> Bounded:
    (x, x_terms, x_size), (y, y_terms, y_size) = _sizes(a), _sizes(b)
    out, divisor = func(x, y), magnitude(y)
    size = magnitude(out)
    terms = x_terms / divisor + size * (y_terms / divisor) + size
    spread = torch.maximum(x_size / divisor, size * (y_size / divisor))
    return Bounded(out, terms, spread, _dtype(a, b))


def _elementwise(out: Tensor, slope: Tensor, x: Bounded) -> Bounded:
    """A smooth function of one tensor, with its derivative there."""
    slope, (_, terms, size) = magnitude(slope), _sizes(x)
    return Bounded(out, slope * terms + magnitude(out), torch.maximum(magnitude(out), slope * size), x.dtype_tested)


@_rule(aten.exp)
def _exponential(func: Any, x: Bounded) -> Bounded:
    out = func(x.value)
    return _elementwise(out, out, x)


@_rule(aten.log)
def _logarithm(func: Any, x: Bounded) -> Bounded:
    return _elementwise(func(x.value), 1 / x.value, x)


@_rule(aten.rsqrt)
def _inverse_root(func: Any, x: Bounded) -> Bounded:
    out = func(x.value)
    return _elementwise(out, out / (2 * x.value), x)


@_rule(aten.gelu)
def _gelu(func: Any, x: Bounded, **options: Any) -> Bounded:
    """x (1 + erf(x / sqrt 2)) / 2 cancels where x is negative: its terms are of the size of x."""
    slope = aten.gelu_backward(torch.ones_like(x.value), x.value, **options)
    found = _elementwise(func(x.value, **options), slope, x)
    return Bounded(found.value, found.terms + magnitude(x.value), found.spread, x.dtype_tested)


@_rule(aten.gelu_backward)
def _gelu_backward(func: Any, grad: Any, x: Bounded, **options: Any) -> Bounded:
    """The slope, at most 1.13, has roundings of its own; its own slope is (2 - x^2) phi(x)."""
    (g, g_terms, g_size), (value, terms, size) = _sizes(grad), _sizes(x)
    slope = magnitude(func(torch.ones_like(value), value, **options))
    density = torch.exp(-value * value / 2) * 0.3989422804014327
    bend = magnitude((2 - value * value) * density)
    out_terms = g_terms * slope + magnitude(g) * (bend * terms + 2)
    spread = torch.maximum(g_size * slope, magnitude(g) * torch.maximum(bend * size, slope))
    return Bounded(func(g, value, **options), out_terms, spread, _dtype(grad, x))


@_rule(aten.relu)
def _relu(func: Any, x: Bounded) -> Bounded:
    alive = x.value > -x.bound()  # below, every rounding of it is 0
    return Bounded(func(x.value), x.terms * alive, x.spread * alive, x.dtype_tested)


@_rule(aten.threshold_backward)
def _relu_backward(func: Any, grad: Any, x: Bounded, threshold: float) -> Bounded:
    g, terms, size = _sizes(grad)
    out = func(g, x.value, threshold)
    undecided = (x.value - threshold).abs() <= x.bound()
    alive = (x.value > threshold) | undecided & (x.spread > 0)
    flipped = torch.where(undecided & (x.spread > 0), _as_terms(g, x.dtype_tested), 0.0)
    return Bounded(out, terms * alive + flipped, size * alive, x.dtype_tested)


def _as_terms(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Terms whose bound is all of ``size``: what a branch taken the other way would change."""
    return magnitude(size) / (UNITS * accumulation_roundoff(dtype))


@_rule(aten.sum, aten.mean)
def _summed(func: Any, x: Bounded, *args: Any, **options: Any) -> Bounded:
    value, terms, size = _sizes(x)
    out = func(value, *args, **options)
    count = max(value.numel() // max(out.numel(), 1), 1) if func.overloadpacket is aten.mean else 1
    total = func(terms, *args, **_in_fp32(options)) + func(magnitude(value), *args, **_in_fp32(options))
    squares = func(size * size, *args, **_in_fp32(options))  # over the count once for a mean; its square root twice
    return Bounded(out, total, (squares / count).sqrt(), x.dtype_tested)


def _in_fp32(options: dict[str, Any]) -> dict[str, Any]:
    return {name: option for name, option in options.items() if name != "dtype"}


@_rule(aten.amax)
def _largest(func: Any, x: Bounded, *args: Any, **options: Any) -> Bounded:
    return _of_parts([func(part, *args, **options) for part in (x.value, x.terms, x.spread)], x.dtype_tested)


@_rule(aten.logsumexp)
def _log_sum_exp(func: Any, x: Bounded, dims: list[int], keepdim: bool = False) -> Bounded:
    value, terms, size = _sizes(x)
    kept = func(value, dims, True)
    p = magnitude(torch.exp(value - kept))
    out = func(value, dims, keepdim)
    total = (p * terms).sum(dims, keepdim) + 1 + magnitude(out)
    return Bounded(out, total, (p * size).square().sum(dims, keepdim).sqrt(), x.dtype_tested)


def _product(func: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Sizes:
    """Of a product that sums: matrices, convolutions."""
    (x, x_terms, x_size), (y, y_terms, y_size) = _sizes(a), _sizes(b)
    out, terms = func(x, y), func(magnitude(x), magnitude(y) + y_terms)
    if bool(x_terms.any()):
        terms = terms + func(x_terms, magnitude(y))
    return out, terms, func(x_size.square(), y_size.square()).clamp_min(0).sqrt()  # Winograd's sums may be below 0


@_rule(aten.mm, aten.bmm)
def _matrix_product(func: Any, a: Any, b: Any) -> Bounded:
    return _of_parts(_product(func, a, b), _dtype(a, b))


@_rule(aten.addmm)
def _matrix_product_added(func: Any, bias: Any, a: Any, b: Any) -> Any:
    return aten.mm(a, b) + bias


def _is_winograds(weight: Any, stride: list[int]) -> bool:
    """Whether a convolution may be computed by Winograd's algorithm (Lavin and Gray, CVPR 2016).

    It adds and subtracts a tile's pixels, and a kernel's taps, before it multiplies: its roundings are relative to the
    largest terms near by, not to an element's own.
    """
    return tuple(weight.shape[2:]) == (3, 3) and set(stride) == {1}


def _near_by(terms: Tensor) -> Tensor:
    """The largest within a pixel's distance; [N, C, H, W]."""
    return F.max_pool2d(terms, 3, stride=1, padding=1) if terms.numel() else terms


@_rule(aten.convolution)
def _convolution(func: Any, x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    value, terms, spread = _product(lambda a, b: func(a, b, None, *rest), x, weight)
    terms = _near_by(terms) if _is_winograds(weight, rest[0]) else terms
    out = Bounded(value, terms, spread, _dtype(x, weight))
    return out if bias is None else out + bias.reshape(-1, 1, 1)


@_rule(aten.convolution_backward)
def _convolution_backward(func: Any, grad: Any, x: Any, weight: Any, sizes: Any, *rest: Any) -> tuple[Any, ...]:
    *geometry, mask = rest

    def gradient(wanted: int) -> Callable[[Tensor, Tensor], Tensor]:
        only = [wanted == place for place in range(3)]
        other = _value(x) if wanted == 0 else _value(weight)

        def call(g: Tensor, operand: Tensor) -> Tensor:
            like = other.to(g.dtype)  # its shape alone counts
            pair = (like, operand) if wanted == 0 else (operand, like)
            return func(g, *pair, None, *geometry, only)[wanted]

        return call

    dtype, winograds = _dtype(grad, x, weight), _is_winograds(weight, geometry[0])
    dx = dweight = None
    if mask[0]:
        value, terms, spread = _product(gradient(0), grad, weight)
        dx = Bounded(value, _near_by(terms) if winograds else terms, spread, dtype)
    if mask[1]:
        value, terms, spread = _product(gradient(1), grad, x)
        largest = terms.amax((2, 3), keepdim=True).expand_as(terms) if winograds and terms.numel() else terms
        dweight = Bounded(value, largest, spread, dtype)
    return dx, dweight, aten.sum(grad, [0, 2, 3]) if mask[2] else None


@_rule(aten.native_layer_norm)
def _layer_norm(func: Any, x: Any, shape: list[int], weight: Any, bias: Any, eps: float) -> tuple[Any, ...]:
    dims = list(range(-len(shape), 0))
    mean = aten.mean(x, dims, True)
    centred = x - mean
    rstd = aten.rsqrt(aten.mean(centred * centred, dims, True) + eps)
    out = centred * rstd
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias), mean, rstd


@_rule(aten.native_layer_norm_backward)
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


@_rule(aten.index_put, aten.index_add)
def _put(func: Any, target: Any, *args: Any, **options: Any) -> Bounded:
    """Values written or added at indices; an addition is a sum like any other."""
    is_add = func.overloadpacket is aten.index_add
    place = 2 if is_add else 1
    added = is_add or (len(args) > 2 and bool(args[2]))
    (base, base_terms, base_size), (x, x_terms, x_size) = _sizes(target), _sizes(args[place])

    def call(into: Tensor, what: Tensor) -> Tensor:
        return func(into, *args[:place], what, *args[place + 1 :], **options)

    out, terms = call(base, x), call(base_terms, x_terms)
    if added:
        spread = call(base_size.square(), x_size.square()).sqrt()
        return Bounded(out, terms + call(magnitude(base), magnitude(x)), spread, _dtype(target, *args))
    return Bounded(out, terms, call(base_size, x_size), _dtype(target, *args))


@_rule(aten.masked_fill, aten.index_fill)
def _filled(func: Any, x: Bounded, *args: Any) -> Bounded:
    where, zero = args[:-1], torch.zeros_like(args[-1]) if isinstance(args[-1], Tensor) else 0.0
    return Bounded(func(x.value, *args), func(x.terms, *where, zero), func(x.spread, *where, zero), x.dtype_tested)


@_rule(aten.new_empty, aten.new_zeros, aten.empty_like, aten.zeros_like, aten.full_like, aten.new_full, aten.ones_like)
def _made(func: Any, x: Bounded, *args: Any, **options: Any) -> Tensor:
    made = func(x.value, *args, **options)
    return Bounded.of_input(made, x.dtype_tested) if made.is_floating_point() else made


@_rule(aten.copy_)
def _copied(func: Any, target: Bounded, source: Any, *args: Any) -> Bounded:
    value, terms, size = _sizes(source)
    for into, part in ((target.value, value), (target.terms, terms), (target.spread, size)):
        into.copy_(part)
    return target


@_rule(aten.max_pool2d_with_indices)
def _pooled(func: Any, x: Bounded, *window: Any) -> tuple[Bounded, Tensor]:
    out, index = func(x.value, *window)
    terms, spread = (func(part, *window)[0] for part in (x.terms, x.spread))
    return Bounded(out, terms, spread, x.dtype_tested), index


@_rule(aten.max_pool2d_with_indices_backward)
def _pooled_backward(
    func: Any, grad: Any, x: Bounded, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int],
    ceil_mode: bool, index: Tensor,
) -> Bounded:  # fmt: skip
    """Every pixel that roundings could make its window's maximum may get the window's gradient, or lose it."""
    g, terms, size = _sizes(grad)
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
    shares = rivals * _as_terms(g, x.dtype_tested).flatten(2)[:, :, None]
    padded = [side + 2 * pad for side, pad in zip(x.value.shape[2:], padding)]
    back = F.fold(shares.flatten(1, 2), padded, **shape)
    rows, columns = (slice(pad, pad + side) for side, pad in zip(x.value.shape[2:], padding))
    return Bounded(out, out_terms + back[:, :, rows, columns], squares.sqrt(), x.dtype_tested)
