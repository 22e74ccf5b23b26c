"""Triton kernels of ``hia::inject_rows``, in the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hia_kernels import inject_rows, inject_rows_, last_backend, use_backend
from hia_kernels.core import registration, triton_support
from hia_kernels.ops.inject_rows import library
from hia_kernels.ops.inject_rows.reference import inject_rows_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    assert_autocast,
    assert_identical,
    assert_matches,
    assert_repeatable,
    forward_backward,
    opcheck,
)

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
triton_fwd = pytest.importorskip("hia_kernels.ops.inject_rows.triton_fwd")
pytestmark = pytest.mark.interpreter

OP = "inject_rows"
make_inputs = inputs_of(OP)
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


@pytest.fixture(params=["triton", "cublas"])
def route(request):
    """Force each way to the same result, whatever the table would choose."""
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, triton_device):
    assert_matches(OP, inject_rows, inject_rows_ref, make_inputs(tokens, rows, dtype, triton_device, **options), dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_agree_with_the_reference(route, dtype, triton_device):
    inputs = make_inputs(150, 131, dtype, triton_device, channels=136, dim=80)
    assert_matches(OP, inject_rows, inject_rows_ref, inputs, dtype)
    assert last_backend(OP) == route


def test_tiles_of_a_large_product(monkeypatch, triton_device):
    """Run the wide configuration and several groups of tiles."""
    config = {"BLOCK_R": 16, "BLOCK_C": 16, "BLOCK_D": 16, "GROUP_R": 2}
    monkeypatch.setattr(triton_fwd, "_fused_config", lambda *_: config)
    inputs = make_inputs(100, 75, torch.float32, triton_device)
    assert_matches(OP, inject_rows, inject_rows_ref, inputs, torch.float32)


@pytest.mark.parametrize("function", ["inject_rows", "inject_rows_", "inject_rows_bwd"])
def test_which_row_of_the_table(function, triton_device, monkeypatch):
    """Send the 13B host's two images through cuBLAS, a narrow host's through one kernel; nothing is computed."""
    monkeypatch.setattr(triton_support, "device_reasons", lambda tensor: [])  # meta tensors cost nothing

    def chosen(rows, channels, dim, dtype):
        hidden, update, weight = (
            torch.empty(shape, dtype=dtype, device="meta") for shape in ((rows, channels), (rows, dim), (channels, dim))
        )
        rest = ([True] * 3,) if function.endswith("bwd") else (None, None)
        library.BACKENDS.select(function, registration.bind(function, (hidden, update, weight, *rest)))
        return last_backend(OP)

    with use_backend("auto"):
        assert chosen(1152, 5120, 5120, torch.bfloat16) == "cublas"
        assert chosen(1152, 768, 768, torch.float16) == "triton"
        assert chosen(1152, 768, 768, torch.float32) == "cublas"
    for forced in ("triton", "cublas"):
        with use_backend(forced):
            assert chosen(9, 16, 16, torch.float32) == chosen(1152, 5120, 5120, torch.float32) == forced


def test_why_not_the_one_kernel():
    found = library.fused_is_slower(1152, 768, 768, torch.float32)
    assert found == ["the product is 1358954496 FLOPs, more than 268435456: cublas is the better at it"]


def test_grids_of_many_rows(monkeypatch):
    """Launch millions of rows, though axes y and z of a grid end at 65,535."""
    triton_bwd, grids = pytest.importorskip("hia_kernels.ops.inject_rows.triton_bwd"), {}

    def record(module, name):
        class Kernel:
            def __getitem__(self, grid):
                grids[name] = grid
                return lambda *args, **kwargs: None

        monkeypatch.setattr(module, name, Kernel())

    record(triton_fwd, "_inject_rows_fused_kernel")
    record(triton_fwd, "_inject_rows_add_kernel")
    record(triton_bwd, "_inject_rows_bwd_gather_kernel")
    hidden, weight = (torch.empty(rows, 16, dtype=torch.bfloat16, device="meta") for rows in (2**27, 16))
    row_idx = torch.empty(2**27, dtype=torch.int64, device="meta")
    triton_fwd.inject_rows_inplace(hidden, hidden, weight, None, row_idx)
    triton_fwd.inject_rows_cublas_inplace(hidden, hidden, weight, None, row_idx)
    triton_bwd.inject_rows_bwd(hidden, hidden, weight, row_idx, [True] * 3)
    assert len(grids) == 3
    for name, grid in grids.items():
        assert grid[0] < 2**31 and all(side <= 65_535 for side in grid[1:]), name


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
    with torch.autocast(inputs["hidden"].device.type, dtype=torch.bfloat16):
        expected = forward_backward(OP, inject_rows, inputs)
    mixed = {name: x.bfloat16() if name in cast else x for name, x in inputs.items()}
    got = forward_backward(OP, inject_rows, mixed)
    assert_identical({name: x.float() for name, x in got.items()}, expected)


@settings(max_examples=10, deadline=None)
@given(
    tokens=st.integers(1, 90),
    share=st.floats(0, 1),
    channels=st.integers(1, 150),
    dim=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(tokens, share, channels, dim, dtype):
    inputs = make_inputs(tokens, int(share * tokens), dtype, channels=channels, dim=dim)
    if triton_support.interpreted():
        plain, exact = inject_rows_ref(**inputs), inject_rows_ref(**analysed(inputs, dtype))
        assert_close("out", inject_rows(**inputs), exact, plain, dtype=dtype)
