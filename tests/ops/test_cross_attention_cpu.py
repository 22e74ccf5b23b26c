"""``hia::cross_attention`` by PyTorch's own kernels: the default on the CPU."""

import pytest
import torch

from hia_kernels import cross_attention, cross_attention_with_lse, last_backend, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.cross_attention import cpu
from hia_kernels.ops.cross_attention.inputs import packing
from hia_kernels.ops.cross_attention.reference import cross_attention_bwd_ref as backward_ref
from hia_kernels.ops.cross_attention.reference import cross_attention_ref, cross_attention_with_lse_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, HALVES, assert_matches, assert_repeatable, forward_backward

OP = "cross_attention"
make_inputs = inputs_of(OP)
CASES = [  # dtypes rotate where the axis is not about precision
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float32, id="ragged-fp32"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float16, id="ragged-fp16"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.bfloat16, id="ragged-bf16"),
    pytest.param([5, 5, 5, 2], [9, 9, 9, 4], {"head_dim": 80}, torch.float32, id="neighbours-of-equal-lengths"),
    pytest.param([0, 7, 3, 0], [5, 0, 4, 0], {}, torch.float32, id="empty-queries-empty-keys-both-fp32"),
    pytest.param([0, 7, 3, 0], [5, 0, 4, 0], {}, torch.bfloat16, id="empty-queries-empty-keys-both-bf16"),
    pytest.param([3], [0], {}, torch.float16, id="no-keys-at-all"),
    pytest.param([], [], {}, torch.bfloat16, id="no-sequences"),
    pytest.param([9, 3], [1089, 3], {"head_dim": 64}, torch.float32, id="1089-keys-fp32"),
    pytest.param([9, 3], [1089, 3], {"head_dim": 64}, torch.bfloat16, id="1089-keys-bf16"),
    pytest.param([33, 5], [17, 40], {"head_dim": 512}, torch.float16, id="head-dim-512"),
    pytest.param([33, 5], [17, 40], {"head_dim": 640}, torch.float32, id="head-dim-640-fp32"),
    pytest.param([33, 5], [17, 40], {"head_dim": 640}, torch.bfloat16, id="head-dim-640-bf16"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("cpu"):
        yield


def assert_both_match(inputs, dtype):
    """Compare with lse, which has a gradient of its own, and without, which another kernel may serve."""
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, dtype)
    assert_matches(OP, cross_attention, cross_attention_ref, inputs, dtype)
    assert last_backend(OP) == "cpu"


@pytest.mark.parametrize(("lengths_q", "lengths_k", "options", "dtype"), CASES)
def test_matches_reference(lengths_q, lengths_k, options, dtype):
    assert_both_match(make_inputs(lengths_q, lengths_k, dtype, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_too_many_scores_to_hold_are_left_to_flash(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "MANY_SCORES", 0)
    assert_both_match(make_inputs([7, 7, 2], [9, 9, 30], dtype, head_dim=256), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_heads_in_groups_and_no_products_in_bf16(dtype, monkeypatch):
    monkeypatch.setattr(cpu, "GROUP_SCORES", 7 * 30 * 2 // torch.get_num_threads())
    monkeypatch.setattr(cpu, "_product_dtype", lambda dtype: torch.float32)
    assert_both_match(make_inputs([7, 3], [30, 4], dtype, heads=5), dtype)


def test_what_serves_which_shape(monkeypatch):
    batch, no_keys = (2, slice(0, 512), slice(0, 1568)), (1, slice(0, 256), slice(5, 5))
    many_keys, many_scores = (1, slice(0, 256), slice(0, 3136)), (1, slice(0, 8192), slice(0, 8192))
    narrow, wide = torch.empty(1, 1, 128), torch.empty(1, 1, 640)
    for native in (False, True):
        monkeypatch.setattr(cpu, "_product_dtype", lambda dtype, native=native: dtype if native else torch.float32)
        assert cpu._flash_wins(narrow, batch) and not cpu._flash_wins(narrow, many_keys)
        assert cpu._flash_wins(narrow.bfloat16(), batch) != native
        assert not cpu._flash_wins(wide, batch) and cpu._flash_wins(wide, many_scores)
        assert not cpu._flash_wins(narrow, no_keys)


@pytest.mark.parametrize("head_dim", [32, 144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(head_dim, dtype):
    """Take strided channels, one head's keys for all, and a gradient that came through a transpose."""
    inputs = make_inputs([5, 4], [6, 3], dtype, head_dim=head_dim)
    inputs["q"] = inputs["q"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 2, -1)
    inputs["v"] = inputs["v"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_both_match(inputs, dtype)
    q, k, v, *rest = inputs.values()
    out, lse = cross_attention_with_lse(**inputs)
    assert out.is_contiguous() and lse.is_contiguous()
    dout = torch.randn(head_dim, 2, 9).to(dtype).permute(2, 1, 0)
    for dlse in (torch.zeros_like(lse), torch.randn(9, 2).T):
        arguments = dout, dlse, q, k, v, out, lse
        got, plain = (function(*arguments, *rest) for function in (torch.ops.hia.cross_attention_bwd, backward_ref))
        exact = backward_ref(*(x.double() for x in arguments), *rest)
        for name, *values in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
            assert values[0].is_contiguous()
            assert_close(name, *values, dtype=dtype, slack=4)


@pytest.mark.parametrize("head_dim", [32, 256])
def test_negative_and_zero_scale(head_dim):
    inputs = make_inputs([5, 4], [6, 3], torch.float32, head_dim=head_dim)
    for scale in (-0.5, 0.0):
        assert_both_match({**inputs, "softmax_scale": scale}, torch.float32)


@pytest.mark.parametrize("head_dim", [32, 256])
def test_large_scores_do_not_overflow(head_dim):
    inputs = make_inputs([5, 3], [7, 2], torch.float32, head_dim=head_dim)
    inputs["q"] = inputs["q"] * 1e4
    got = forward_backward(OP, cross_attention_with_lse, inputs)
    exact = cross_attention_with_lse_ref(**analysed(inputs, torch.float32))
    plain = cross_attention_with_lse_ref(**inputs)
    for i, name in enumerate(("out", "lse")):
        assert_close(name, got[name], exact[i], plain[i], dtype=torch.float32)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_are_bit_identical(dtype):
    for head_dim in (64, 320):
        inputs = make_inputs([64, 64, 7], [300, 300, 9], dtype, head_dim=head_dim)
        for function in (cross_attention, cross_attention_with_lse):
            assert_repeatable(OP, function, inputs)


@pytest.mark.parametrize("lengths", [([7, 0, 12, 1], [9, 30, 5, 0]), ([6, 6, 6], [20, 20, 20])], ids=["ragged", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_is_a_loop_over_samples(lengths, dtype):
    inputs = make_inputs(*lengths, dtype, head_dim=96)
    packed = forward_backward(OP, cross_attention, inputs)
    assert all(x.is_contiguous() for x in packed.values())
    starts_q, starts_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    outs = []
    for b, (lq, lk) in enumerate(zip(*lengths, strict=True)):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        alone = {"q": inputs["q"][rows_q], "k": inputs["k"][rows_k], "v": inputs["v"][rows_k]}
        outs.append(cross_attention(**alone, **packing([lq], [lk])))
    exact = cross_attention_ref(**analysed(inputs, dtype))
    assert_close("out", torch.cat(outs), exact, packed["out"], dtype=dtype)


@pytest.mark.skipif(triton_support.interpreted(), reason="in the interpreter's process Triton comes first")
def test_it_is_what_the_cpu_uses():
    with use_backend("auto"):
        cross_attention(**make_inputs([3], [4], torch.bfloat16))
        assert last_backend(OP) == "cpu"
        cross_attention(**make_inputs([3], [4], torch.float64))
        assert last_backend(OP) == "reference"


def test_reasons_why_not():
    with pytest.raises(NotImplementedError, match="cpu: float64 is left to the reference"):
        cross_attention(**make_inputs([3], [4], torch.float64))

    meta = make_inputs([3], [4], torch.float32, "meta")
    assert cpu.unsupported_reasons(OP, **meta) == ["tensors must be on the CPU, got meta"]


def test_a_scale_of_zero_hides_nothing():
    """Multiply infinities by 0 as the reference does: products leave out what they multiply by 0."""
    for name in ("q", "k"):
        inputs = {**make_inputs([5], [7], torch.float32), "softmax_scale": 0.0}
        inputs[name] = torch.full_like(inputs[name], float("inf"))
        for row in ("cpu", "reference"):
            with use_backend(row):
                assert cross_attention(**inputs).isnan().all(), (name, row)
