"""Shared steps of every op's tests: run forward and backward, compare, compile, export, count FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hia_kernels import last_backend, testing
from hia_kernels.core import native
from tests.inputs import Inputs, differentiable

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]

Results = testing.Results


def with_dtypes(cases: Sequence[Any], in_halves: Collection[str]) -> list[Any]:
    """Give every case fp32, and fp16 and bf16 too if it is for a GPU or named ``in_halves``.

    For ops whose halves the CPU leaves to the reference: there, all cases in all dtypes would compare it with itself.
    """
    ids = {case.id for case in cases}
    assert ids >= set(in_halves), f"no case is {sorted(set(in_halves) - ids)}"
    return [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}".replace("torch.", ""), marks=case.marks)
        for case in cases
        for dtype in DTYPES
        if dtype == torch.float32 or case.marks or case.id in in_halves
    ]


def forward_backward(op: str, function: Callable[..., Any], inputs: Inputs) -> Results:
    """Return ``out``, ``lse`` where there is one, and ``d<argument>`` for every argument with a gradient.

    All of them must be tensors of their own: training code writes to results, and adds up gradients where they lie.
    """
    outs: list[Tensor] = []

    def watched(**kwargs: Any) -> Any:
        found = function(**kwargs)
        outs.extend(found if isinstance(found, tuple) else (found,))
        return found

    results = testing.forward_backward(watched, inputs, differentiable(op))
    assert_fresh(inputs, outs, {name: x for name, x in results.items() if name.startswith("d")})
    return results


def assert_fresh(inputs: Inputs, outs: Sequence[Tensor], grads: Mapping[str, Tensor]) -> None:
    """Check that results are contiguous and no views, and that results, gradients and inputs share no memory.

    The results are written to where they lie, as training code may, and keep their values.
    """
    for place, out in enumerate(outs):
        assert not out._is_view() and out._base is None, f"output {place} is a view: writing to it would raise"
        assert out.is_contiguous(), f"output {place} has strides {out.stride()}"
        out.mul_(1)
    owners = {_memory(x): name for name, x in inputs.items() if isinstance(x, Tensor)}
    for name, x in {**{f"output {place}": out for place, out in enumerate(outs)}, **grads}.items():
        if x.numel():
            assert _memory(x) not in owners, f"{name} shares memory with {owners[_memory(x)]}"
            owners[_memory(x)] = name


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def leaves(op: str, inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors to differentiate in, detached, with their strides."""
    found = {name: inputs[name] for name in differentiable(op) if inputs[name] is not None}
    return {name: x.detach().requires_grad_() for name, x in found.items() if x.is_floating_point()}


def assert_matches(
    op: str,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Inputs,
    dtype: torch.dtype,
    in_sequence: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Compare outputs and gradients of ``function`` with the reference, by the tolerance policy.

    On a GPU the reference may have served neither, for comparing it with itself would pass, except in fp64: kernels
    leave that to the reference's explicit backward, which is compared with PyTorch's differentiation.

    Args:
        op: name of the op.
        function: takes ``inputs`` by name.
        reference: likewise.
        inputs: by name.
        dtype: what is tested.
        in_sequence: by result, terms of the longest product that kernels add up one after another on a GPU, in fp32.
    """
    served = []

    def watched(**kwargs: Any) -> Any:
        outs = function(**kwargs)
        served.append(last_backend(op))
        return outs

    got = forward_backward(op, watched, inputs)
    served.append(last_backend(op))
    by_reference = {None, "reference"} & set(served)
    assert device_type(inputs) == "cpu" or dtype == torch.float64 or not by_reference, f"{op} was served by {served}"
    expected = testing.expect(reference, inputs, differentiable(op), dtype=dtype)
    if dtype == torch.float32 and device_type(inputs) != "cpu":
        usual = {name: testing.GRADIENT_SLACK if name.startswith("d") else testing.OUT_SLACK for name in in_sequence}
        slacks = {name: usual[name] + sequence_slack(terms) for name, terms in in_sequence.items()}
        expected = dataclasses.replace(expected, slacks={**expected.slacks, **slacks})
    expected.check(got)


def sequence_slack(terms: int) -> float:
    """Return the roundings in the root mean square of a sum of so many terms, added one after another.

    Partial sum k of terms of independent signs and size s has size s * sqrt(k), and its rounding, uniform within u of
    that, the variance u**2 * s**2 * k / 3. The variances add up to (u * s * n)**2 / 6, against a sum of s * sqrt(n):
    u * sqrt(n / 6). PyTorch's products, which the plain reference is made of, add up blocks and have less.
    """
    return (terms / 6) ** 0.5


def assert_backward_is_autograd_of_reference(
    op: str, function: Callable[..., Any], reference: Callable[..., Any], inputs: Inputs
) -> None:
    """Compare the explicit backward with PyTorch's differentiation of the reference, in fp64."""
    assert all(x.dtype == torch.float64 for x in leaves(op, inputs).values())
    assert_matches(op, function, reference, inputs, torch.float64)


def assert_identical(first: Results, second: Results) -> None:
    """Compare bit for bit; NaN equals NaN."""
    assert set(first) == set(second)
    for name, x in first.items():
        y = second[name]
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(), y.nan_to_num()), f"{name} differs"
        assert torch.equal(x.isnan(), y.isnan()), f"{name} differs in NaN"


def assert_repeatable(op: str, function: Callable[..., Any], inputs: Inputs) -> None:
    assert_identical(forward_backward(op, function, inputs), forward_backward(op, function, inputs))


def assert_default_dtype_changes_no_bit(op: str, function: Callable[..., Any], inputs: Inputs) -> None:
    """Run forward and backward as in a process that loads a model in 16 bits, and compare with fp32's bits."""
    expected = forward_backward(op, function, inputs)
    for default in HALVES:
        with default_dtype(default):
            got = forward_backward(op, function, inputs)
        assert_identical(got, expected)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Give new tensors this dtype, as loading a model does."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_compiles(op: str, function: Callable[..., Any], inputs: Inputs, backend: str = "aot_eager") -> None:
    """Compile to one graph, forward and backward, with the eager call's bits: the op is opaque to the compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: function(**kwargs), backend=backend, fullgraph=True)
    assert_identical(forward_backward(op, compiled, inputs), forward_backward(op, function, inputs))


def assert_exports(function: Callable[..., Any], inputs: Inputs) -> None:
    """Export: the program holds the op and none of its internals, and computes the same bits."""

    class Call(torch.nn.Module):
        def forward(self, **kwargs: Any) -> Any:
            return function(**kwargs)

    program = torch.export.export(Call(), (), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    kept = [target for target in targets if "getitem" not in target]
    assert len(kept) == 1 and kept[0].startswith("hia."), targets
    got, expected = program.module()(**inputs), function(**inputs)
    assert_identical(*(dict(enumerate(x if isinstance(x, tuple) else (x,))) for x in (got, expected)))


def assert_gradcheck(op: str, function: Callable[..., Any], inputs: Inputs) -> None:
    """Differentiate numerically through the public function, in fp64."""
    wrt = leaves(op, inputs)

    def call(*values: Tensor) -> Any:
        return function(**{**inputs, **dict(zip(wrt, values, strict=True))})

    with one_thread():
        assert torch.autograd.gradcheck(call, tuple(wrt.values()), nondet_tol=0.0)


def opcheck(op: str, overload: Any, inputs: Inputs, terms: float = 0.0) -> None:
    """Run torch.library's four tests, with gradients.

    Args:
        op: name of the op.
        overload: that is checked.
        inputs: by name.
        terms: largest sum of magnitudes behind a result or a gradient. Compiled, a product may take its operands in
            other strides, for which a library has another order of summation: each result may be :data:`UNITS`
            roundings of the terms away. By default as ``torch.testing`` allows, which knows of no sums.
    """
    close = {"atol": 2 * testing.UNITS * testing.UNIT_ROUNDOFF[torch.float32] * terms, "rtol": 1.3e-6} if terms else {}
    with one_thread():
        torch.library.opcheck(overload, tuple({**inputs, **leaves(op, inputs)}.values()), **close)


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, for hundreds of calls so small that waking a second thread takes longest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count a call with torch's counter: registered formulas for our ops, its own for PyTorch's."""
    with FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()


def flops_by_op(function: Callable[..., Any]) -> dict[str, int]:
    """Count FLOPs by the op's full name, e.g. ``hia.stem``."""
    with FlopCounterMode(display=False) as counter:
        function()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def assert_autocast(
    op: str,
    function: Callable[..., Any],
    inputs: Inputs,
    dtype: torch.dtype,
    *,
    cast: tuple[str, ...],
    out_dtype: torch.dtype,
) -> None:
    """Check autocast: fp32 in, the bits of casting ``cast`` by hand, ``out_dtype`` out, gradients in fp32."""
    by_hand = {name: x.to(dtype) if name in cast and x is not None else x for name, x in inputs.items()}
    with torch.autocast(device_type(inputs), dtype=dtype):
        got = forward_backward(op, function, inputs)
        expected = forward_backward(op, function, by_hand)
    assert got["out"].dtype == out_dtype
    for name, x in leaves(op, inputs).items():
        assert got[f"d{name}"].dtype == x.dtype == torch.float32, name
    gradients = {name: x.float() for name, x in expected.items() if name.startswith("d")}
    assert_identical(got, expected | gradients)


def product_row() -> str:
    """Return the row that serves a large product on this CPU."""
    return "cpu" if native.cpu_unavailable_reasons() else "native"


def skip_unless_here(backend: str) -> None:
    """Skip a test of the native extension where there is none, or where it is turned off."""
    reasons = native.cpu_unavailable_reasons() if backend == "native" else []
    if reasons:
        pytest.skip("; ".join(reasons))


def device_type(inputs: Inputs) -> str:
    return next(x for x in inputs.values() if isinstance(x, Tensor)).device.type
