"""Triton kernels on sizes, dtypes, values and memory layouts drawn by hypothesis."""

import pytest
import torch

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytest.importorskip("hypothesis", reason="NO HYPOTHESIS: properties are not tested")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hia_kernels import (
    condition_queries,
    cross_attention_with_lse,
    last_backend,
    row_softmax,
    row_softmax_,
    stem,
    use_backend,
)
from hia_kernels.ops.condition_queries.reference import condition_queries_ref
from hia_kernels.ops.cross_attention.reference import cross_attention_with_lse_ref
from hia_kernels.ops.row_softmax.reference import row_softmax_ref
from hia_kernels.ops.stem.functional import stem_reach
from hia_kernels.ops.stem.reference import stem_ref
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, assert_matches
from tests.ops.test_cross_attention_triton import assert_packed_is_one_at_a_time

pytestmark = pytest.mark.interpreter

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
APART = ("as drawn", "transposed", "padded")  # no two elements share memory
LAYOUTS = st.sampled_from((*APART, "expanded"))


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


def laid_out(x, layout, expanded_dim=0):
    """Put ``x`` into other memory; expanded, it repeats its first values along ``expanded_dim``, with stride 0."""
    if layout == "transposed":
        reverse = tuple(reversed(range(x.ndim)))
        return x.permute(reverse).contiguous().permute(reverse)
    if layout == "padded":  # at an odd offset: nothing is aligned; what is around it would show
        around = torch.full((*x.shape[:-1], x.shape[-1] + 5), 0, dtype=x.dtype, device=x.device)
        around.fill_(float("nan") if x.is_floating_point() else 255)
        return around[..., 3 : 3 + x.shape[-1]].copy_(x)
    if layout == "expanded" and x.shape[expanded_dim]:
        return x.narrow(expanded_dim, 0, 1).expand(x.shape)
    return x


def with_dout(function, layout):
    """Let the gradient of ``function``'s first output arrive through a transpose, or from a sum over rows."""

    def call(**inputs):
        first, *rest = outs if isinstance(outs := function(**inputs), tuple) else (outs,)
        if layout == "transposed":
            first = first.permute(tuple(reversed(range(first.ndim)))).clone(memory_format=torch.contiguous_format)
        return (first, *rest) if rest else first

    return call


def assert_both_ways(op, function, reference, inputs, dtype, dout):
    assert_matches(op, with_dout(function, dout), with_dout(reference, dout), inputs, dtype)
    assert last_backend(op) == "triton"


DOUT = st.sampled_from(["as drawn", "transposed"])


@pytest.mark.slow
@FEW
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 144, 320]),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    dout=DOUT,
)
def test_cross_attention(lengths, heads, head_dim, dtype, layouts, dout, triton_device):
    """Leave out few or equal keys, whose gradient is the rounding of a difference that should be zero."""
    lengths_q, lengths_k = zip(*((q, k + 7 if k else 0) for q, k in lengths), strict=True)
    inputs = inputs_of("cross_attention")(lengths_q, lengths_k, dtype, triton_device, heads=heads, head_dim=head_dim)
    for name, layout in zip("qkv", layouts, strict=True):
        inputs[name] = laid_out(inputs[name], layout, expanded_dim=1)  # one head's for all
    function, reference = cross_attention_with_lse, cross_attention_with_lse_ref
    assert_both_ways("cross_attention", function, reference, inputs, dtype, dout)


@FEW
@given(
    lengths=st.lists(
        st.tuples(st.sampled_from([0, 1, 5, 66, 130]), st.integers(0, 2) | st.integers(0, 300)), min_size=2, max_size=3
    ),
    heads=st.integers(1, 2),
    head_dim=st.sampled_from(range(16, 97, 16)),
    dtype=st.sampled_from(DTYPES),
    share_bytes=st.sampled_from([16, 64, 4096]),
)
def test_packed_cross_attention_is_one_at_a_time(lengths, heads, head_dim, dtype, share_bytes, triton_device):
    """Compare bit for bit, each sequence in as many splits as its launcher chooses; small ones here."""
    from hia_kernels.ops.cross_attention import triton_split

    lengths_q, lengths_k = zip(*lengths, strict=True)
    inputs = inputs_of("cross_attention")(lengths_q, lengths_k, dtype, triton_device, heads=heads, head_dim=head_dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_split, "MIN_SPLIT_BYTES", share_bytes)
        patch.setattr(triton_split, "SHORT_SPLIT_BYTES", share_bytes // 4)
        assert_packed_is_one_at_a_time(inputs, lengths_q, lengths_k)


@FEW
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    spread=st.floats(0.1, 100),
    scale=st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=LAYOUTS,
    dout=DOUT,
)
def test_row_softmax(rows, columns, spread, scale, dtype, layout, dout, triton_device):
    inputs = inputs_of("row_softmax")(rows, columns, dtype, triton_device, spread=spread, scale=scale)
    inputs["scores"] = laid_out(inputs["scores"], layout)
    assert_both_ways("row_softmax", row_softmax, row_softmax_ref, inputs, dtype, dout)


@FEW
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 700),
    scale=st.floats(-2, 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(APART),
)
def test_row_softmax_in_place(rows, columns, scale, dtype, layout, triton_device):
    """Give the bits of the other, in the same memory and no more."""
    scores = laid_out(inputs_of("row_softmax")(rows, columns, dtype, triton_device)["scores"], layout)
    base = scores if scores._base is None else scores._base
    inside = torch.zeros(base.shape, dtype=torch.bool, device=triton_device)
    inside.as_strided(scores.shape, scores.stride(), scores.storage_offset()).fill_(True)
    before, (p, lse) = base.clone(), row_softmax(scores, scale)
    assert torch.equal(row_softmax_(scores, scale), lse) and torch.equal(scores, p)
    assert torch.equal(base[~inside].nan_to_num(), before[~inside].nan_to_num())
    assert last_backend("row_softmax") == "triton"


@FEW
@given(
    tokens=st.integers(1, 30),
    samples=st.integers(1, 20),
    channels=st.integers(1, 300),
    queries=st.integers(1, 70),
    dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(LAYOUTS, LAYOUTS, LAYOUTS),
    dout=DOUT,
)
def test_condition_queries(tokens, samples, channels, queries, dim, dtype, layouts, dout, triton_device):
    sizes = {"channels": channels, "queries": queries, "dim": dim}
    inputs = inputs_of("condition_queries")(tokens, samples, dtype, triton_device, **sizes)
    for name, layout in zip(("hidden", "weight", "queries"), layouts, strict=True):
        inputs[name] = laid_out(inputs[name], layout)
    assert_both_ways("condition_queries", condition_queries, condition_queries_ref, inputs, dtype, dout)


@pytest.mark.slow
@settings(FEW, max_examples=6)
@given(
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    kernel=st.sampled_from([3, 7]),
    pool=st.sampled_from([1, 3]),
    channels=st.sampled_from([1, 3]),
    out_channels=st.integers(8, 20),
    pixel_dtype=st.sampled_from([torch.uint8, torch.uint16, torch.float32, torch.bfloat16]),
    dtype=st.sampled_from(DTYPES),
    layout=LAYOUTS,
    expanded_dim=st.sampled_from([0, 3]),
    dout=DOUT,
)
def test_stem(extra, kernel, pool, dtype, layout, expanded_dim, dout, triton_device, **options):
    size = tuple(stem_reach(kernel, pool) + more for more in extra)
    images = 2 if (layout, expanded_dim) == ("expanded", 0) else 1
    inputs = inputs_of("stem")(size, dtype, triton_device, kernel=kernel, pool=pool, images=images, **options)
    inputs["pixels"] = laid_out(inputs["pixels"], layout, expanded_dim)  # one image for all, or grey as three channels
    inputs["weight"] = laid_out(inputs["weight"], "transposed" if layout == "transposed" else "as drawn")
    assert_both_ways("stem", stem, stem_ref, inputs, dtype, dout)
