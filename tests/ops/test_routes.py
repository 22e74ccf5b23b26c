"""Every row of every table, forced: it serves the call and says so, or raises with all its reasons."""

from functools import partial

import pytest
import torch

import hia_kernels
from hia_kernels import last_backend, use_backend
from hia_kernels.core import backend
from hia_kernels.testing import expect
from tests.inputs import OPS, differentiable, inputs_of, small_inputs
from tests.ops.harness import forward_backward

F32 = torch.float32
ROUTES = [(op, row.name) for op in OPS for row in backend.TABLES[op].backends]
FITTING = {  # what the small inputs are not: rows of the extension have panels of 32 channels
    ("conv_norm_act", "native"): lambda: inputs_of("conv_norm_act")((9, 8), F32, channels=(32, 64)),
    ("stem", "native"): lambda: inputs_of("stem")((20, 17), F32, out_channels=32),
}


def reference(op, **arguments):
    """Return the op's reference, as its public function returns it."""
    outs = backend.TABLES[op].row("reference").functions[op](**arguments)
    return outs[0] if op == "latent_attention" else outs


def inputs_for(op, name):
    return FITTING[op, name]() if (op, name) in FITTING else small_inputs(op, F32)


@pytest.mark.parametrize(("op", "name"), ROUTES)
def test_a_forced_row_serves_or_says_why_not(op, name):
    row, inputs = backend.TABLES[op].row(name), inputs_for(op, name)
    reasons = row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)
    if reasons:
        with use_backend(name), pytest.raises(NotImplementedError) as raised:
            getattr(hia_kernels, op)(**inputs)
        listed = "; ".join(f"{name}: {reason}" for reason in reasons)
        assert str(raised.value) == f"hia::{op}: HIA_BACKEND={name} can't run this call: {listed}"
        return
    served = []

    def watched(**arguments):
        outs = getattr(hia_kernels, op)(**arguments)
        served.append(last_backend(op))
        return outs

    with use_backend(name):
        got = forward_backward(op, watched, inputs)
    served.append(last_backend(op))
    gradients = any(function.endswith("_bwd") for function in row.functions)
    assert served[0] == name and (served[1] == name) == gradients
    assert got.keys() >= {"out"}
    expect(partial(reference, op), inputs, differentiable(op), dtype=F32).check(got)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_the_first_row_that_would_serve_forced(op):
    """Ask the rows' own reasons, one by one."""
    table, inputs = backend.TABLES[op], small_inputs(op, F32)
    first = next(row for row in table.backends if not row.refusals(op, inputs, forced=False))
    with use_backend("auto"):
        getattr(hia_kernels, op)(**inputs)
    assert last_backend(op) == first.name


@pytest.mark.parametrize("name", backend.backend_names()[1:])
def test_forcing_for_a_whole_model(name, monkeypatch):
    """Run auto for ops without the row: no name makes another op impossible."""
    monkeypatch.setenv("HIA_BACKEND", name.upper())
    for op in OPS:
        table, inputs = backend.TABLES[op], small_inputs(op, F32)
        if table.row(name) is None:
            getattr(hia_kernels, op)(**inputs)
            assert last_backend(op) not in (None, name)
