"""``hia::inject_rows`` and its in-place twin."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from hia_kernels import inject_rows, inject_rows_
from hia_kernels.ops.inject_rows.reference import inject_rows_bwd_ref, inject_rows_ref
from hia_kernels.testing import FP64_SLACK, analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    HALVES,
    assert_autocast,
    assert_backward_is_autograd_of_reference,
    assert_compiles,
    assert_exports,
    assert_gradcheck,
    assert_identical,
    assert_matches,
    assert_repeatable,
    flops,
    flops_by_op,
    forward_backward,
    opcheck,
)

OP = "inject_rows"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(40, 17, {}, id="some-rows"),
    pytest.param(33, 33, {"bias": False}, id="every-row-no-bias"),
    pytest.param(9, 0, {}, id="no-rows"),
    pytest.param(1, 1, {"channels": 16, "dim": 16}, id="one-token"),
    pytest.param(37, 20, {"channels": 100, "dim": 70}, id="ragged"),
    pytest.param(1212, 1152, {"channels": 5120, "dim": 5120}, id="13b-two-images", marks=pytest.mark.gpu),
]


def injected_in_place(hidden, *args):
    return inject_rows_(hidden.contiguous().clone(), *args)


@pytest.mark.parametrize(("tokens", "rows", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(tokens, rows, options, dtype, device):
    assert_matches(OP, inject_rows, inject_rows_ref, make_inputs(tokens, rows, dtype, device, **options), dtype)


def test_backward_is_autograd_of_reference(device):
    assert_backward_is_autograd_of_reference(
        OP, inject_rows, inject_rows_ref, make_inputs(40, 17, torch.float64, device)
    )


def test_agrees_with_a_loop(device):
    """Check the reference row by row."""
    inputs = make_inputs(12, 5, torch.float64, device)
    linear = torch.nn.Linear(32, 48, device=device, dtype=torch.float64)
    linear.weight.data, linear.bias.data = inputs["weight"], inputs["bias"]
    expected = inputs["hidden"].clone()
    for update, row in zip(inputs["update"], inputs["row_idx"].tolist(), strict=True):
        expected[row] += linear(update).detach()
    assert_close("out", inject_rows(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    assert_gradcheck(OP, inject_rows, make_inputs(5, 3, torch.float64, channels=4, dim=3))


def test_opcheck(device):
    inputs = make_inputs(9, 5, torch.float32, device, channels=16, dim=8)
    opcheck(OP, torch.ops.hia.inject_rows.default, inputs)
    hidden, update, weight, bias, row_idx = inputs.values()
    torch.library.opcheck(torch.ops.hia.inject_rows_.default, (hidden.contiguous(), update, weight, bias, row_idx))
    dout = torch.randn(16, 9, device=device).T
    for mask in ([True] * 3, [False, False, True], [False, True, False]):
        torch.library.opcheck(torch.ops.hia.inject_rows_bwd.default, (dout, update, weight, row_idx, mask))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, inject_rows, make_inputs(9, 5, torch.float32, device), backend)


def test_in_place_compiles_to_one_graph(device):
    inputs = make_inputs(9, 5, torch.float32, device)
    compiled = torch.compile(injected_in_place, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs.values()), inject_rows(**inputs))


def test_dynamic_tokens_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(inject_rows, backend=counter, fullgraph=True, dynamic=True)
    for tokens, rows in ((9, 5), (14, 6), (31, 30)):
        inputs = make_inputs(tokens, rows, torch.float32, device)
        assert torch.equal(compiled(**inputs), inject_rows(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    assert_exports(inject_rows, make_inputs(9, 5, torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_leaves_the_residual_stream_in_fp32(dtype, device):
    inputs = make_inputs(9, 5, torch.float32, device)
    cast = ("update", "weight", "bias")
    assert_autocast(OP, inject_rows, inputs, dtype, cast=cast, out_dtype=torch.float32)
    with torch.autocast(device, dtype=dtype):
        in_place, out = injected_in_place(*inputs.values()), inject_rows(**inputs)
    assert torch.equal(in_place, out) and not torch.equal(out, inject_rows(**inputs))
    # compiled under autocast, the op is called so without it
    mixed = {name: x.to(dtype) if name in cast else x for name, x in inputs.items()}
    got = forward_backward(OP, inject_rows, mixed)
    assert torch.equal(got["out"], out) and torch.equal(injected_in_place(*mixed.values()), out)
    assert got["dhidden"].dtype == torch.float32 and all(got[f"d{name}"].dtype == dtype for name in cast)


def test_flops():
    inputs = make_inputs(9, 5, torch.float32)
    forward = flops(inject_rows_ref, **inputs)
    assert forward == 2 * 5 * 48 * 32
    assert flops_by_op(lambda: inject_rows(**inputs)) == {"hia.inject_rows": forward}
    assert flops_by_op(lambda: injected_in_place(*inputs.values())) == {"hia.inject_rows_": forward}
    _, update, weight, _, row_idx = inputs.values()
    arguments = (torch.randn(9, 48), update, weight, row_idx)
    for mask, products in (([True] * 3, 2), ([True, False, False], 1), ([False, False, True], 0)):
        backward = flops(inject_rows_bwd_ref, *arguments, mask)
        assert backward == flops(torch.ops.hia.inject_rows_bwd, *arguments, mask) == products * forward


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, inject_rows, make_inputs(400, 300, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_not_selected_are_bit_identical(dtype, device):
    inputs = make_inputs(40, 17, dtype, device)
    hidden, row_idx = inputs["hidden"], inputs["row_idx"]
    hidden[0] = float("nan")  # row 0 may be selected; whatever was there stays or is added to
    hidden[1] = float("inf")
    untouched = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, row_idx, False)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for out in (inject_rows(**inputs), injected_in_place(*inputs.values())):
        assert torch.equal(out[untouched].view(bits), hidden[untouched].contiguous().view(bits))
        assert not torch.equal(out[row_idx], hidden[row_idx])


def test_nan_in_rows_not_selected_does_not_leak(device):
    inputs = make_inputs(40, 17, torch.float32, device)
    untouched = torch.ones(40, dtype=torch.bool, device=device).index_fill(0, inputs["row_idx"], False)
    dirty = inputs["hidden"].clone()
    dirty[untouched] = float("nan")
    clean = forward_backward(OP, inject_rows, inputs)
    leaked = forward_backward(OP, inject_rows, {**inputs, "hidden": dirty})
    rows = inputs["row_idx"]
    assert_identical(leaked | {"out": leaked["out"][rows]}, clean | {"out": clean["out"][rows]})


def test_zero_weight_changes_no_bit(device):
    inputs = make_inputs(40, 17, torch.float32, device)
    nothing = {"weight": torch.zeros_like(inputs["weight"]), "bias": torch.zeros_like(inputs["bias"])}
    assert torch.equal(inject_rows(**{**inputs, **nothing}), inputs["hidden"])


STRIDES = {
    "contiguous": lambda x: x.contiguous(),
    "rows-apart": lambda x: torch.stack([x, x], 1)[:, 0],
    "columns": lambda x: x.T.contiguous().T,
    "columns-apart": lambda x: torch.stack([x, x], 2)[..., 0],
}


@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_the_same_and_in_place(dtype, strided, device):
    inputs = make_inputs(40, 17, dtype, device)
    hidden = strided(inputs["hidden"])
    expected, version = inject_rows(**inputs), hidden._version
    out = inject_rows_(*{**inputs, "hidden": hidden}.values())
    assert out is hidden and torch.equal(hidden, expected)
    assert hidden._version > version  # autograd notices if it had saved it


def test_rows_are_independent(device):
    inputs = make_inputs(12, 6, torch.float32, device)
    exact = inject_rows_ref(**analysed(inputs, torch.float32))
    one_by_one = inputs["hidden"]
    for row, update in zip(inputs["row_idx"].split(1), inputs["update"].split(1), strict=True):
        one_by_one = inject_rows(one_by_one, update, inputs["weight"], inputs["bias"], row)
    assert_close("out", one_by_one, exact, inject_rows(**inputs), dtype=torch.float32)


ERRORS = [
    ({"hidden": torch.ones(9, 48, 1)}, ValueError, r"hidden must have shape \[T, C\], got \[9, 48, 1\]"),
    ({"hidden": torch.ones(9, 48).int()}, TypeError, "hidden must be float32 or float16 or .* got int32"),
    ({"hidden": [[1.0]]}, TypeError, "hidden must be a tensor, got list"),
    ({"update": torch.ones(5, 31)}, ValueError, r"weight must have shape \[C, D\], got \[48, 32\]; D=31 is fixed by u"),
    (
        {"update": torch.ones(5, 32).double()},
        TypeError,
        "update must be float32 or float16 or bfloat16 beside hidden in float32, got float64",
    ),
    (
        {"weight": torch.ones(47, 32)},
        ValueError,
        r"weight must have shape \[C, D\], got \[47, 32\]; C=48 is fixed by h",
    ),
    ({"weight": torch.ones(48, 32).double()}, TypeError, "weight must be float32 like update, got float64"),
    ({"bias": torch.ones(47)}, ValueError, r"bias must have shape \[C\], got \[47\]; C=48 is fixed by hidden"),
    ({"bias": torch.ones(48).half()}, TypeError, "bias must be float32 like update, got float16"),
    ({"row_idx": torch.arange(4)}, ValueError, r"row_idx must have shape \[R\], got \[4\]; R=5 is fixed by update"),
    ({"row_idx": torch.arange(5).short()}, TypeError, "row_idx must be int32 or int64, got int16"),
    ({"row_idx": torch.arange(5, 10)}, ValueError, r"row_idx must be in \[0, 9\), got values from 5 to 9"),
    ({"row_idx": torch.arange(-1, 4)}, ValueError, r"row_idx must be in \[0, 9\), got values from -1 to 3"),
    ({"row_idx": torch.tensor([0, 1, 2, 1, 3])}, ValueError, "row_idx must not name a row twice, got 5 indices with d"),
    ({"weight": torch.ones(48, 32, device="meta")}, ValueError, "weight must be on cpu like hidden, got meta"),
]


def test_error_messages():
    inputs = make_inputs(9, 5, torch.float32)
    for change, error, message in ERRORS:
        with pytest.raises(error, match=f"^hia::inject_rows: {message}"):
            inject_rows(**{**inputs, **change})

    with pytest.raises(TypeError, match=r"^hia::inject_rows_: update must be float32 or .*, got float64"):
        inject_rows_(**{**inputs, "update": inputs["update"].double()})
    with pytest.raises(ValueError, match="row_idx must not name a row twice"):
        inject_rows_(**{**inputs, "row_idx": torch.zeros(5, dtype=torch.int64)})
    for name in ("hidden", "update", "weight", "bias"):
        trained = {**inputs, name: inputs[name].detach().clone().requires_grad_()}
        with pytest.raises(
            RuntimeError, match=f"{name} must not be part of a gradient graph, got requires_grad=True; use inject_rows"
        ):
            inject_rows_(**trained)
        with torch.no_grad():
            inject_rows_(**trained)


def test_row_values_are_checked_in_compiled_code():
    compiled = torch.compile(inject_rows, backend="aot_eager", fullgraph=True)
    inputs = make_inputs(9, 5, torch.float32)
    compiled(**inputs)
    with pytest.raises(ValueError, match="row_idx must not name a row twice, got 5 indices with duplicates"):
        compiled(**{**inputs, "row_idx": torch.zeros(5, dtype=torch.int64)})


def test_no_gradient_of_gradients():
    inputs = make_inputs(9, 5, torch.float32)
    weight = inputs["weight"].detach().requires_grad_()
    out = inject_rows(**{**inputs, "weight": weight})
    (dweight,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::inject_rows: gradients of gradients are not implemented"):
        dweight.sum().backward()
