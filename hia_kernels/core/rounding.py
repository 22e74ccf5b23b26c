"""Running error analysis over plain PyTorch: how far roundings alone can move a result.

A :class:`Bounded` tensor passes through a reference like any other tensor and carries, element by element, two sizes
beside its value:

- ``terms``, the sum of the magnitudes of everything added up to form it, through every step so far. Times the unit
  roundoff, it bounds to first order how far the roundings of all sums and products can have moved the value (Higham,
  "Accuracy and Stability of Numerical Algorithms", 2nd ed., sections 3.1, 3.5 and, for running bounds, 3.3). A sum
  that cancels has a small value and large terms.
- ``spread``, the size that the value would have if the terms had random signs: the root of the sum of their squares.
  Times the unit roundoff, it is how far independent roundings of stored values move a sum, as in a probabilistic
  analysis (Higham and Mary, SIAM J. Sci. Comput. 41, 2019).

Gradients are analysed too: PyTorch's autograd runs on top and calls the same operators. An operator without a rule is
decomposed by PyTorch's own table, or is an error. Where rounding decides between two branches (ReLU near 0, two
maxima in one pooling window), the terms cover all that either branch would give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

UNITS = 6  # roundings that a result may be off by
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

aten, prims = torch.ops.aten, torch.ops.prims
Sizes = tuple[Tensor, Tensor, Tensor]  # value, terms, spread; the last two in fp32, which is precise enough


def accumulation_roundoff(dtype: torch.dtype) -> float:
    """Return the unit roundoff of sums whose operands are of ``dtype``: halves are added up in fp32."""
    return UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]


@dataclass(eq=False)
class Analysis:
    """State that the tensors of one run of a reference share.

    Attributes:
        dtype: of the results that are tested.
        undecided: whether a rounding decides some branch.
    """

    dtype: torch.dtype
    undecided: bool = False


class Bounded(Tensor):
    """Tensor with its ``terms`` and its ``spread``; see the module."""

    value: Tensor
    terms: Tensor
    spread: Tensor
    analysis: Analysis
    undecided: bool  # whether a rounding may have decided a branch before

    @staticmethod
    def __new__(cls, value: Tensor, terms: Tensor, spread: Tensor, analysis: Analysis) -> Bounded:
        made = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=value.device,
        )
        made.value, made.terms, made.spread = value, terms, spread
        made.analysis, made.undecided = analysis, analysis.undecided
        return made

    @classmethod
    def of_input(cls, value: Tensor, analysis: Analysis) -> Bounded:
        """Wrap an argument: it is exact, and its spread is its magnitude."""
        return cls(value, torch.zeros_like(value, dtype=torch.float32), magnitude(value), analysis)

    def unit(self) -> Tensor:
        """Compute one rounding of a result, element by element: of its terms and of the stored value.

        Terms of halves are added up in fp32.

        Returns:
            Shape of the value, fp32, not negative.
        """
        stored = torch.maximum(self.spread, magnitude(self.value))
        unit = UNIT_ROUNDOFF[self.analysis.dtype]
        # Below fp32's normal range a value may be flushed to zero, as on GPUs, and be multiplied afterwards. Sizes are
        # in fp32, so the same limit holds for fp64. fp16, whose range is short, keeps its subnormals.
        is_short = self.analysis.dtype == torch.float16
        least = torch.finfo(torch.float16 if is_short else torch.float32).smallest_normal * (unit if is_short else 256)
        return accumulation_roundoff(self.analysis.dtype) * self.terms + unit * stored + least

    def bound(self) -> Tensor:
        """Compute how far :data:`UNITS` roundings can lead from the value.

        It is twice that where the value has the dtype under test, because the value then has roundings of its own.
        """
        return (UNITS if self.value.dtype != self.analysis.dtype else 2 * UNITS) * self.unit()

    def __repr__(self, **_options: Any) -> str:
        return f"Bounded({self.value!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        known = RULES.get(func.overloadpacket)
        if known is not None:
            return known(func, *args, **kwargs)
        if _is_in_place(func):
            return _written(func, *args, **kwargs)
        parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if func in decomposition_table:
            return decomposition_table[func](*args, **kwargs)
        found = func(*tree_map(value_of, args), **tree_map(value_of, kwargs))
        if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_flatten(found)[0]):
            raise NotImplementedError(
                f"hia_kernels.testing: no rule says what roundings do in {func}; write the reference in operators that "
                "have one: products, sums, convolutions, norms, softmax, elementwise functions"
            )
        return found  # indices, comparisons


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Bounded) else x


def magnitude(x: Any) -> Any:
    """Take the magnitude of a tensor in fp32, or of a number.

    It is 0 where it is infinite: a mask of -inf is exact, and 0 times it counts as 0.
    """
    if not isinstance(x, Tensor):
        return abs(x) if math.isfinite(x) else 0.0
    if not x.is_floating_point():
        return x.float().abs()
    return torch.where(x.isinf(), 0.0, x.abs()).float()


def sizes_of(x: Any) -> tuple[Any, Any, Any]:
    """Return value, terms and size of an operand; a plain tensor or number is exact."""
    if isinstance(x, Bounded):
        return x.value, x.terms, torch.maximum(x.spread, magnitude(x.value))
    if isinstance(x, Tensor):
        return x, torch.zeros_like(x, dtype=torch.float32), magnitude(x)
    return x, 0.0, magnitude(x)


def of_parts(parts: Sequence[Tensor], analysis: Analysis) -> Bounded:
    value, terms, spread = parts
    return Bounded(value, terms, spread, analysis)


def analysis_of(*operands: Any) -> Analysis:
    return next(x.analysis for x in operands if isinstance(x, Bounded))


RULES: dict[Any, Callable[..., Any]] = {}


def rule(*packets: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def _is_in_place(func: Any) -> bool:
    first = func._schema.arguments[:1]
    return bool(first) and first[0].alias_info is not None and first[0].alias_info.is_write


def _written(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply an in-place operator: copy the result of its out-of-place form into the first argument."""
    name = func._schema.name.partition("::")[2].removesuffix("_")
    if not isinstance(target, Bounded) or not hasattr(aten, name):
        raise NotImplementedError(f"hia_kernels.testing: no rule says what roundings do in {func} on a plain tensor")
    return _copied(func, target, getattr(getattr(aten, name), func._overloadname)(target, *args, **kwargs))


# Operators that move elements and compute nothing: each part moves alike.
@rule(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten.permute,
    aten.transpose,
    aten.t,
    aten.expand,
    aten.unsqueeze,
    aten.squeeze,
    aten.select,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.unbind,
    aten.cat,
    aten.stack,
    aten.clone,
    aten.detach,
    aten.alias,
    aten.index,
    aten.index_select,
    aten.gather,
    aten.slice_backward,
    aten.select_backward,
    aten.constant_pad_nd,
    aten.index_copy,
    aten.where,
    aten.flip,
    aten.diagonal,
    aten.as_strided,
    aten.lift_fresh,
    aten.repeat,
    aten.avg_pool2d_backward,
    prims.broadcast_in_dim,
    prims.where,
    aten.roll,
    aten.fill,
)
def _moved(func: Any, *args: Any, **kwargs: Any) -> Any:
    leaves, structure = tree_flatten((args, kwargs))
    parts = []
    for part in range(3):
        chosen = [sizes_of(leaf)[part] if _is_float(leaf) else leaf for leaf in leaves]
        inner_args, inner_kwargs = tree_unflatten(chosen, structure)
        parts.append(func(*inner_args, **inner_kwargs))
    dtype = analysis_of(*leaves)
    if isinstance(parts[0], Tensor):
        return of_parts(parts, dtype)
    return type(parts[0])(of_parts(each, dtype) for each in zip(*parts))


def _is_float(x: Any) -> bool:
    """Tell whether the leaf is moved: a floating tensor, or a constant to fill with."""
    return isinstance(x, float) or (isinstance(x, Tensor) and x.is_floating_point())


@rule(aten._to_copy, prims.convert_element_type)
def _converted(func: Any, x: Bounded, *args: Any, **options: Any) -> Any:
    """Convert, but keep the digits: the analysis is in exact arithmetic."""
    value = func(x.value, *args, **options)
    if not value.is_floating_point():
        return value
    if torch.finfo(value.dtype).bits < torch.finfo(x.value.dtype).bits:
        value = x.value.clone()
    return Bounded(value, x.terms, x.spread, x.analysis)


@rule(aten.neg, prims.neg)
def _negated(func: Any, x: Bounded) -> Bounded:
    return Bounded(-x.value, x.terms, x.spread, x.analysis)


@rule(aten.index_put, aten.index_add)
def _put(func: Any, target: Any, *args: Any, **options: Any) -> Bounded:
    """Write or add values at indices; an addition is a sum like any other."""
    is_add = func.overloadpacket is aten.index_add
    place = 2 if is_add else 1
    added = is_add or (len(args) > 2 and bool(args[2]))
    (base, base_terms, base_size), (x, x_terms, x_size) = sizes_of(target), sizes_of(args[place])

    def call(into: Tensor, what: Tensor) -> Tensor:
        return func(into, *args[:place], what, *args[place + 1 :], **options)

    out = call(base, x)
    alpha = abs(options.pop("alpha", 1))
    x_terms, x_size, x = alpha * x_terms, alpha * x_size, alpha * x
    terms = call(base_terms, x_terms)
    if added:
        spread = call(base_size.square(), x_size.square()).sqrt()
        return Bounded(out, terms + call(magnitude(base), magnitude(x)), spread, analysis_of(target, *args))
    return Bounded(out, terms, call(base_size, x_size), analysis_of(target, *args))


@rule(aten.masked_fill, aten.index_fill)
def _filled(func: Any, x: Bounded, *args: Any) -> Bounded:
    where, zero = args[:-1], torch.zeros_like(args[-1]) if isinstance(args[-1], Tensor) else 0.0
    return Bounded(func(x.value, *args), func(x.terms, *where, zero), func(x.spread, *where, zero), x.analysis)


@rule(aten.new_empty, aten.new_zeros, aten.empty_like, aten.zeros_like, aten.full_like, aten.new_full, aten.ones_like)
def _made(func: Any, x: Bounded, *args: Any, **options: Any) -> Tensor:
    made = func(x.value, *args, **options)
    return Bounded.of_input(made, x.analysis) if made.is_floating_point() else made


@rule(aten.copy_)
def _copied(func: Any, target: Bounded, source: Any, *args: Any) -> Bounded:
    if not isinstance(target, Bounded):
        raise NotImplementedError(
            "hia_kernels.testing: a reference writes into a tensor that was made without its inputs; make it of one of "
            "them, x.new_zeros(...), or join results with torch.cat or torch.stack"
        )
    value, terms, size = sizes_of(source)
    for into, part in ((target.value, value), (target.terms, terms), (target.spread, size)):
        into.copy_(part)
    return target
