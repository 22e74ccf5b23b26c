"""Launchers of ``cross_attention`` given lengths that nobody checks on a GPU: too small, too short, out of range.

A sequence is then its first ``max_seqlen`` rows, and rows of no sequence are zeros; nothing outside is touched.
"""

from importlib import import_module
from itertools import pairwise

import pytest
import torch

from hia_kernels.ops.cross_attention.reference import cross_attention_bwd_ref, cross_attention_with_lse_ref
from hia_kernels.testing import assert_close
from tests.inputs import inputs_of

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

make_inputs = inputs_of("cross_attention")
LONG_Q, LONG_K = 140, 160
ROUTES = [(32, torch.float16), (272, torch.float16), (32, torch.float32)]
CASES = {  # cu_seqlens and longest sequence, of LONG_Q queries and of LONG_K keys
    "longest-too-small": (([0, 130, 140], 9), ([0, 150, 160], 17)),
    "longest-of-keys-too-small": (([0, 130, 140], 130), ([0, 150, 160], 20)),
    "longest-of-queries-too-small": (([0, 130, 140], 70), ([0, 150, 160], 150)),
    "ends-early": (([0, 5, 40], 70), ([0, 9, 70], 70)),
    "ends-behind-the-last-row": (([0, 130, 900], 900), ([0, 150, 2**31 - 1], 900)),
    "starts-below-zero": (([-7, 130, 140], 140), ([-(2**31), 150, 160], 160)),
    "longest-is-zero": (([0, 130, 140], 0), ([0, 150, 160], 160)),
    "no-key-is-long-enough": (([0, 130, 140], 130), ([0, 150, 160], 0)),
    "no-sequence": (([0], 9), ([0], 9)),
}


def spans(packing, tokens):
    """Return the rows of each sequence as kernels read them."""
    ends, longest = packing
    ends = [0, *(min(max(end, 0), tokens) for end in ends[1:])]
    return [slice(start, min(end, start + longest)) for start, end in pairwise(ends)]


def expected_of(function, inputs, cu, like):
    """Compute sequences one by one, the rest zeros, or -inf in lse."""
    outs = [torch.full_like(x, float("-inf") if name == "lse" else 0.0) for name, x in like.items()]
    for rows_q, rows_k in zip(spans(cu[0], LONG_Q), spans(cu[1], LONG_K), strict=True):
        lengths = [rows.stop - rows.start for rows in (rows_q, rows_k)]
        ends = [torch.tensor([0, length], dtype=torch.int32) for length in lengths]
        one = {}
        for name, x in inputs.items():
            rows = rows_k if name in "kv" else rows_q
            one[name] = x[:, rows] if name in ("lse", "dlse") else x[rows]
        for out, part, name in zip(outs, function(*one.values(), *ends, *lengths, 0.2), like, strict=True):
            out[(slice(None), rows_q) if name == "lse" else (rows_k if name in ("dk", "dv") else rows_q)] = part
    return dict(zip(like, outs, strict=True))


def assert_as_expected(got, function, inputs, cu, dtype):
    exact = {name: x.double() for name, x in inputs.items()}
    exact = expected_of(function, exact, cu, {name: x.double() for name, x in got.items()})
    plain = expected_of(function, inputs, cu, got)
    for name, x in got.items():
        assert_close(name, x, exact[name], plain[name], dtype=dtype, slack=8)


@pytest.fixture(params=[1, 3])
def launchers(request, monkeypatch):
    """Cut keys into splits, too: their partial results are allocated by the longest sequence."""
    names = ("fwd", "bwd", "split", "unfused_fwd", "unfused_bwd")
    modules = {name: import_module(f"hia_kernels.ops.cross_attention.triton_{name}") for name in names}
    heuristic = modules["split"].SplitHeuristic(request.param, request.param, 8)
    for name in ("fwd", "bwd", "unfused_fwd", "unfused_bwd"):
        monkeypatch.setattr(modules[name], "split_heuristic", lambda *sizes: heuristic)
    return modules["fwd"].cross_attention_with_lse_fwd, modules["bwd"].cross_attention_bwd


@pytest.mark.parametrize(("head_dim", "dtype"), ROUTES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_no_sequence_are_zeros(case, head_dim, dtype, launchers, triton_device):
    forward, backward = launchers
    inputs = make_inputs([LONG_Q], [LONG_K], dtype, triton_device, head_dim=head_dim, heads=1)
    qkv = {name: inputs[name] for name in "qkv"}
    cu = CASES[case]
    packing = [torch.tensor(ends, dtype=torch.int32, device=triton_device) for ends, _ in cu]
    packing += [longest for _, longest in cu]
    out, lse = forward(*qkv.values(), *packing, 0.2)
    assert_as_expected({"out": out, "lse": lse}, cross_attention_with_lse_ref, qkv, cu, dtype)
    seeded = torch.Generator().manual_seed(0)
    dout = torch.randn(out.shape, generator=seeded).to(out)
    dlse = torch.randn(lse.shape, generator=seeded).to(lse)
    given = {"dout": dout, "dlse": dlse, **qkv, "out": out, "lse": lse}
    grads = dict(zip(("dq", "dk", "dv"), backward(*given.values(), *packing, 0.2), strict=True))
    assert_as_expected(grads, cross_attention_bwd_ref, given, cu, dtype)
