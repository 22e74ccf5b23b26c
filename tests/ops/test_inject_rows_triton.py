"""The Triton kernels of ``hia::inject_rows``, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hia_kernels import inject_rows, inject_rows_, last_backend, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.inject_rows.reference import inject_rows_ref
from tests.compare import assert_close
from tests.inputs import inject_rows_inputs as make_inputs
from tests.ops.harness import (
    DTYPES,
    assert_autocast,
    assert_identical,
    assert_matches,
    assert_repeatable,
    forward_backward,
    opcheck,
    upcast,
)
from tests.ops.interpreter import loop_bounds_are_ints  # noqa: F401

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
triton_fwd = pytest.importorskip("hia_kernels.ops.inject_rows.triton_fwd")
pytestmark = pytest.mark.interpreter

OP = "inject_rows"
CASES = [
    pytest.param(40, 17, {}, id="some-rows"),
    pytest.param(33, 33, {"bias": False}, id="every-row-no-bias"),
    pytest.param(9, 0, {}, id="no-rows"),
    pytest.param(1, 1, {"channels": 16, "dim": 16}, id="one-token"),
    pytest.param(90, 71, {"channels": 100, "dim": 70}, id="ragged"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.fixture(params=[True, False], ids=["fused", "product-then-add"])
def route(request, monkeypatch):
    """Both ways to the same result, whatever the heuristic would choose."""
    monkeypatch.setattr(triton_fwd, "is_fused", lambda *_: request.param)


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, triton_device):
    assert_matches(OP, inject_rows, inject_rows_ref, make_inputs(tokens, rows, dtype, triton_device, **options), dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_agree_with_the_reference(route, dtype, triton_device):
    inputs = make_inputs(150, 131, dtype, triton_device, channels=136, dim=80)
    assert_matches(OP, inject_rows, inject_rows_ref, inputs, dtype)


def test_tiles_of_a_large_product(monkeypatch, triton_device):
    """The wide configuration and several groups of tiles."""
    config = {"BLOCK_R": 16, "BLOCK_C": 16, "BLOCK_D": 16, "GROUP_R": 2}
    monkeypatch.setattr(triton_fwd, "_fused_config", lambda *_: config)
    inputs = make_inputs(100, 75, torch.float32, triton_device)
    assert_matches(OP, inject_rows, inject_rows_ref, inputs, torch.float32)


def test_which_route():
    """The 13B host's two images go through cuBLAS, a narrow host's through one kernel."""
    assert not triton_fwd.is_fused(1152, 5120, 5120, torch.bfloat16)
    assert triton_fwd.is_fused(1152, 768, 768, torch.float16)
    assert not triton_fwd.is_fused(1152, 768, 768, torch.float32)


def test_in_place_is_the_same_and_touches_only_the_rows(route, triton_device):
    inputs = make_inputs(40, 17, torch.bfloat16, triton_device)
    untouched = torch.ones(40, dtype=torch.bool, device=triton_device).index_fill(0, inputs["row_idx"], False)
    inputs["hidden"] = inputs["hidden"].contiguous()
    inputs["hidden"][untouched] = float("nan")
    expected, before = inject_rows(**inputs), inputs["hidden"].clone()
    out = inject_rows_(**inputs)
    assert out is inputs["hidden"] and torch.equal(out.view(torch.int16), expected.view(torch.int16))
    assert torch.equal(out[untouched].view(torch.int16), before[untouched].view(torch.int16))
    column_major = before.T.contiguous().T
    torch.ops.hia.inject_rows_(column_major, *list(inputs.values())[1:])
    assert torch.equal(column_major.contiguous().view(torch.int16), expected.view(torch.int16))


def test_nan_in_rows_not_selected_does_not_leak(route, triton_device):
    inputs = make_inputs(40, 17, torch.float32, triton_device)
    rows = inputs["row_idx"]
    untouched = torch.ones(40, dtype=torch.bool, device=triton_device).index_fill(0, rows, False)
    wide = torch.full((42, 80), float("nan"), device=triton_device)
    dirty = wide[1:-1, 8:56].copy_(inputs["hidden"])
    dirty[untouched] = float("nan")
    update = torch.full((19, 48), float("nan"), device=triton_device)[1:-1, 8:40].copy_(inputs["update"])
    clean = forward_backward(OP, inject_rows, inputs)
    leaked = forward_backward(OP, inject_rows, {**inputs, "hidden": dirty, "update": update})
    assert_identical(leaked | {"out": leaked["out"][rows]}, clean | {"out": clean["out"][rows]})


def test_partial_gradients(triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device)
    _, update, weight, _, row_idx = inputs.values()
    arguments = (torch.randn(48, 9, device=triton_device).T, update, weight, row_idx)
    complete = torch.ops.hia.inject_rows_bwd(*arguments, [True] * 3)
    for position in range(3):
        mask = [position == other for other in range(3)]
        assert torch.equal(torch.ops.hia.inject_rows_bwd(*arguments, mask)[position], complete[position])
        torch.library.opcheck(torch.ops.hia.inject_rows_bwd.default, (*arguments, mask))


def test_opcheck_and_strides(route, triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.inject_rows.default, inputs)
    for name in ("hidden", "update", "weight"):
        inputs[name] = inputs[name].T.contiguous().T
    assert_matches(OP, inject_rows, inject_rows_ref, inputs, torch.float32)


def test_two_runs_are_bit_identical(route, triton_device):
    assert_repeatable(OP, inject_rows, make_inputs(200, 150, torch.float32, triton_device))


def test_zero_weight_changes_no_bit(route, triton_device):
    inputs = make_inputs(40, 17, torch.bfloat16, triton_device)
    nothing = {"weight": torch.zeros_like(inputs["weight"]), "bias": torch.zeros_like(inputs["bias"])}
    assert torch.equal(inject_rows(**{**inputs, **nothing}), inputs["hidden"])


def test_autocast_leaves_the_residual_stream_in_fp32(route, triton_device):
    inputs = make_inputs(9, 5, torch.float32, triton_device)
    cast = ("update", "weight", "bias")
    assert_autocast(OP, inject_rows, inputs, torch.bfloat16, cast=cast, out_dtype=torch.float32)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 90), share=st.floats(0, 1), channels=st.integers(1, 150), dim=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(tokens, share, channels, dim, dtype):
    inputs = make_inputs(tokens, int(share * tokens), dtype, channels=channels, dim=dim)
    if triton_support.interpreted():
        plain, exact = inject_rows_ref(**inputs), inject_rows_ref(**upcast(inputs, torch.float64))
        assert_close("out", inject_rows(**inputs), exact, plain, dtype=dtype)
