"""Contracts at their edges: nested tensors, huge numbers, gradients' values, what can't be written to, mixed halves."""

import pytest
import torch
from torch import Tensor

import hia_kernels
from hia_kernels import testing
from hia_kernels.core import registration
from hia_kernels.core.checks import FLOATS
from tests.inputs import OPS, differentiable, small_inputs
from tests.ops.test_contract import CALLS, F32, called, called_with_fakes, inputs_of_call


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("op", OPS)
def test_nested_tensors_are_refused(op, layout):
    inputs = inputs_of_call(op)
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    for name, x in inputs.items():
        if isinstance(x, Tensor):
            with pytest.raises(TypeError, match=f"^hia::{op}: {name} must be a dense tensor, got a nested one$"):
                getattr(hia_kernels, op)(**{**inputs, name: nested})


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("cross_attention", {"max_seqlen_q": 2**63}),
        ("conv_norm_act", {"stride": 2**70}),
        ("row_softmax", {"scale": 10**400}),
    ],
)
def test_numbers_that_no_schema_holds(op, change):
    (name,) = change
    with pytest.raises(ValueError, match=f"^hia::{op}: {name} must fit in "):
        getattr(hia_kernels, op)(**{**small_inputs(op, F32), **change})


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("_bwd") and "output_mask" in CALLS[name]])
def test_output_mask_has_an_entry_for_each_gradient(name):
    overload, arguments = registration.overload(name), CALLS[name]
    mask = arguments["output_mask"]
    for wrong in (mask[:-1], [*mask, True], []):
        for call in (called, called_with_fakes):
            error = call(overload, {**arguments, "output_mask": wrong})
            assert isinstance(error, ValueError)
            assert str(error) == f"hia::{name}: output_mask must have {len(mask)} entries, got {len(wrong)}"


WRONG_VALUES = [
    ("cross_attention_bwd", "cu_seqlens_q", lambda x: x + 1, "cu_seqlens_q must start at 0"),
    ("cross_attention_bwd", "max_seqlen_k", lambda x: x - 1, "max_seqlen_k must be at least the longest sequence"),
    ("inject_rows_bwd", "row_idx", lambda x: x - 100, r"row_idx must be in \[0, "),
    ("norm_linear_bwd", "row_idx", lambda x: x + 100, r"row_idx must be in \[0, "),
    ("condition_queries_bwd", "row_idx", lambda x: x + 100, r"row_idx must be in \[0, "),
    ("stem_bwd", "std", lambda x: x * 0, "std must be finite and positive"),
]


@pytest.mark.parametrize(("name", "argument", "change", "message"), WRONG_VALUES)
def test_values_are_checked_in_gradients(name, argument, change, message):
    arguments = CALLS[name]
    with pytest.raises(ValueError, match=f"^hia::{name}: {message}"):
        registration.overload(name)(*{**arguments, argument: change(arguments[argument])}.values())


def test_nothing_is_written_where_it_can_not_be_told():
    """Refuse an inference tensor outside of inference mode, whose version can't be raised, and negative views."""
    rows = inputs_of_call("inject_rows")
    for name, call in (
        ("row_softmax_: scores", lambda x: hia_kernels.row_softmax_(x, 0.5)),
        ("inject_rows_: hidden", lambda x: hia_kernels.inject_rows_(**{**rows, "hidden": x})),
    ):
        before = rows["hidden"].clone()
        with torch.inference_mode():
            made = before.clone()
            call(made.clone())
        with pytest.raises(
            RuntimeError, match=f"^hia::{name} must not be an inference tensor outside of inference mode"
        ):
            call(made)
        assert torch.equal(made, before)
        negative = torch.complex(torch.zeros_like(before), -before).conj().imag
        assert negative.is_neg() and torch.equal(negative, before)
        with pytest.raises(ValueError, match=f"^hia::{name} must not be a negative view"):
            call(negative)
        assert torch.equal(negative, before)


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stream", FLOATS)
@pytest.mark.parametrize("weights", [F32, torch.float16, torch.bfloat16])
def test_any_residual_stream_under_autocast(stream, weights, autocast):
    """Compare with casting by hand: autocast leaves hidden alone, whatever it is, and casts the rest."""
    if stream == torch.float64:
        pytest.skip("fp64 is left alone, and mixes with nothing")
    inputs = inputs_of_call("inject_rows")
    inputs = {name: x.to(weights) if name in ("update", "weight", "bias") else x for name, x in inputs.items()}
    inputs["hidden"] = inputs["hidden"].to(stream)
    wrt = differentiable("inject_rows")
    cast = {name: x.to(autocast) if name in ("update", "weight", "bias") else x for name, x in inputs.items()}
    with torch.autocast("cpu", dtype=autocast):
        got = testing.forward_backward(hia_kernels.inject_rows, inputs, wrt)
    expected = testing.forward_backward(hia_kernels.inject_rows, cast, wrt)
    exact = {**cast, "hidden": inputs["hidden"].float()}
    plain = hia_kernels.inject_rows(**exact).to(stream)
    assert got["out"].dtype == stream and torch.equal(got["out"], plain)
    assert torch.equal(got["out"], expected["out"]) and torch.equal(got["dhidden"], expected["dhidden"])
    for name in ("dupdate", "dweight", "dbias"):
        assert torch.equal(got[name], expected[name].to(weights))
