"""Tensors of more than 2**31 elements and grids beyond 65535: the last of many equals itself alone, bit for bit."""

import pytest
import torch

from hia_kernels import (
    condition_queries,
    cross_attention_with_lse,
    last_backend,
    row_softmax,
    row_softmax_,
    stem,
    use_backend,
)
from hia_kernels.core import triton_support
from hia_kernels.ops.cross_attention.inputs import packing
from hia_kernels.testing import assert_close
from tests.inputs import inputs_of

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = [pytest.mark.gpu, pytest.mark.slow]

BF16 = torch.bfloat16
TOO_MANY = 2**31  # elements that int32 offsets can't reach


@pytest.fixture(autouse=True)
def forced():
    if triton_support.interpreted():
        pytest.skip("the interpreter's process")
    with use_backend("triton"):
        yield
    torch.cuda.empty_cache()


def needs(gib):
    """Skip where the GPU has less memory free."""
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.1f} are free")


def normal(*shape):
    """Draw on the GPU, a part at a time: the CPU would take minutes, and fp32 twice the memory."""
    out = torch.empty(shape, dtype=BF16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for part in out.split(max(1, 2**26 // max(1, out[0].numel()))):
        part.normal_(generator=generator)
    return out


def attended(q, k, v, dout, lengths_q, lengths_k):
    """Return out, lse, dq, dk, dv."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = cross_attention_with_lse(q, k, v, **packing(lengths_q, lengths_k, "cuda"))
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout)


@pytest.mark.parametrize(("heads", "head_dim"), [(32, 128), (8, 640)], ids=["fused", "unfused"])
def test_cross_attention(heads, head_dim):
    needs(30)
    lq, lk = 16, 1024
    sequences = TOO_MANY // (lk * heads * head_dim) + 2
    k, v = normal(sequences * lk, heads, head_dim), normal(sequences * lk, heads, head_dim)
    q, dout = normal(sequences * lq, heads, head_dim), normal(sequences * lq, heads, head_dim)
    assert k[:-lk].numel() > TOO_MANY
    out, lse, dq, dk, dv = attended(q, k, v, dout, [lq] * sequences, [lk] * sequences)
    one = attended(q[-lq:], k[-lk:], v[-lk:], dout[-lq:], [lq], [lk])
    for name, got, expected in zip(
        ("out", "lse", "dq", "dk", "dv"), (out[-lq:], lse[:, -lq:], dq[-lq:], dk[-lk:], dv[-lk:]), one, strict=True
    ):
        assert torch.equal(got, expected) and got.any(), name
    assert last_backend("cross_attention") == "triton"


@pytest.mark.parametrize("columns", [16384, 32768], ids=["whole-rows", "in-chunks"])
def test_row_softmax(columns):
    """Take more rows, too, than axis y of a grid could have."""
    needs(22)
    rows = TOO_MANY // columns + 3
    rows = max(rows, 65536 + 3)
    scores, last = normal(rows, columns), slice(rows - 2, rows)
    assert scores[:-2].numel() > TOO_MANY
    p, lse = row_softmax(scores, 0.5)
    one, one_lse = row_softmax(scores[last], 0.5)
    assert torch.equal(p[last], one) and torch.equal(lse[last], one_lse) and one.any()
    ds = torch.ops.hia.row_softmax_bwd(scores, p, 0.5)
    assert torch.equal(ds[last], torch.ops.hia.row_softmax_bwd(scores[last], one, 0.5)) and ds[last].any()
    del ds, p
    assert torch.equal(row_softmax_(scores, 0.5)[last], one_lse) and torch.equal(scores[last], one)
    assert last_backend("row_softmax") == "triton"


def test_stem():
    """Exceed 2**31 elements of pixels and of outputs."""
    needs(16)
    inputs = inputs_of("stem")((16, 16), BF16, "cuda", images=1, out_channels=16)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (33, 8192, 8192, 1)
    inputs["pixels"] = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda", generator=generator)
    inputs["window"] = inputs["window"].expand(33, -1)
    assert inputs["pixels"][:-1].numel() >= TOO_MANY
    out = stem(**inputs)
    assert out[:-1].numel() >= TOO_MANY
    alone = stem(**{**inputs, "pixels": inputs["pixels"][-1:], "window": inputs["window"][-1:]})
    assert torch.equal(out[-1:], alone) and alone.any()
    assert last_backend("stem") == "triton"


@pytest.mark.parametrize(
    ("samples", "queries", "dim"), [(2100, 256, 4096), (65536 * 16 + 5, 1, 16)], ids=["elements", "grid"]
)
def test_condition_queries(samples, queries, dim):
    needs(12)
    hidden, weight, learnable = normal(64, 64), normal(dim, 64), normal(queries, dim)
    row_idx = torch.arange(samples, device="cuda") % 64
    out = condition_queries(hidden, row_idx, weight, None, learnable)
    assert out[:-1].numel() > TOO_MANY or samples > 65535 * 16
    alone = condition_queries(hidden, row_idx[-1:], weight, None, learnable)
    assert torch.equal(out[-1:], alone) and alone.any()
    only_queries = [False, False, False, True]
    del alone
    dqueries = torch.ops.hia.condition_queries_bwd(out, hidden, row_idx, weight, only_queries)[3]
    exact = sum(part.double().sum(0) for part in out.split(64))
    assert_close("dqueries", dqueries, exact, exact.to(BF16), dtype=BF16, slack=4)
    assert last_backend("condition_queries") == "triton"
