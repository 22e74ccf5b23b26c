"""``hia::cross_attention`` and ``hia::cross_attention_with_lse``."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from hia_kernels import cross_attention, cross_attention_with_lse
from hia_kernels.ops.cross_attention.inputs import packing
from hia_kernels.ops.cross_attention.reference import (
    cross_attention_bwd_ref,
    cross_attention_ref,
    cross_attention_with_lse_ref,
)
from hia_kernels.testing import FP64_SLACK, analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    HALVES,
    assert_autocast,
    assert_backward_is_autograd_of_reference,
    assert_compiles,
    assert_exports,
    assert_gradcheck,
    assert_matches,
    assert_repeatable,
    flops,
    flops_by_op,
    forward_backward,
    opcheck,
)

OP = "cross_attention"
make_inputs = inputs_of(OP)
EXTRACT_33 = 33 * 33  # tokens of a 1056 x 1056 image: one more than a multiple of 32
EXTRACT_31 = 31 * 31  # of 992 x 992: likewise
CASES = [  # lengths of queries and keys; dtypes rotate where the axis is not about precision
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float32, id="ragged-fp32"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float16, id="ragged-fp16"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.bfloat16, id="ragged-bf16"),
    pytest.param([0, 7, 3, 0], [5, 0, 4, 0], {}, torch.float32, id="empty-queries-empty-keys-both"),
    pytest.param([4], [0], {}, torch.bfloat16, id="no-keys-at-all"),
    pytest.param([0], [4], {}, torch.float32, id="no-queries-at-all"),
    pytest.param([], [], {}, torch.float32, id="no-sequences"),
    pytest.param([1], [1], {"heads": 1, "head_dim": 16}, torch.float32, id="one-query-one-key"),
    pytest.param([33, 5], [17, 40], {"heads": 3, "head_dim": 16}, torch.float16, id="head-dim-16"),
    pytest.param([33, 5], [17, 40], {"head_dim": 80}, torch.bfloat16, id="head-dim-80"),
    pytest.param([33, 5], [17, 40], {"head_dim": 96}, torch.float32, id="head-dim-96"),
    pytest.param([33, 5], [17, 40], {"head_dim": 512}, torch.float16, id="head-dim-512-7b-released"),
    pytest.param([33, 5], [17, 40], {"head_dim": 640}, torch.float32, id="head-dim-640-13b-released"),
    pytest.param([64, 64], [EXTRACT_33, EXTRACT_31], {}, torch.float32, id="keys-1-mod-32-fp32"),
    pytest.param([64, 64], [EXTRACT_33, EXTRACT_31], {}, torch.float16, id="keys-1-mod-32-fp16"),
    pytest.param(
        [576, 576], [256, 256], {"heads": 40, "head_dim": 128}, torch.bfloat16, id="13b-inject", marks=pytest.mark.gpu
    ),
    pytest.param(
        [256], [128 * 128], {"heads": 8, "head_dim": 640}, torch.float16, id="4096-px-released", marks=pytest.mark.gpu
    ),
]


@pytest.mark.parametrize(("lengths_q", "lengths_k", "options", "dtype"), CASES)
def test_matches_reference(lengths_q, lengths_k, options, dtype, device):
    inputs = make_inputs(lengths_q, lengths_k, dtype, device, **options)
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, dtype)
    assert_matches(OP, cross_attention, cross_attention_ref, inputs, dtype)


def test_without_keys_the_result_is_zero(device):
    inputs = make_inputs([3, 2], [0, 4], torch.float32, device)
    inputs["q"] = inputs["q"].clone()
    inputs["q"][:3] = float("nan")
    out, lse = cross_attention_with_lse(**inputs)
    assert torch.equal(out[:3], torch.zeros_like(out[:3])) and out[3:].all()
    assert torch.equal(lse[:, :3], torch.full_like(lse[:, :3], float("-inf"))) and lse[:, 3:].isfinite().all()


def test_agrees_with_scaled_dot_product_attention(device):
    """Check the reference itself against PyTorch."""
    inputs = make_inputs([33], [65], torch.float64, device, head_dim=48)
    q, k, v = (inputs[name].transpose(0, 1)[None] for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    assert_close("out", cross_attention(**inputs), expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_default_scale(device):
    inputs = make_inputs([3], [4], torch.float32, device, head_dim=64)
    expected = cross_attention(**inputs)
    assert torch.equal(cross_attention(**{**inputs, "softmax_scale": None}), expected)
    assert not torch.equal(cross_attention(**{**inputs, "softmax_scale": 1.0}), expected)


def test_large_scores_do_not_overflow(device):
    """Take scores near 1e4. Gradients need only be finite: a score's rounding is as large as the softmax is wide."""
    inputs = make_inputs([5, 3], [7, 2], torch.float32, device)
    inputs["q"] = inputs["q"] * 1e4
    got = forward_backward(OP, cross_attention_with_lse, inputs)
    exact = cross_attention_with_lse_ref(**analysed(inputs, torch.float32))
    plain = cross_attention_with_lse_ref(**inputs)
    for i, name in enumerate(("out", "lse")):
        assert_close(name, got[name], exact[i], plain[i], dtype=torch.float32)
    assert all(grad.isfinite().all() for grad in got.values())


def test_backward_is_autograd_of_reference(device):
    inputs = make_inputs([7, 0, 12], [9, 30, 5], torch.float64, device)

    def without_lse(**kwargs):  # functional.py never comes this way; whoever calls the op itself may
        return torch.ops.hia.cross_attention(*kwargs.values())

    for function, reference in (
        (cross_attention, cross_attention_ref),
        (cross_attention_with_lse, cross_attention_with_lse_ref),
        (without_lse, cross_attention_ref),
    ):
        assert_backward_is_autograd_of_reference(OP, function, reference, inputs)


def test_gradcheck():
    inputs = make_inputs([2, 1], [1, 3], torch.float64, heads=1, head_dim=16)
    for function in (cross_attention, cross_attention_with_lse):
        assert_gradcheck(OP, function, inputs)


def test_opcheck(device):
    inputs = make_inputs([3, 0, 4], [5, 4, 0], torch.float32, device, head_dim=16)
    opcheck(OP, torch.ops.hia.cross_attention.default, inputs)
    opcheck(OP, torch.ops.hia.cross_attention_with_lse.default, inputs)
    q, k, v, *rest = inputs.values()
    out, lse = cross_attention_with_lse(**inputs)
    dout, dlse = torch.randn(16, 2, 7, device=device).permute(2, 1, 0), torch.randn_like(lse)
    torch.library.opcheck(torch.ops.hia.cross_attention_bwd.default, (dout, dlse, q, k, v, out, lse, *rest))


@pytest.mark.parametrize(
    ("function", "backend"),
    [(cross_attention, "inductor"), (cross_attention_with_lse, "aot_eager")],
)
def test_compiles_to_one_graph(function, backend, device):
    assert_compiles(OP, function, make_inputs([3, 0, 4], [5, 4, 0], torch.float32, device), backend)


def test_dynamic_lengths_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(cross_attention, backend=counter, fullgraph=True, dynamic=True)
    for lengths_q, lengths_k in (([4, 3], [9, 2]), ([5, 8], [3, 30]), ([2, 2, 5], [40, 4, 6])):
        inputs = make_inputs(lengths_q, lengths_k, torch.float32, device)
        assert torch.equal(compiled(**inputs), cross_attention(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    for function in (cross_attention, cross_attention_with_lse):
        assert_exports(function, make_inputs([3, 0, 4], [5, 4, 0], torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs([3, 4], [5, 4], torch.float32, device)
    assert_autocast(OP, cross_attention, inputs, dtype, cast=("q", "k", "v"), out_dtype=dtype)


def _backward_arguments(inputs):
    q, k, v, *rest = inputs.values()
    out, lse = cross_attention_with_lse(**inputs)
    return torch.ones_like(out), torch.zeros_like(lse), q, k, v, out, lse, *rest


def test_flops_of_equal_lengths_are_exact():
    inputs = make_inputs([3, 3], [5, 5], torch.float32)
    forward = flops(cross_attention_ref, **inputs)
    assert forward == 4 * 6 * 5 * 2 * 32
    assert flops_by_op(lambda: cross_attention(**inputs)) == {"hia.cross_attention": forward}
    assert flops(cross_attention_with_lse, **inputs) == forward
    arguments = _backward_arguments(inputs)
    backward = flops(cross_attention_bwd_ref, *arguments)
    assert backward == flops(torch.ops.hia.cross_attention_bwd, *arguments) == forward // 2 * 5


def test_flops_of_ragged_lengths_are_an_upper_bound_that_reads_no_values():
    inputs = make_inputs([3, 9], [5, 2], torch.float32)
    bound = flops(cross_attention, **inputs)
    assert bound == 4 * 12 * 5 * 2 * 32 > flops(cross_attention_ref, **inputs)
    arguments = _backward_arguments(inputs)
    assert flops(torch.ops.hia.cross_attention_bwd, *arguments) > flops(cross_attention_bwd_ref, *arguments)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:  # has no values: reading one raises
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        assert flops(cross_attention, **fake) == bound


def test_two_runs_are_bit_identical(device):
    assert_repeatable(OP, cross_attention_with_lse, make_inputs([64, 7], [300, 9], torch.float32, device))


def test_packed_is_a_loop_over_samples(device):
    lengths_q, lengths_k = [7, 0, 12, 1], [9, 30, 5, 0]
    inputs = make_inputs(lengths_q, lengths_k, torch.float32, device)
    packed = forward_backward(OP, cross_attention, inputs)
    outs = []
    starts_q, starts_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    for b, (lq, lk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        alone = {"q": inputs["q"][rows_q], "k": inputs["k"][rows_k], "v": inputs["v"][rows_k]}
        outs.append(cross_attention(**alone, **packing([lq], [lk], device)))
    exact = cross_attention_ref(**analysed(inputs, torch.float32))
    assert_close("out", torch.cat(outs), exact, packed["out"], dtype=torch.float32)


def test_nan_in_another_sequence_does_not_leak(device):
    inputs = make_inputs([4, 6], [8, 3], torch.float32, device)
    clean = forward_backward(OP, cross_attention_with_lse, inputs)
    dirty = {name: inputs[name].clone() for name in "qkv"}
    dirty["q"][:4] = dirty["k"][:8] = dirty["v"][:8] = float("nan")
    leaked = forward_backward(OP, cross_attention_with_lse, {**inputs, **dirty})
    for name, start in (("out", 4), ("dq", 4), ("dk", 8), ("dv", 8)):
        assert torch.equal(leaked[name][start:], clean[name][start:]), name
        assert leaked[name][:start].isnan().all(), name
    assert torch.equal(leaked["lse"][:, 4:], clean["lse"][:, 4:])


def test_recording_gradients_and_a_generous_max_seqlen_change_no_bit(device):
    inputs = make_inputs([4, 6], [8, 3], torch.float32, device)
    generous = {**inputs, "max_seqlen_q": 1000, "max_seqlen_k": 1000}
    out = cross_attention(**inputs)
    assert torch.equal(cross_attention(**generous), out)
    assert torch.equal(forward_backward(OP, cross_attention, inputs)["out"], out)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


VALUE_ERRORS = [
    ({"cu_seqlens_q": int32(1, 3, 7)}, ValueError, "cu_seqlens_q must start at 0, got 1"),
    ({"cu_seqlens_k": int32(-1, 3, 9)}, ValueError, "cu_seqlens_k must start at 0, got -1"),
    ({"cu_seqlens_q": int32(0, 8, 7)}, ValueError, "cu_seqlens_q must not decrease, got 8 then 7 at position 2"),
    ({"cu_seqlens_k": int32(0, -2, 9)}, ValueError, "cu_seqlens_k must not decrease, got 0 then -2 at position 1"),
    ({"cu_seqlens_q": int32(0, 3, 6)}, ValueError, "cu_seqlens_q must end at the packed length 7, got 6"),
    ({"cu_seqlens_k": int32(0, 3, 10)}, ValueError, "cu_seqlens_k must end at the packed length 9, got 10"),
    ({"max_seqlen_q": 3}, ValueError, r"max_seqlen_q must be at least the longest sequence \(4\), got 3"),
    ({"max_seqlen_k": 4}, ValueError, r"max_seqlen_k must be at least the longest sequence \(5\), got 4"),
]
ERRORS = [
    *VALUE_ERRORS,
    ({"q": torch.ones(7, 64)}, ValueError, r"q must have shape \[Tq, H, D\], got \[7, 64\]"),
    ({"q": torch.ones(7, 2, 32).int()}, TypeError, "q must be float32 or float16 or .* got int32"),
    ({"k": torch.ones(9, 3, 32)}, ValueError, r"k must have shape \[Tk, H, D\], got \[9, 3, 32\]; H=2 is fixed by q"),
    ({"k": torch.ones(9, 2, 32).half()}, TypeError, "k must be float32 like q, got float16"),
    ({"v": torch.ones(8, 2, 32)}, ValueError, r"v must have shape \[Tk, H, D\], got \[8, 2, 32\]; Tk=9 is fixed by k"),
    ({"v": torch.ones(9, 2, 32).double()}, TypeError, "v must be float32 like q, got float64"),
    ({"cu_seqlens_q": torch.tensor([0.0, 3, 7])}, TypeError, "cu_seqlens_q must be int32 or int64, got float32"),
    ({"cu_seqlens_k": [0, 5, 9]}, TypeError, "cu_seqlens_k must be a tensor, got list"),
    (
        {"cu_seqlens_k": int32(0, 9)},
        ValueError,
        r"cu_seqlens_k must have shape \[B\+1\], got \[2\]; B\+1=3 is fixed by",
    ),
    ({"cu_seqlens_q": int32(), "cu_seqlens_k": int32()}, ValueError, "cu_seqlens_q must hold at least the leading 0"),
    ({"max_seqlen_q": torch.tensor(4)}, TypeError, r"max_seqlen_q must be an int, got a tensor; .item\(\) would wait"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k must not be negative, got -1"),
    ({"v": torch.ones(9, 2, 32, device="meta")}, ValueError, "v must be on cpu like q, got meta"),
]


def test_error_messages():
    inputs = make_inputs([3, 4], [5, 4], torch.float32)
    for change, error, message in ERRORS:
        for function in (cross_attention, cross_attention_with_lse):
            with pytest.raises(error, match=f"^hia::cross_attention(_with_lse)?: {message}"):
                function(**{**inputs, **change})
    for head_dim in (8, 40, 656):
        inputs = make_inputs([3], [4], torch.float32, head_dim=head_dim)
        message = rf"^hia::cross_attention: q must have head_dim a multiple of 16 in \[16, 640\], got {head_dim}"
        with pytest.raises(ValueError, match=message):
            cross_attention(**inputs)


def test_values_are_checked_in_compiled_code():
    compiled = torch.compile(cross_attention, backend="aot_eager", fullgraph=True)
    inputs = make_inputs([3, 4], [5, 4], torch.float32)
    compiled(**inputs)
    for change, error, message in VALUE_ERRORS:
        with pytest.raises(error, match=f"^hia::cross_attention: {message}"):
            compiled(**{**inputs, **change})


def test_no_gradient_of_gradients():
    inputs = make_inputs([3], [4], torch.float32)
    q = inputs["q"].detach().requires_grad_()
    (dq,) = torch.autograd.grad(cross_attention(**{**inputs, "q": q}).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="hia::cross_attention: gradients of gradients are not implemented"):
        dq.sum().backward()
