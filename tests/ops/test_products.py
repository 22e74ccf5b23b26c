"""``hia_kernels.core.products``, and the ops' rows built on it, at sizes that the native kernel takes."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hia_kernels
from hia_kernels import condition_queries, inject_rows, inject_rows_, last_backend, norm_linear, use_backend
from hia_kernels.core import native, products
from hia_kernels.core.products import BLAS, EVERY, LARGE, Products
from hia_kernels.ops.condition_queries.reference import condition_queries_ref
from hia_kernels.ops.inject_rows.reference import inject_rows_inplace_ref, inject_rows_ref
from hia_kernels.ops.norm_linear.reference import norm_linear_ref
from hia_kernels.testing import assert_close, bounded
from tests.inputs import inputs_of
from tests.ops.harness import assert_identical, assert_matches, assert_repeatable, forward_backward

F32 = torch.float32
WIDE = {"channels": 300, "dim": 257}
condition_queries_inputs, inject_rows_inputs = inputs_of("condition_queries"), inputs_of("inject_rows")
norm_linear_inputs = inputs_of("norm_linear")
# function, reference, inputs large enough for the native kernel, small ones
ROWS = {
    "norm_linear": (
        norm_linear,
        norm_linear_ref,
        lambda dtype: norm_linear_inputs(260, 300, dtype, **WIDE),
        lambda dtype: norm_linear_inputs(9, 5, dtype),
    ),
    "condition_queries": (
        condition_queries,
        condition_queries_ref,
        lambda dtype: condition_queries_inputs(300, 260, dtype, **WIDE),
        lambda dtype: condition_queries_inputs(9, 3, dtype),
    ),
    "inject_rows": (
        inject_rows,
        inject_rows_ref,
        lambda dtype: inject_rows_inputs(300, 260, dtype, **WIDE),
        lambda dtype: inject_rows_inputs(9, 5, dtype),
    ),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record for every product whether the extension made it."""
    made: list[bool] = []
    if native.cpu_unavailable_reasons():
        pytest.skip("; ".join(native.cpu_unavailable_reasons()))
    extension = torch.ops.hia_native.linear

    def extension_watched(*args: Any) -> None:
        made[-1:] = [True] * bool(made)
        extension(*args)

    monkeypatch.setattr(torch.ops.hia_native, "linear", extension_watched)
    for name in ("linear", "multiply"):
        method = getattr(Products, name)

        def watched(self: Products, *args: Any, method: Any = method, **kwargs: Any) -> Any:
            made.append(False)
            return method(self, *args, **kwargs)

        monkeypatch.setattr(Products, name, watched)
    return made


def strided(matrix: Tensor) -> dict[str, Tensor]:
    rows, columns = matrix.shape
    return {
        "rows": matrix,
        "columns": matrix.T.contiguous().T,
        "wide": torch.cat([matrix, matrix], 1)[:, columns:],
        "high": torch.cat([matrix, matrix])[:rows].T.contiguous().T,
        "steps": matrix.repeat_interleave(2, 1)[:, ::2],
        "one-row": matrix[:1].expand(rows, -1),
        "one-column": matrix[:, :1].expand(-1, columns),
    }


STRIDES = list(strided(torch.zeros(2, 2)))
PAIRS = [(kind, "rows") for kind in STRIDES] + [("rows", kind) for kind in STRIDES] + [(kind, kind) for kind in STRIDES]


@pytest.mark.parametrize(("first", "second"), dict.fromkeys(PAIRS))
def test_a_product_of_any_strides(first, second, calls):
    torch.manual_seed(0)
    a, b = strided(torch.randn(270, 300))[first], strided(torch.randn(300, 257))[second]
    exact = bounded(a, F32) @ bounded(b, F32)
    out = LARGE.product(a, b)
    assert out.is_contiguous() and calls == [True]
    assert_close("product", out, exact, a @ b, dtype=F32)
    assert torch.equal(LARGE.product(a, b), out)


@pytest.mark.parametrize(
    ("rows", "inner", "columns"),
    [(1, 1100, 1101), (1100, 1, 1101), (1100, 1101, 1), (2, 1100, 1101), (1, 1, 2**20), (2**20, 1, 1), (1, 2**20, 1)],
)
def test_thin_products(rows, inner, columns, calls, monkeypatch):
    """Take sizes of one, whose strides mean nothing."""
    monkeypatch.setattr(products, "MIN_FLOPS", 2**21)
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = bounded(a, F32) @ bounded(b, F32)
    for x, y in ((a, b), (a.T.contiguous().T, b.T.contiguous().T), (torch.cat([a, a], 1)[:, :inner], b)):
        assert_close("product", LARGE.product(x, y), exact, x @ y, dtype=F32)
    assert calls == [rows > 32] * 3


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0), (1, 1, 1), (5, 40, 30)]
)
def test_small_and_empty_products_are_pytorchs(rows, inner, columns, calls):
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    assert torch.equal(LARGE.product(a, b), a @ b)
    expected = torch.nn.functional.linear(a, b.mT, bias)
    assert torch.equal(LARGE.linear(a, b.mT, bias), expected)
    assert calls == [False] * 2


def test_a_strided_bias(calls):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(300, 300), torch.randn(257, 300), torch.randn(514)[::2]
    exact = torch.nn.functional.linear(*(bounded(t, F32) for t in (x, weight, bias)))
    plain = torch.nn.functional.linear(x, weight, bias)
    assert_close("linear", LARGE.linear(x, weight, bias), exact, plain, dtype=F32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_pytorchs_are_of_any_dtype(dtype, calls):
    a, b = torch.randn(300, 300).to(dtype), torch.randn(300, 257).to(dtype)
    assert torch.equal(BLAS.product(a, b), a @ b) and calls == [False]
    out = torch.empty(300, 257, dtype=dtype)
    BLAS.multiply(a, b, out)
    assert torch.equal(out, a @ b) and calls == [False] * 2


@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (2, 4, 3), (5, 40, 30), (40, 3, 1)])
def test_every_product_can_be_the_extensions(rows, inner, columns, calls):
    torch.manual_seed(0)
    a, b, start = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(rows, columns)
    exact = bounded(a, F32) @ bounded(b, F32)
    assert_close("product", EVERY.product(a, b), exact, a @ b, dtype=F32)
    out = start.clone()
    EVERY.multiply(a, b, out, add=True)
    assert_close("out", out, exact + start, torch.addmm(start, a, b), dtype=F32)
    assert calls == [True] * 2


@pytest.mark.parametrize(("rows", "inner", "columns"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_every_empty_product(rows, inner, columns, calls):
    a, b, bias = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(columns)
    assert torch.equal(EVERY.product(a, b), a @ b)
    assert torch.equal(EVERY.linear(a, b.mT, bias), torch.nn.functional.linear(a, b.mT, bias))


@pytest.mark.parametrize("inner", [1, 255, 256, 257, 767, 768, 769, 1600])
def test_sums_of_any_length(inner, calls, monkeypatch):
    """End at blocks of the sums and of the panels; a sum of thousands of terms is as accurate as PyTorch's."""
    torch.manual_seed(0)
    monkeypatch.setattr(products, "MIN_FLOPS", 2**21)
    rows, columns = 113, max(65, 2**21 // (2 * 113 * inner) + 1)
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    assert_close("product", LARGE.product(a, b), bounded(a, F32) @ bounded(b, F32), a @ b, dtype=F32)
    assert calls == [True]


def test_number_of_threads_changes_no_bit(calls):
    a, b = torch.randn(270, 900), torch.randn(900, 257)
    out, threads = LARGE.product(a, b), torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(LARGE.product(a, b), out)
    finally:
        torch.set_num_threads(threads)
    assert calls == [True] * 2


def test_without_the_extension(monkeypatch):
    monkeypatch.setenv("HIA_CPU_ISA", "none")
    for op, (function, _, large, _) in ROWS.items():
        function(**large(F32))
        assert last_backend(op) == "cpu"
        with use_backend("native"), pytest.raises(NotImplementedError, match="native: HIA_CPU_ISA=none turns the"):
            function(**large(F32))


def test_native_function_checks_its_arguments(calls):
    x, weight, bias, out = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5), torch.zeros(4, 5)
    torch.ops.hia_native.linear(x, weight, bias, out, False)
    for arguments, message in (
        ((x.double(), weight, bias, out), "x must be float32 on the CPU"),
        ((x[0], weight, bias, out), "x must have 2 dimensions, got 1"),
        ((x, weight[:, 1:], bias, out), "weight must have 6 columns, got 5"),
        ((x, weight, bias[1:], out), "bias must have 5 entries, got 4"),
        ((x, weight, bias, out[1:]), r"out must have shape \[4, 5\], got \[3, 5\]"),
        ((x, weight, bias, torch.zeros(5, 4).T), "out.s columns must lie one after the other"),
        ((x[:, :0], weight[:, :0], bias, out), "x must have at least one column"),
    ):
        with pytest.raises(RuntimeError, match=f"hia::linear: {message}"):
            torch.ops.hia_native.linear(*arguments, False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("inner", [5, 300, 1600])
def test_into_a_part_of_something_larger(inner, transposed, calls):
    """Write or add into a view; nothing around it is touched."""
    torch.manual_seed(0)
    rows, columns = 270, max(257, 2**25 // (2 * 270 * inner) + 1)
    a, b, start = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(rows, columns)
    exact = bounded(a, F32) @ bounded(b, F32)
    for add in (False, True):
        wide = torch.full((rows + 2, columns + 40), float("nan"))
        out = wide[1:-1, 20:-20]
        if transposed:
            wide = torch.full((columns + 40, rows + 2), float("nan"))
            out = wide[20:-20, 1:-1].mT
        if add:
            out.copy_(start)
        LARGE.multiply(a, b, out, add=add)
        usual = torch.addmm(start, a, b) if add else a @ b
        assert_close("out", out, exact + start if add else exact, usual, dtype=F32)
        assert int(wide.isnan().sum()) == wide.numel() - out.numel()
    assert calls == [True] * 2


def test_a_sum_has_no_bias(calls):
    with pytest.raises(RuntimeError, match="bias must be None where out is added to"):
        torch.ops.hia_native.linear(torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5), torch.zeros(4, 5), True)


def test_reasons():
    assert products.unsupported_tensors(torch.zeros(1), torch.zeros(1, dtype=torch.float32)) == []
    reasons = products.unsupported_tensors(torch.zeros(1, device="meta"), torch.zeros(1).half())
    assert reasons == ["tensors must be on the CPU, got meta", "float16 is left to the reference"]


@pytest.mark.parametrize("backend", ["auto", "native", "cpu", "reference"])
@pytest.mark.parametrize("op", ROWS)
def test_large_calls_match_the_reference(op, backend, calls):
    function, reference, large, _ = ROWS[op]
    with use_backend(backend):
        assert_matches(op, function, reference, large(F32), F32)
    assert last_backend(op) == ("native" if backend == "auto" else backend)
    assert calls == ([] if backend == "reference" else [backend != "cpu"] * 3)


@pytest.mark.parametrize("backend", ["auto", "native", "cpu"])
@pytest.mark.parametrize("op", ROWS)
def test_small_calls_match_the_reference(op, backend, calls):
    function, reference, _, small = ROWS[op]
    with use_backend(backend):
        assert_matches(op, function, reference, small(F32), F32)
    assert last_backend(op) == ("cpu" if backend == "auto" else backend)
    assert calls == [backend == "native"] * 3


@pytest.mark.parametrize(("rows", "dim"), [(4000, 20), (20, 4000)])
@pytest.mark.parametrize("op", ROWS)
def test_a_call_with_one_large_product_is_natives(op, rows, dim, calls):
    """Multiply few rows of the layer, or of its weight's gradient: the size of each product decides."""
    function = ROWS[op][0]
    make = {"norm_linear": norm_linear_inputs, "inject_rows": inject_rows_inputs}.get(op)
    if make is None:
        inputs = condition_queries_inputs(rows, rows, F32, channels=300, dim=dim)
    else:
        inputs = make(rows, rows, F32, channels=300, dim=dim)
    served = []

    def watched(**arguments):
        out = function(**arguments)
        served.append(last_backend(op))
        return out

    forward_backward(op, watched, inputs)
    rows_of_gradient = 300 if op == "inject_rows" else dim  # of its weight's: the channels it writes
    expected = [rows >= 32, rows >= 32, rows_of_gradient >= 32]
    assert sorted(calls[1:]) == sorted(expected[1:]) and calls[0] == expected[0]
    assert served == ["native" if rows >= 32 else "cpu"]
    assert last_backend(op) == "native"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ROWS)
def test_other_dtypes_are_left_to_the_reference(op, dtype):
    function, _, _, small = ROWS[op]
    inputs = small(dtype)
    forward_backward(op, function, inputs)
    assert last_backend(op) == "reference"
    reason = f"cpu: {str(dtype).removeprefix('torch.')} is left to the reference"
    with use_backend("cpu"), pytest.raises(NotImplementedError, match=reason):
        function(**inputs)


@pytest.mark.parametrize("op", ROWS)
def test_two_runs_are_bit_identical(op):
    function, _, large, _ = ROWS[op]
    assert_repeatable(op, function, large(F32))


def test_under_autocast_a_mixed_injection_is_left_to_the_reference():
    inputs = inject_rows_inputs(9, 5, F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inject_rows(**inputs)
    assert last_backend("inject_rows") == "reference"


def test_injection_in_place(calls):
    inputs = inject_rows_inputs(300, 260, F32, **WIDE)
    exact, plain, out = (inputs["hidden"].contiguous().to(d) for d in (torch.float64, F32, F32))
    rest = {name: x for name, x in inputs.items() if name != "hidden"}
    inject_rows_inplace_ref(exact, **{name: x.double() if x.is_floating_point() else x for name, x in rest.items()})
    inject_rows_inplace_ref(plain, **rest)
    assert inject_rows_(out, **rest) is out and calls == [True]
    assert_close("out", out, exact, plain, dtype=F32)
    untouched = torch.ones(300, dtype=torch.bool).index_fill(0, inputs["row_idx"], False)
    assert torch.equal(out[untouched], inputs["hidden"][untouched])
    assert_identical({"out": inject_rows(**inputs)}, {"out": out})


def test_a_mean_of_many_deviations():
    """Take the norm's gradients at a size and an offset where PyTorch's own backward of the norm loses digits."""
    inputs = norm_linear_inputs(260, None, F32, **WIDE, offset=100.0)
    with use_backend("cpu"):
        assert_matches("norm_linear", hia_kernels.norm_linear, norm_linear_ref, inputs, F32)


def test_norm_alone_and_weight_alone():
    """Give each mask of gradients the bits that all together have."""
    inputs = norm_linear_inputs(260, 300, F32, **WIDE)
    x, norm_weight, norm_bias, weight, _, row_idx, eps = inputs.values()
    dout = torch.randn(300, 257)

    def gradients(*mask: bool) -> tuple[Tensor, ...]:
        return torch.ops.hia.norm_linear_bwd(dout, x, norm_weight, norm_bias, weight, row_idx, eps, list(mask))

    every = gradients(True, True, True, True, True)
    for mask in (
        (False, True, False, False, False),
        (True, False, False, False, False),
        (False, False, False, True, False),
        (False, False, False, False, True),
    ):
        for wanted, found, expected in zip(mask, gradients(*mask), every, strict=True):
            assert not wanted or torch.equal(found, expected)
