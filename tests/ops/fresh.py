"""Results that are written to: what training code may do with an op's output and gradients, in every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import backend
from hia_kernels.testing import dout_like
from tests.inputs import Inputs, inputs_of, small_inputs
from tests.ops.harness import assert_fresh, leaves

SAVED = "one of the variables needed for gradient computation has been modified by an inplace operation"
# by op: sizes and options where some library's result lies as ours must, so that a view of it would do
SHAPES: dict[str, tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]] = {
    "linear": (((1,), {}), ((9, 1, 32), {"bias": False}), ((5, 8, 1), {})),
    "head_linear": tuple(
        (sizes, {"merge_heads": merge})
        for sizes in ((1, 1, 4, 5, 6), (2, 3, 1, 5, 6), (2, 3, 4, 5, 6))
        for merge in (False, True)
    ),
    "norm_linear": (((9,), {}), ((9, 1), {"bias": False})),
    "condition_queries": (((9, 1, 1), {}),),
    "inject_rows": (((9, 0), {}), ((9, 1), {"bias": False})),
    "cross_attention": tuple(
        (lengths, {"heads": heads, "head_dim": head_dim})
        for lengths in (([7], [9]), ([5, 5], [4, 4]), ([7, 3, 0], [9, 2, 4]))
        for heads, head_dim in ((1, 32), (2, 32), (2, 144))
    ),
    "latent_attention": (((1, 16, (5,)), {}), ((6, 1, (5, 4)), {}), ((6, 16, (0, 4)), {})),
    "row_softmax": (((1, 9), {}), ((5, 1), {}), ((5, 9), {"out_dtype": torch.float16})),
    "conv_norm_act": tuple(
        (
            (size,),
            {"kernel": kernel, "stride": stride, "activation": activation, "residual": residual, "channels": channels},
        )
        for size in ((5, 4), (1, 1))
        for kernel, stride, activation, residual, channels in (
            (1, 1, "none", False, (8, 8)),
            (1, 2, "gelu", True, (8, 8)),
            (3, 1, "relu", False, (5, 7)),
            (3, 2, "none", False, (8, 8)),
            (3, 1, "none", True, (32, 32)),
            (1, 1, "none", False, (512, 8)),
            (1, 1, "relu", True, (512, 1)),
        )
    ),
    "stem": tuple(
        (((11, 12),), {"pool": pool, "out_channels": channels}) for pool in (1, 3) for channels in (1, 4, 32)
    ),
}


def calls(op: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Inputs]:
    """Draw the op's calls."""
    yield small_inputs(op, dtype, device)
    for sizes, options in SHAPES[op]:
        yield inputs_of(op)(*sizes, dtype, device, **options)


def assert_can_be_written_to(op: str, name: str, inputs: Inputs) -> bool:
    """Run a row forward and backward, write to what it returns, and check that nothing else changes.

    Returns:
        Whether the row serves the call.
    """
    row, function = backend.TABLES[op].row(name), op
    if op == "cross_attention":
        function = "cross_attention_with_lse" if row is None or f"{op}_with_lse" in row.functions else op
    if row and (row.unavailable_reasons() or row.unsupported_reasons(function, **inputs)):
        return False
    before = {key: x.detach().clone() for key, x in inputs.items() if isinstance(x, Tensor)}
    with use_backend(name):
        _write(op, getattr(hia_kernels, function), inputs)
    for key, x in before.items():
        assert torch.equal(inputs[key].nan_to_num(), x.nan_to_num()), f"{key} was written to"
    return True


def _write(op: str, public: Any, inputs: Inputs) -> None:
    with torch.no_grad():
        for out in _tuple(public(**inputs)):
            assert_fresh(inputs, [out], {})
            out.fill_(float("nan"))
    wrt = leaves(op, inputs)
    outs = _tuple(public(**{**inputs, **wrt}))
    douts = [dout_like(out, seed) for seed, out in enumerate(outs)]
    try:
        grads = torch.autograd.grad(outs, list(wrt.values()), douts, retain_graph=True)
    except NotImplementedError:  # the row has no such backward
        for out in outs:
            out += 1
        return
    expected = [grad.clone() for grad in grads]
    named = dict(zip(wrt, grads, strict=True))
    if op == "inject_rows":
        named.pop("hidden")  # is dout, as an addition's gradient in PyTorch
    assert_fresh({**inputs, **{f"dout {place}": dout for place, dout in enumerate(douts)}}, outs, named)
    for grad in named.values():
        grad.fill_(float("nan"))
    for out in outs:
        out += 1
    try:
        again = torch.autograd.grad(outs, list(wrt.values()), douts)
    except RuntimeError as error:
        assert SAVED in str(error)  # the op keeps its output, and PyTorch has noticed
        return
    for key, x, y in zip(wrt, again, expected, strict=True):
        assert torch.equal(x, y), f"d{key} has changed"


def _tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)
