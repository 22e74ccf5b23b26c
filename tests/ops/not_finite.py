"""NaN and infinities in the arguments: what they reach in the reference, they reach in every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hia_kernels
from hia_kernels import last_backend, use_backend
from hia_kernels.testing import Results
from tests.inputs import Inputs, inputs_of
from tests.ops.harness import forward_backward

NAN, INF = float("nan"), float("inf")
VALUES = (NAN, INF, -INF)
PLACES: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "element": lambda x: tuple(size // 2 for size in x.shape),
    "row": lambda x: (x.shape[0] // 2,),
    "all": lambda x: (),
}


def poisoned(inputs: Inputs, name: str, place: str, value: float) -> Inputs:
    """Return the inputs with ``value`` in part of one of them."""
    x = inputs[name].detach().clone(memory_format=torch.contiguous_format)
    x[PLACES[place](x)] = value
    return {**inputs, name: x}


def spoilt_attention(lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, how: str, **sizes: Any) -> Inputs:
    """Draw a call of ``cross_attention`` that has ``how``: ``<argument>-<place>-<value>``, or what overflows."""
    inputs = inputs_of("cross_attention")(lengths_q, lengths_k, dtype, **sizes)
    if how == "overflow":
        return {**inputs, "q": inputs["q"] * 1e30, "k": inputs["k"] * 1e30}
    if how == "all-scores-minus-inf":
        return {**inputs, "q": inputs["q"] * 0 + 1e20, "k": inputs["k"] * 0 - 1e20}
    if how == "scale-nan":
        return {**inputs, "softmax_scale": NAN}
    name, place, value = how.split("-", 2)
    return poisoned(inputs, name, place, float(value))


SPOILT = (
    *(f"{name}-{place}-{value}" for name in "qkv" for place in PLACES for value in VALUES),
    "overflow",
    "all-scores-minus-inf",
    "scale-nan",
)


def run(op: str, function: Callable[..., Any], inputs: Inputs, backend: str) -> Results:
    """Run forward and backward, and check that the backend serves the forward."""
    served = []

    def watched(**arguments: Any) -> Any:
        outs = function(**arguments)
        served.append(last_backend(op))
        return outs

    with use_backend(backend):
        results = forward_backward(op, watched, inputs)
    assert served == [backend]
    return results


def assert_nothing_is_lost(got: Results, expected: Results, *, exactly: bool = False) -> None:
    """Check that nothing is finite that is not in the reference.

    Args:
        got: by name.
        expected: by the reference.
        exactly: whether NaN is where the reference has it and nowhere else. Other forms of the same sum may have
            ``inf - inf`` where the reference has infinity.
    """
    for name, reference in expected.items():
        lost = got[name].isfinite() & ~reference.isfinite()
        assert not lost.any(), f"{name}: {int(lost.sum())} of {lost.numel()} are finite and should not be"
        if exactly:
            differ = got[name].isnan() != reference.isnan()
            assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} differ in NaN"


def assert_attention_loses_nothing(inputs: Inputs, how: str, backend: str) -> None:
    """Compare ``cross_attention``, with its lse and without, with the reference's."""
    for function in (hia_kernels.cross_attention, hia_kernels.cross_attention_with_lse):
        got, expected = (run("cross_attention", function, inputs, name) for name in (backend, "reference"))
        # in Triton's dq the scale is a factor of what has no keys too
        exactly = how.endswith("nan") and (backend, how) != ("triton", "scale-nan")
        assert_nothing_is_lost(got, expected, exactly=exactly)
        if how == "all-scores-minus-inf" and "lse" in expected:
            assert torch.equal(got["lse"], expected["lse"])


def assert_op_loses_nothing(op: str, backend: str, inputs: Inputs, name: str, place: str, value: float) -> None:
    """Compare an op on inputs with ``value`` in one of them with the reference."""
    bad = poisoned(inputs, name, place, value)
    function = getattr(hia_kernels, op)
    got, expected = (run(op, function, bad, row) for row in (backend, "reference"))
    assert_nothing_is_lost(got, expected)
