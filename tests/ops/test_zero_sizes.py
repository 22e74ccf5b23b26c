"""Axes of size 0: the reference's results, which are the right ones, in every backend, forward and backward."""

import faulthandler
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import hia_kernels
from bench.measure.poison import poison_uninitialised
from hia_kernels import info, testing, use_backend
from hia_kernels.core import backend
from hia_kernels.ops.conv_norm_act import conv_norm_act_packed, conv_norm_act_packed_, pack_conv
from hia_kernels.ops.stem import pack_stem
from tests.inputs import OPS, differentiable, small_inputs
from tests.ops.harness import assert_compiles, forward_backward
from tests.ops.zero_sizes import AXES, FUNCTIONS, Case, cases, compare, draw

F32, F64 = torch.float32, torch.float64
ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")


def run_all():
    """Print a line for each call that fails; before each op its name, so that a crash shows where it was."""
    faulthandler.enable()
    poison_uninitialised(setattr)
    for op in OPS:
        rows = ("auto", *(row.name for row in backend.TABLES[op].backends))
        served = set()
        for case in cases(op):
            for dtype in (F32, torch.bfloat16):
                for name in rows:
                    print(f"TRY {case}: {name}, {dtype}", flush=True)
                    try:
                        served |= {name} if compare(case, dtype, name) else set()
                    except Exception:
                        print(f"FAIL {op} {case}: {name}, {dtype}: {traceback.format_exc(limit=-2)!r}")
        print(f"DONE {op} {' '.join(sorted(served))}")


@pytest.fixture(scope="module")
def lines():
    """Return what a process of its own says, which may die: a division by zero in a kernel is no exception."""
    code = "from tests.ops.test_zero_sizes import run_all; run_all()"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert done.returncode == 0, f"exit {done.returncode} at {found[-1:]}: {done.stderr[-2000:]}"
    return found


@pytest.mark.parametrize("op", OPS)
def test_every_row_is_as_the_reference(op, lines):
    failures = [line for line in lines if line.startswith(f"FAIL {op} ")]
    assert not failures, "\n".join(failures)
    (done,) = (line for line in lines if line.startswith(f"DONE {op} "))
    here = {row.name for row in backend.TABLES[op].backends if not row.unavailable_reasons()}
    elsewhere = {name for name, device in info.DEVICE_OF.items() if device == "CUDA"}  # they may be here too
    expected = {"auto", *here} - elsewhere
    assert set(done.split()[2:]) >= expected


@pytest.mark.parametrize("op", OPS)
def test_the_reference_is_differentiated_right(op):
    """Compare with PyTorch's own differentiation; nothing is NaN."""
    for case in cases(op):
        for function in FUNCTIONS.get(op, (op,)):
            inputs = draw(case, F64)
            reference = backend.TABLES[op].row("reference").functions[function]

            def plain(op=op, reference=reference, **arguments):
                found = reference(**arguments, **_defaults(op, arguments))
                return found[0] if op == "latent_attention" else found

            with use_backend("reference"):
                got = forward_backward(op, getattr(hia_kernels, function), inputs)
            expected = testing.forward_backward(plain, inputs, differentiable(op))
            for name, x in got.items():
                torch.testing.assert_close(x, expected[name], msg=lambda text, at=(case, name): f"{at}: {text}")
                assert x.isfinite().all() or (name == "lse" and bool((x == -INF).any())), (case, name)


def _defaults(op, arguments):
    if op == "cross_attention":
        return {"softmax_scale": arguments["q"].shape[-1] ** -0.5}
    return {"eps": 1e-5} if op == "norm_linear" else {}


SUMS_OF_NOTHING = {  # op, axis: the right result by the arguments
    ("linear", "channels"): lambda x, weight, bias: bias.expand(len(x), -1),
    ("head_linear", "channels"): lambda x, weight, merge_heads: x.new_zeros(2, 3, 4, 6),
    ("norm_linear", "channels"): lambda x, bias, row_idx, **rest: bias.expand(len(row_idx), -1),
    ("condition_queries", "channels"): lambda bias, queries, row_idx, **rest: (queries + bias).expand(4, -1, -1),
    ("inject_rows", "dim"): lambda hidden, bias, row_idx, **rest: hidden.index_add(0, row_idx, bias.expand(4, -1)),
    ("inject_rows", "rows"): lambda hidden, **rest: hidden,
    ("cross_attention", "keys"): lambda q, **rest: q.new_zeros(q.shape),
    ("latent_attention", "tokens"): lambda q, **rest: q.new_zeros(q.shape),
}


@pytest.mark.parametrize(("op", "axis"), SUMS_OF_NOTHING, ids="-".join)
def test_a_sum_of_nothing_is_zero(op, axis):
    inputs = draw(Case(op, (axis,), {}), F64)
    with use_backend("reference"):
        out = getattr(hia_kernels, op)(**inputs)
    torch.testing.assert_close(out, SUMS_OF_NOTHING[op, axis](**inputs))


def test_the_log_of_a_sum_of_nothing_is_minus_infinity():
    for case in (Case("cross_attention", ("keys",), {}), Case("row_softmax", ("columns",), {})):
        for name in ("auto", "cpu", "reference"):
            with use_backend(name):
                function = getattr(hia_kernels, FUNCTIONS.get(case.op, (case.op,))[-1])
                lse = function(**draw(case, F32))[1]
            assert lse.numel() and bool((lse == -INF).all())


@pytest.mark.parametrize("op", OPS)
def test_fake_tensors_are_as_the_real_ones(op):
    for case in cases(op):
        for function in FUNCTIONS.get(op, (op,)):
            inputs = draw(case, F32)
            real = forward_backward(op, getattr(hia_kernels, function), inputs)
            with FakeTensorMode() as mode:
                fakes = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
                fake = testing.forward_backward(getattr(hia_kernels, function), fakes, differentiable(op))
            for name, x in real.items():
                kinds = [(y.shape, y.dtype, y.is_contiguous() or y.stride()) for y in (x, fake[name])]
                assert kinds[0] == kinds[1], (case, name)


@pytest.mark.parametrize("op", OPS)
def test_compiles(op):
    axis = {"cross_attention": "keys", "latent_attention": "tokens"}.get(op, next(iter(AXES[op])))
    assert_compiles(op, getattr(hia_kernels, op), draw(Case(op, (axis,), {**next(iter(cases(op))).options}), F32))


@pytest.mark.parametrize("backend_name", ["cpu", "native"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize(("columns", "stride"), [(1, 1), (2, 2), (5, 2)])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_no_image_for_packed_weights(dtype, columns, stride, activation, backend_name):
    with use_backend(backend_name):
        try:
            packed = pack_conv(torch.ones(32, 32, 3, 3, dtype=dtype), torch.ones(32), torch.ones(32), stride)
        except NotImplementedError as error:
            pytest.skip(str(error))
        x = torch.ones(0, 7, columns, 32, dtype=dtype)
        residual = torch.ones(0, 6 // stride + 1, (columns - 1) // stride + 1, 32, dtype=dtype)
        results = [
            conv_norm_act_packed(x, packed, None, activation),
            conv_norm_act_packed(x, packed, residual, activation),
            conv_norm_act_packed_(residual.clone(), x, packed, activation),
        ]
    assert [out.shape for out in results] == [residual.shape] * 3


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)], ids=["in", "out"])
def test_a_convolution_without_channels_is_refused(sizes):
    channels, out_channels = sizes
    x, weight, ones = torch.ones(2, 5, 4, channels), torch.ones(out_channels, channels, 3, 3), torch.ones(out_channels)
    with pytest.raises(ValueError, match="^hia::conv_norm_act: weight must have at least one channel in and out"):
        hia_kernels.conv_norm_act(x, weight, ones, ones)
    with pytest.raises(ValueError, match="^hia::conv_norm_act_packed: weight must have at least one channel in and"):
        pack_conv(weight, ones, ones)


def test_a_stem_without_channels_is_refused():
    inputs = {**small_inputs("stem", torch.float32), "weight": torch.ones(0, 3, 7, 7)}
    inputs |= {"scale": torch.ones(0), "shift": torch.ones(0)}
    with pytest.raises(ValueError, match="^hia::stem: weight must have at least one channel out, got none"):
        hia_kernels.stem(**inputs)
    with pytest.raises(ValueError, match="^hia::stem_packed: weight must have at least one channel out, got none"):
        pack_stem(*(inputs[name] for name in ("weight", "mean", "std", "scale", "shift")))
