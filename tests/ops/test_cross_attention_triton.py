"""Triton kernels of ``hia::cross_attention``, in the interpreter or on a GPU."""

from importlib import import_module
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from hia_kernels import cross_attention, cross_attention_with_lse, last_backend, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.cross_attention.inputs import packing
from hia_kernels.ops.cross_attention.reference import cross_attention_bwd_ref as backward_ref
from hia_kernels.ops.cross_attention.reference import cross_attention_ref, cross_attention_with_lse_ref
from hia_kernels.testing import OUT_SLACK, analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import assert_matches, assert_repeatable, forward_backward, opcheck, sequence_slack

pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")
pytestmark = pytest.mark.interpreter

OP = "cross_attention"
make_inputs = inputs_of(OP)
CASES = [  # up to head_dim 256 fp16 and bf16 stay in registers; wider ones and fp32 pass through memory
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float32, id="ragged-fp32"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.float16, id="ragged-fp16"),
    pytest.param([7, 1, 12], [9, 30, 5], {}, torch.bfloat16, id="ragged-bf16"),
    pytest.param([0, 7, 3, 0], [5, 0, 4, 0], {}, torch.float32, id="empty-queries-empty-keys-both-fp32"),
    pytest.param([0, 7, 3, 0], [5, 0, 4, 0], {}, torch.bfloat16, id="empty-queries-empty-keys-both-bf16"),
    pytest.param([4], [0], {}, torch.bfloat16, id="no-keys-at-all"),
    pytest.param([0], [4], {}, torch.float32, id="no-queries-at-all"),
    pytest.param([], [], {}, torch.float16, id="no-sequences"),
    pytest.param([1], [1], {"heads": 1, "head_dim": 16}, torch.float16, id="one-query-one-key"),
    pytest.param([140, 5], [17, 300], {"head_dim": 16}, torch.float16, id="several-blocks-of-queries-and-keys-fp16"),
    pytest.param([140, 5], [17, 300], {"head_dim": 16}, torch.float32, id="several-blocks-of-queries-and-keys-fp32"),
    pytest.param([33, 5], [17, 40], {"head_dim": 80}, torch.bfloat16, id="head-dim-80-bf16"),
    pytest.param([70, 5], [128, 64], {"head_dim": 96}, torch.float16, id="head-dim-96-whole-blocks-of-keys"),
    pytest.param([33, 5], [17, 70], {"head_dim": 192}, torch.bfloat16, id="head-dim-192"),
    pytest.param([33, 5], [17, 40], {"head_dim": 272}, torch.float16, id="head-dim-272-part-of-a-slice"),
    pytest.param([33, 5], [17, 40], {"head_dim": 512}, torch.float16, id="head-dim-512"),
    pytest.param([70, 5], [17, 140], {"head_dim": 640, "heads": 1}, torch.bfloat16, id="head-dim-640-bf16"),
    pytest.param([9], [70], {"head_dim": 640, "heads": 1}, torch.float32, id="head-dim-640-fp32"),
    pytest.param([3, 2], [33 * 33, 5], {"heads": 1, "head_dim": 16}, torch.float16, id="1089-keys"),
]


@pytest.fixture(autouse=True)
def forced():
    with use_backend("triton"):
        yield


@pytest.fixture
def modules():
    """Import the kernels when first used: after this process has decided on the interpreter."""
    names = ("fwd", "bwd", "split", "unfused", "unfused_fwd", "unfused_bwd")
    return SimpleNamespace(**{n: import_module(f"hia_kernels.ops.cross_attention.triton_{n}") for n in names})


@pytest.fixture
def split(modules, monkeypatch):
    """Cut every sequence's keys into as many splits as asked for, or as it has keys."""

    def into(splits):
        heuristic = modules.split.SplitHeuristic(splits, splits, 1)
        for module in (modules.fwd, modules.bwd, modules.unfused_fwd, modules.unfused_bwd):
            monkeypatch.setattr(module, "split_heuristic", lambda *sizes: heuristic)

    return into


def assert_both_match(inputs, dtype):
    head_dim = inputs["q"].shape[-1]
    in_sequence = dict.fromkeys(("out", "dq", "dk", "dv"), head_dim)  # of the scores, and of dout v in the backward
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, dtype, in_sequence)
    with torch.no_grad():
        out = cross_attention(**inputs)
    exact, plain = cross_attention_ref(**analysed(inputs, dtype)), cross_attention_ref(**inputs)
    slack = OUT_SLACK + (sequence_slack(head_dim) if dtype == torch.float32 and out.is_cuda else 0)
    assert_close("out without lse", out, exact, plain, dtype=dtype, slack=slack)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize(("lengths_q", "lengths_k", "options", "dtype"), CASES)
def test_matches_reference(lengths_q, lengths_k, options, dtype, triton_device):
    assert_both_match(make_inputs(lengths_q, lengths_k, dtype, triton_device, **options), dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(32, torch.float32), (80, torch.bfloat16), (272, torch.float16)], ids=str
)
def test_splits_of_the_keys(head_dim, dtype, split, triton_device):
    """Cut into more splits than some sequences have blocks of keys, and one sequence without keys."""
    inputs = make_inputs([7, 5, 2], [9, 300, 0], dtype, triton_device, head_dim=head_dim, heads=1)
    split(3)
    assert_both_match(inputs, dtype)
    assert_repeatable(OP, cross_attention_with_lse, inputs)


@pytest.mark.parametrize("head_dim", [64, 272])
def test_splits_without_keys_change_no_bit(head_dim, split, triton_device):
    """Keep the bits with empty splits and with a generous max_seqlen, which bounds the number of splits."""
    inputs = make_inputs([7, 5], [9, 20], torch.float16, triton_device, head_dim=head_dim)
    results = []
    for splits in (1, 4):
        split(splits)
        results.append(forward_backward(OP, cross_attention_with_lse, {**inputs, "max_seqlen_k": 200 * splits}))
    assert all(torch.equal(x, y) for x, y in zip(results[0].values(), results[1].values(), strict=True))


KEYS = (0, 511, 512, 784, 4095, 6143, 6144, 16384, 2**20)
RULES = [  # heads, head_dim, dtype, block_m, slices: splits of KEYS
    pytest.param((40, 128, torch.bfloat16, 128, 1), (1, 1, 1, 1, 1, 1, 3, 3, 3), id="13b-fused"),
    pytest.param((8, 640, torch.bfloat16, 128, 5), (1, 1, 1, 1, 1, 1, 3, 3, 3), id="13b-released"),
    pytest.param((8, 512, torch.bfloat16, 128, 4), (1, 1, 1, 1, 1, 2, 2, 2, 2), id="7b-released"),
    pytest.param((8, 128, torch.float16, 128, 1), (1, 1, 2, 3, 8, 8, 8, 8, 8), id="few-heads"),
    pytest.param((1, 16, torch.float16, 128, 1), (1, 1, 2, 3, 15, 16, 16, 16, 16), id="one-head"),
    pytest.param((80, 128, torch.bfloat16, 128, 1), (1,) * 9, id="many-heads"),
    pytest.param((8, 640, torch.float32, 64, 10), (1,) * 9, id="fp32-released"),
    pytest.param((1, 16, torch.float32, 64, 1), (1, 3, 4, 6, 16, 16, 16, 16, 16), id="fp32-one-head"),
]


@pytest.mark.parametrize(("sizes", "expected"), RULES)
def test_number_of_splits(sizes, expected, modules):
    """Count splits for 132 multiprocessors, as in the interpreter: full waves of programs from one image."""
    heads, head_dim, dtype, block_m, slices = sizes
    heuristic = modules.split.split_heuristic(torch.empty(1, heads, head_dim, dtype=dtype), block_m, slices)
    assert tuple(heuristic.count(length) for length in KEYS) == expected
    programs = heuristic.max_splits * heads * slices * (256 // block_m)
    assert programs >= 132 * 0.9 or heuristic.max_splits == 16


def test_number_of_splits_grows_with_the_keys(modules):
    """Check that the count never falls: else ``max_seqlen_k`` would not bound it."""
    for sizes in ((1, 1, 1), (1, 3, 7), (5, 5, 4), (2, 3, 100)):
        counts = [modules.split.SplitHeuristic(*sizes).count(length) for length in range(400)]
        assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == sizes[1]


@pytest.mark.parametrize("lengths", [([7, 5, 3], [64, 1, 200]), ([70], [300])], ids=["ragged", "a-rest"])
def test_the_tail_in_the_loop_changes_no_bit(lengths, modules, monkeypatch, triton_device):
    """Mask the last, partial block inside the pipelined loop: what ``bench tune`` may choose for a device."""
    inputs = make_inputs(*lengths, torch.float16, triton_device)
    results = [cross_attention_with_lse(**inputs)]
    before = modules.fwd.tuning.pick
    configs = []

    def pick(*arguments):
        configs.append({**before(*arguments), "TAIL_IN_LOOP": 1})
        return configs[-1]

    monkeypatch.setattr(modules.fwd.tuning, "pick", pick)
    results.append(cross_attention_with_lse(**inputs))
    assert configs and all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("splits", [1, 3])
def test_pointers_computed_in_place_of_loop_carried(splits, split, modules, monkeypatch, triton_device):
    """Compute pointers from rows, as AMD's compiler needs it: whole blocks of keys, a rest, splits from the middle."""
    split(splits)
    for module in (modules.fwd, modules.bwd):
        monkeypatch.setattr(module, "is_carried", lambda device: False)
    assert_both_match(make_inputs([7, 3], [300, 17], torch.float16, triton_device, head_dim=16), torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_workspace_for_a_few_heads_at_a_time(dtype, modules, monkeypatch, triton_device):
    unfused = modules.unfused
    assert unfused.workspace_chunks(16, unfused.WORKSPACE // 4) == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert unfused.workspace_chunks(3, unfused.WORKSPACE * 2) == [(0, 1), (1, 1), (2, 1)]
    assert unfused.workspace_chunks(80, 1000) == [(0, 80)]
    monkeypatch.setattr(unfused, "WORKSPACE", 128 * 128 * 4)
    assert_both_match(make_inputs([7, 3], [9, 40], dtype, triton_device, heads=3, head_dim=272), dtype)


@pytest.mark.parametrize("head_dim", [32, 320])
def test_any_strides(head_dim, triton_device):
    """Take strided channels, one head's keys for all, a gradient through a transpose and a strided one of lse."""
    dtype = torch.float16
    inputs = make_inputs([5, 4], [6, 3], dtype, triton_device, head_dim=head_dim)
    inputs["q"] = inputs["q"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 2, -1)
    inputs["v"] = inputs["v"].transpose(0, 1).contiguous().transpose(0, 1)
    q, k, v, *rest = inputs.values()
    out, lse = cross_attention_with_lse(**inputs)
    exact, plain = cross_attention_ref(**analysed(inputs, dtype)), cross_attention_ref(**inputs)
    assert_close("out", out, exact, plain, dtype=dtype)
    dout = torch.randn(head_dim, 2, 9, device=triton_device).to(dtype).permute(2, 1, 0)
    dlse = torch.randn(9, 2, device=triton_device).T
    arguments = dout, dlse, q, k, v, out, lse
    got, plain = (function(*arguments, *rest) for function in (torch.ops.hia.cross_attention_bwd, backward_ref))
    exact = backward_ref(*(x.double() for x in arguments), *rest)
    for name, *values in zip(("dq", "dk", "dv"), got, exact, plain, strict=True):
        assert values[0].is_contiguous()
        assert_close(name, *values, dtype=dtype, slack=4)


def test_a_huge_row_stride_is_copied(modules):
    x = torch.empty_strided((2, 1, 16), (2**24, 16, 1), device="meta")
    assert modules.split.row_contiguous(x)[0].stride(0) == 16 and modules.split.row_contiguous(x[:1])[0] is not None


def test_negative_and_zero_scale(triton_device):
    for scale, dtype in product((-0.5, 0.0), (torch.float16, torch.float32)):
        inputs = make_inputs([5, 4], [6, 3], dtype, triton_device, head_dim=16)
        assert_both_match({**inputs, "softmax_scale": scale}, dtype)


@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.bfloat16), (32, torch.float32)], ids=str)
def test_large_scores_do_not_overflow(head_dim, dtype, triton_device):
    inputs = make_inputs([5, 3], [200, 2], dtype, triton_device, head_dim=head_dim)
    inputs["q"] = inputs["q"] * 1e4
    got = forward_backward(OP, cross_attention_with_lse, inputs)
    exact = cross_attention_with_lse_ref(**analysed(inputs, dtype))
    plain = cross_attention_with_lse_ref(**inputs)
    for i, name in enumerate(("out", "lse")):
        assert_close(name, got[name], exact[i], plain[i], dtype=dtype)
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize(("head_dim", "dtype"), [(48, torch.float16), (48, torch.float32)], ids=str)
def test_nan_beyond_a_sequence_does_not_leak(head_dim, dtype, triton_device):
    """Fill the neighbours with NaN, infinity, and an lse that would overflow."""
    inputs = make_inputs([4, 6, 3], [8, 3, 9], dtype, triton_device, head_dim=head_dim)
    clean = forward_backward(OP, cross_attention_with_lse, inputs)
    dirty = {name: inputs[name].clone() for name in "qkv"}
    dirty["q"][:4] = dirty["k"][:8] = dirty["v"][:8] = float("nan")
    dirty["q"][10:] = dirty["k"][11:] = dirty["v"][11:] = float("inf")
    leaked = forward_backward(OP, cross_attention_with_lse, {**inputs, **dirty})
    inside = {"out": slice(4, 10), "dq": slice(4, 10), "dk": slice(8, 11), "dv": slice(8, 11)}
    for name, rows in inside.items():
        assert torch.equal(leaked[name][rows], clean[name][rows]), name
        assert leaked[name][: rows.start].isnan().all(), name
    assert torch.equal(leaked["lse"][:, 4:10], clean["lse"][:, 4:10])


def assert_packed_is_one_at_a_time(inputs, lengths_q, lengths_k):
    """Compare every sequence with itself alone, forward and backward, with a max_seqlen of its own."""
    device = inputs["q"].device
    seeded = torch.Generator().manual_seed(7)
    dout = torch.randn(inputs["q"].shape, generator=seeded).to(device, inputs["q"].dtype)
    dlse = torch.randn(inputs["q"].shape[1], sum(lengths_q), generator=seeded).to(device)
    packed = with_gradients(inputs, dout, dlse)
    starts_q, starts_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    for b, (lq, lk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        alone = {"q": inputs["q"][rows_q], "k": inputs["k"][rows_k], "v": inputs["v"][rows_k]}
        one = with_gradients({**inputs, **alone, **packing([lq], [lk], device)}, dout[rows_q], dlse[:, rows_q])
        there = (packed[0][rows_q], packed[1][:, rows_q], packed[2][rows_q], *(x[rows_k] for x in packed[3:]))
        for name, got, expected in zip(("out", "lse", "dq", "dk", "dv"), there, one, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected), f"{name} of sequence {b}"
            assert torch.equal(got.signbit(), expected.signbit()), f"sign of {name} of sequence {b}"
    assert last_backend(OP) == "triton"


def with_gradients(inputs, dout, dlse):
    """Return out, lse, dq, dk, dv."""
    q, k, v = (inputs[name].detach().requires_grad_() for name in "qkv")
    out, lse = cross_attention_with_lse(**{**inputs, "q": q, "k": k, "v": v})
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))


@pytest.mark.parametrize(
    ("head_dim", "dtype", "splits"),
    [
        (32, torch.float16, 1),
        (32, torch.float16, 3),
        (80, torch.bfloat16, 3),
        (272, torch.float16, 1),
        (272, torch.float16, 3),
        (32, torch.float32, 1),
    ],
    ids=str,
)
def test_packed_is_one_at_a_time_bit_for_bit(head_dim, dtype, splits, split, triton_device):
    """Pack few queries and many, no keys, one, and more than a block of them."""
    split(splits)
    lengths_q, lengths_k = [7, 0, 70, 1, 3], [9, 30, 300, 0, 1]
    inputs = make_inputs(lengths_q, lengths_k, dtype, triton_device, head_dim=head_dim)
    assert_packed_is_one_at_a_time(inputs, lengths_q, lengths_k)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, torch.float16), (16, torch.float32), (272, torch.float16)], ids=str
)
def test_packed_is_one_at_a_time_with_the_splits_of_its_own(head_dim, dtype, modules, triton_device):
    """Pack a sequence long enough for the launcher to split it beside some that are not."""
    lengths_q, lengths_k = [7, 1, 3], [9, 4500, 0]
    inputs = make_inputs(lengths_q, lengths_k, dtype, triton_device, heads=1, head_dim=head_dim)
    assert modules.split.split_heuristic(inputs["q"], 64).count(4500) > 1
    assert_packed_is_one_at_a_time(inputs, lengths_q, lengths_k)


def test_two_runs_are_bit_identical(triton_device):
    for dtype in (torch.float32, torch.bfloat16):
        assert_repeatable(OP, cross_attention_with_lse, make_inputs([9, 7], [150, 9], dtype, triton_device))


def test_opcheck(triton_device):
    inputs = make_inputs([3, 0, 4], [5, 4, 0], torch.float32, triton_device, head_dim=16)
    opcheck(OP, torch.ops.hia.cross_attention_with_lse.default, inputs)


def test_fp64_is_left_to_the_reference(triton_device):
    with pytest.raises(NotImplementedError, match="triton: float64 is left to the reference"):
        cross_attention(**make_inputs([3], [4], torch.float64, triton_device))
    assert triton_support.unavailable_reasons() == []


def test_every_head_dim_has_blocks(modules, monkeypatch):
    fwd, bwd = modules.fwd, modules.bwd
    for family, head_dim in product(("amd", "ampere", "hopper", "blackwell"), range(16, 656, 16)):
        monkeypatch.setattr(fwd, "family_of", lambda device, family=family: family)
        q = torch.empty(1, 1, head_dim, dtype=torch.float16)
        assert fwd.is_fused(q) == (head_dim <= (128 if family == "ampere" else 256))
        assert not fwd.is_fused(q.float())
        if fwd.is_fused(q):
            for table in (fwd.BLOCKS, bwd.DQ_BLOCKS, bwd.DKV_BLOCKS):
                assert len(fwd.blocks_of(table, q)) == 4
