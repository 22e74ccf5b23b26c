"""The tolerance policy: is a result as accurate as its dtype allows? Public, for tests of your own backends.

A result is compared with the reference run in higher precision (``exact``), and must pass two tests:

1. **Element by element**, ``|out - exact|`` is at most :data:`UNITS` roundings of the sum of the magnitudes of the
   terms that form the element, and of the stored value (:mod:`hia_kernels.core.rounding`), or twice as many as the
   worst element of the reference at the same dtype (``plain``) needs: where all terms are alike, the roundings of a
   long sum don't average out. This holds where terms cancel, and catches a single wrong element among millions.
2. **As a whole**, its root-mean-square error is at most twice plain's, and ``slack`` roundings more. This is much
   tighter where errors average out, and catches a sum in the wrong precision. Its roundings are relative to the result;
   a handful of outputs may all nearly cancel, so theirs are relative to their size with random signs. In fp32, where a
   rounding decides the branch of a ReLU or a pool, the gradients that depend on it are left to the first test.

Test a function against a reference with its gradients::

    from hia_kernels import testing

    expected = testing.expect(reference, inputs, ("x", "weight"), dtype=torch.bfloat16)
    expected.check(testing.forward_backward(mine, inputs, ("x", "weight")))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .core import rounding_layers as _layers  # noqa: F401  # importing these two registers every rule
from .core import rounding_rules as _rules  # noqa: F401
from .core.rounding import UNIT_ROUNDOFF, UNITS, Analysis, Bounded

__all__ = [
    "EXACT",
    "FP64_SLACK",
    "GRADIENT_SLACK",
    "OUT_SLACK",
    "UNITS",
    "UNIT_ROUNDOFF",
    "Expected",
    "analysed",
    "assert_close",
    "bounded",
    "dout_like",
    "expect",
    "forward_backward",
    "mismatch",
    "rel_rms",
    "upcast",
    "worst_index",
]

EXACT = {
    torch.float64: torch.float64,
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
OUT_SLACK, GRADIENT_SLACK = 2.0, 4.0  # roundings that an output's, or a gradient's, RMS error may have beyond plain's
# No reference is more exact than fp64, where plain has no error of its own: this allows sums of up to 1000 terms.
FP64_SLACK = 64.0
HANDFUL, CANCELLED = 64, 64  # what counts as few elements; ratio of terms to result from which a result cancels

Results = dict[str, Tensor]


def rel_rms(x: Tensor, exact: Tensor) -> float:
    """Compute the root mean square of ``x - exact`` over that of ``exact``, where ``exact`` is finite.

    Where ``exact`` is all zeros there is no scale and the error is absolute. NaN where ``x`` alone is NaN.

    Args:
        x: any shape and dtype.
        exact: same shape.
    """
    exact = _plain(exact)
    error, scale = _rms(x, exact), _size(exact)
    return error / (scale if scale > 0 else 1.0)


def _rms(x: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    difference = x[finite].double() - exact[finite].double()
    return torch.linalg.vector_norm(difference).item() / max(difference.numel(), 1) ** 0.5


def _size(x: Tensor) -> float:
    finite = x[x.isfinite()].double()
    return torch.linalg.vector_norm(finite).item() / max(finite.numel(), 1) ** 0.5


def worst_index(x: Tensor, exact: Tensor) -> str:
    """Name the element where ``x`` is farthest from ``exact``, and the two values there."""
    return _element_at(x, exact, (x.double() - exact.double()).abs())


def _element_at(x: Tensor, exact: Tensor, distance: Tensor) -> str:
    if exact.numel() == 0:
        return "nowhere (empty)"
    distance = distance.nan_to_num(nan=-1.0)  # two equal infinities differ by NaN
    index = tuple(int(i) for i in torch.unravel_index(distance.argmax(), exact.shape))
    return f"{list(index)}: {x[index].item():.6g} instead of {exact[index].item():.6g}"


def mismatch(
    name: str,
    out: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    dtype: torch.dtype,
    slack: float = OUT_SLACK,
) -> str | None:
    """Say why ``out`` is not close enough to ``exact``; None if it is.

    Args:
        name: of the tensor, for the message.
        out: what is tested.
        exact: the reference in higher precision. If its inputs were :func:`analysed` it carries its own roundings; a
            plain tensor has only values: the module's first test is then skipped, and the second is too strict where
            all of a result's terms cancel.
        plain: the same reference run at ``dtype``.
        dtype: the dtype it was computed in.
        slack: roundings of ``dtype`` that the RMS error may have beyond twice plain's.
    """
    bounds, exact = exact if isinstance(exact, Bounded) else None, _plain(exact)
    wrong = _pattern_mismatch(out, exact, plain)
    if wrong is None and bounds is not None:
        wrong = _element_mismatch(out, exact, plain, bounds.bound())
    if wrong is not None:
        return f"{name}: {wrong}"
    if not plain.is_floating_point():
        return None
    scale = _scale(exact, bounds)
    limit = 2 * _rms(plain, exact) / scale + slack * UNIT_ROUNDOFF[dtype]
    if bounds is not None and bounds.undecided and dtype in (torch.float32, torch.float64):
        limit = max(limit, _size(bounds.bound()) / scale)  # a branch may be ours alone; in 16 bits plain takes as many
    if not math.isfinite(limit):
        return f"{name}: the plain reference is not finite where the truth is; it bounds nothing"
    error = _rms(out, exact) / scale
    if not error <= limit:  # a NaN error is no pass
        return f"{name}: rel-RMS {error:.2e} > {limit:.2e}; worst at {worst_index(out, exact)}"
    return None


def _scale(exact: Tensor, bounds: Bounded | None) -> float:
    """Choose what an RMS error is relative to: the result's own size, or its size had its terms random signs.

    The latter where nearly all of it cancels. A few elements may cancel by chance, many of them only by design.
    """
    if bounds is None:
        return _size(exact) or 1.0
    return max(_size(exact), _size(bounds.spread) / (1 if exact.numel() < HANDFUL else CANCELLED)) or 1.0


def _pattern_mismatch(out: Tensor, exact: Tensor, plain: Tensor) -> str | None:
    if out.shape != exact.shape:
        return f"shape {tuple(out.shape)} != {tuple(exact.shape)}"
    if out.dtype != plain.dtype:
        return f"{out.dtype} != {plain.dtype}"
    if not plain.is_floating_point():  # an index, a count: right or wrong
        return None if torch.equal(out, exact) else f"integers differ; {worst_index(out, exact)}"
    if not torch.equal(out.isnan(), exact.isnan()):
        return "NaN pattern differs"
    infinite = exact.isinf()
    if not torch.equal(out.isinf(), infinite):
        return "Inf pattern differs"
    if not torch.equal(out[infinite] > 0, exact[infinite] > 0):
        return "sign of Inf differs"
    return None


def _element_mismatch(out: Tensor, exact: Tensor, plain: Tensor, bound: Tensor) -> str | None:
    """Describe the elements farther away than their terms' roundings or plain's worst allow; None if there are none.

    A bound that overflowed bounds nothing.
    """
    unknown = int((bound.isnan() & exact.isfinite()).sum())
    if unknown:
        return f"the analysis bounds {unknown} of {out.numel()} elements by nan: nothing can be said of them"
    excess = _ratios(out, exact, bound)
    allowed = max(1.0, 2 * _largest(_ratios(plain, exact, bound)))
    beyond = excess > allowed
    if not bool(beyond.any()):
        return None
    worst = UNITS * _largest(excess)
    return (
        f"{int(beyond.sum())} of {out.numel()} elements beyond {UNITS * allowed:.3g} roundings of their terms, the "
        f"worst by {worst:.3g}; {_element_at(out, exact, excess.nan_to_num(posinf=1e308))}"
    )


def _ratios(x: Tensor, exact: Tensor, bound: Tensor) -> Tensor:
    """Divide errors by their bounds; 0 where there is no error, or the bound overflowed."""
    error = (x.double() - exact.double()).abs()
    return torch.where((error > 0) & exact.isfinite(), error / bound.double(), 0.0).nan_to_num(nan=0.0, posinf=math.inf)


def _largest(ratios: Tensor) -> float:
    return ratios.max().item() if ratios.numel() else 0.0


def assert_close(
    name: str,
    out: Tensor,
    exact: Tensor,
    plain: Tensor,
    *,
    dtype: torch.dtype,
    slack: float = OUT_SLACK,
) -> None:
    """Raise AssertionError with what :func:`mismatch` finds; its arguments.

    Raises:
        AssertionError: ``out`` is not close enough to ``exact``.
    """
    problem = mismatch(name, out, exact, plain, dtype=dtype, slack=slack)
    if problem is not None:
        raise AssertionError(problem)


def upcast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert every floating tensor to ``dtype``; anything else stays."""
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def dout_like(out: Tensor, seed: int) -> Tensor:
    """Draw an incoming gradient: bf16 numbers whatever the dtype, so that all precisions get the same input.

    Args:
        out: what it is the gradient of.
        seed: of the random numbers.

    Returns:
        Shape, dtype and device of ``out``.
    """
    values = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.bfloat16().to(out.device, out.dtype)


def forward_backward(
    function: Callable[..., Any],
    inputs: Mapping[str, Any],
    differentiable: Iterable[str] = (),
    names: tuple[str, ...] = ("out", "lse"),
) -> Results:
    """Run a function and its backward with :func:`dout_like` gradients.

    Args:
        function: takes ``inputs`` by name, returns a tensor or a tuple of tensors.
        inputs: its arguments.
        differentiable: names of the arguments to differentiate in; those that are None or not floating are left out.
        names: of the outputs, in their order.

    Returns:
        The outputs by name, and ``d<argument>`` for every argument differentiated in.
    """
    leaves = _leaves(inputs, differentiable)
    return _results(function, {**inputs, **leaves}, leaves, names)


def _leaves(inputs: Mapping[str, Any], differentiable: Iterable[str]) -> dict[str, Tensor]:
    differentiable = tuple(differentiable)
    unknown = [name for name in differentiable if name not in inputs]
    if unknown:
        raise ValueError(f"hia_kernels.testing: differentiable must name arguments among {list(inputs)}, got {unknown}")
    found = {name: inputs[name] for name in differentiable if isinstance(inputs[name], Tensor)}
    return {name: x.detach().requires_grad_() for name, x in found.items() if x.is_floating_point()}


def _results(
    function: Callable[..., Any], arguments: Mapping[str, Any], leaves: dict[str, Tensor], names: tuple[str, ...]
) -> Results:
    outs = function(**arguments)
    outs = tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)
    if len(outs) > len(names) or not all(isinstance(out, Tensor) for out in outs):
        kinds = ", ".join(type(out).__name__ for out in outs)
        raise ValueError(f"hia_kernels.testing: names must name every output, tensors all, got {names} for {kinds}")
    named = dict(zip(names, outs, strict=False))
    results = {name: out.detach() for name, out in named.items()}
    reached = [out for out in named.values() if out.requires_grad]
    if reached and leaves:
        douts = [_dout(out, seed) for seed, out in enumerate(reached)]
        grads = torch.autograd.grad(reached, list(leaves.values()), douts, allow_unused=True)
        found = (torch.zeros_like(_plain(x)) if grad is None else grad for x, grad in zip(leaves.values(), grads))
    else:  # no sequence has a key, say
        found = (torch.zeros_like(_plain(x)) for x in leaves.values())
    return results | {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


def _plain(x: Tensor) -> Tensor:
    return x.value if isinstance(x, Bounded) else x


def _dout(out: Tensor, seed: int) -> Tensor:
    if not isinstance(out, Bounded):
        return dout_like(out, seed)
    return Bounded.of_input(dout_like(out.value, seed), out.analysis)


@dataclass(frozen=True)
class Expected:
    """Results of a reference for one call, with the tolerance of each.

    Attributes:
        exact: the reference's results in higher precision, by name: outputs, and "d" and the argument's name; each
            with what roundings can do to it (:class:`hia_kernels.core.rounding.Bounded`).
        plain: the reference's results at ``dtype``.
        dtype: what is tested.
        slacks: by name, where it isn't :data:`OUT_SLACK` or :data:`GRADIENT_SLACK`.
    """

    exact: Results
    plain: Results
    dtype: torch.dtype
    slacks: Mapping[str, float] = field(default_factory=dict)

    def problem(self, name: str, out: Tensor) -> str | None:
        """Say why ``out`` is not close enough to the result of that name; None if it is."""
        slack = self.slacks.get(name, GRADIENT_SLACK if name.startswith("d") else OUT_SLACK)
        return mismatch(name, out, self.exact[name], self.plain[name], dtype=self.dtype, slack=slack)

    def check(self, results: Mapping[str, Tensor]) -> None:
        """Compare all results.

        Raises:
            AssertionError: one is missing, is not expected, or is not close enough.
        """
        if set(results) != set(self.plain):
            raise AssertionError(f"results must be {sorted(self.plain)}, got {sorted(results)}")
        problems = [wrong for name in results if (wrong := self.problem(name, results[name])) is not None]
        if problems:
            raise AssertionError("; ".join(problems))


def expect(
    reference: Callable[..., Any],
    inputs: Mapping[str, Any],
    differentiable: Iterable[str] = (),
    *,
    dtype: torch.dtype,
    names: tuple[str, ...] = ("out", "lse"),
) -> Expected:
    """Run a reference as it is, in higher precision, and with its roundings analysed.

    Args:
        reference: plain PyTorch; takes ``inputs`` by name, returns a tensor or a tuple of tensors.
        inputs: its arguments, floating tensors at ``dtype`` (statistics may be fp32 beside halves).
        differentiable: names of the arguments to differentiate in.
        dtype: what is tested: float64, float32, float16 or bfloat16.
        names: of the outputs, in their order.

    Raises:
        NotImplementedError: the reference uses an operator without a rule for its roundings.
    """
    differentiable = tuple(differentiable)
    plain = forward_backward(reference, inputs, differentiable, names)
    wrapped = analysed(inputs, dtype)
    leaves = {name: wrapped[name].requires_grad_() for name in _leaves(inputs, differentiable)}
    exact = _results(reference, wrapped, leaves, names)
    return Expected(exact, plain, dtype, dict.fromkeys(plain, FP64_SLACK) if dtype == torch.float64 else {})


def analysed(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert every floating tensor to higher precision, and let it carry the analysis of its roundings.

    Args:
        inputs: arguments by name.
        dtype: what is tested: float64, float32, float16 or bfloat16.

    Returns:
        The arguments; run a reference on them for the ``exact`` of :func:`assert_close`.
    """
    analysis = Analysis(_tested(dtype))
    return {name: _wrapped(x, analysis) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def bounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert one floating tensor as :func:`analysed` does; others come back as they are."""
    return _wrapped(x, Analysis(_tested(dtype)))


def _wrapped(x: Tensor, analysis: Analysis) -> Tensor:
    return Bounded.of_input(x.detach().to(EXACT[analysis.dtype]), analysis) if x.is_floating_point() else x


def _tested(dtype: torch.dtype) -> torch.dtype:
    if dtype not in EXACT:
        expected = ", ".join(str(one).removeprefix("torch.") for one in EXACT)
        raise ValueError(f"hia_kernels.testing: dtype must be among {expected}, got {dtype}")
    return dtype
