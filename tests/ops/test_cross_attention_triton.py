"""``cross_attention`` in Triton: fused and staged, split over keys or not, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hia_kernels import cross_attention, cross_attention_with_lse, last_backend, use_backend
from hia_kernels.ops.cross_attention.reference import cross_attention_ref, cross_attention_with_lse_ref
from tests.inputs import cross_attention_inputs as make_inputs
from tests.ops.harness import DTYPES, HALVES, assert_identical, assert_matches, forward_backward
from tests.ops.interpreter import loop_bounds_are_ints  # noqa: F401

triton_split = pytest.importorskip(
    "hia_kernels.ops.cross_attention.triton_split", reason="NO TRITON: its kernels are not tested"
)
pytestmark = pytest.mark.interpreter

OP = "cross_attention"
CASES = [
    pytest.param([20, 5], [40, 70], {"head_dim": 32}, id="ragged"),
    pytest.param([3], [33 * 33], {"head_dim": 16}, id="odd-grid"),
    pytest.param([4, 0, 7, 2], [9, 5, 0, 1], {"head_dim": 80}, id="empty-and-single"),
    pytest.param([9], [33], {"head_dim": 96}, id="head-dim-96"),
    pytest.param([130], [150], {"head_dim": 128, "heads": 1}, id="several-blocks"),
    pytest.param([5], [60], {"head_dim": 256, "heads": 1}, id="widest-fused"),
    pytest.param([5, 17], [20, 200], {"head_dim": 512}, id="staged-512"),
    pytest.param([5], [40], {"head_dim": 640}, id="staged-640"),
]


@pytest.fixture(autouse=True)
def in_triton():
    with use_backend("triton"):
        yield


@pytest.mark.parametrize(("lengths_q", "lengths_k", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(lengths_q, lengths_k, options, dtype, triton_device):
    inputs = make_inputs(lengths_q, lengths_k, dtype, triton_device, **options)
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, dtype)
    assert last_backend(OP) == "triton"


@pytest.mark.parametrize("head_dim", [32, 512], ids=["fused", "staged"])
@pytest.mark.parametrize("splits", [1, 2, 5], ids="splits-{}".format)
def test_any_number_of_splits(splits, head_dim, triton_device, monkeypatch):
    """More of them than blocks of keys, too: some shares are empty."""
    from hia_kernels.ops.cross_attention import triton_bwd, triton_fwd, triton_staged

    for module in (triton_fwd, triton_bwd, triton_staged):
        monkeypatch.setattr(module, "split_count", lambda *_: splits)
    inputs = make_inputs([7, 3], [300, 20], torch.float16, triton_device, head_dim=head_dim)
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_without_lse(dtype, triton_device):
    inputs = make_inputs([7, 3], [30, 20], dtype, triton_device)
    with torch.no_grad():
        assert torch.equal(cross_attention(**inputs), cross_attention_with_lse(**inputs)[0])
    assert_matches(OP, cross_attention, cross_attention_ref, inputs, dtype)


def test_workspace_in_several_chunks(triton_device, monkeypatch):
    from hia_kernels.ops.cross_attention import triton_staged

    inputs = make_inputs([7, 3], [30, 20], torch.float16, triton_device, head_dim=512, heads=3)
    whole = forward_backward(OP, cross_attention_with_lse, inputs)
    monkeypatch.setattr(triton_staged, "WORKSPACE", 1)
    monkeypatch.setattr(triton_staged, "split_count", lambda *_: 1)
    assert_identical(forward_backward(OP, cross_attention_with_lse, inputs), whole)


@pytest.mark.parametrize("head_dim", [32, 640], ids=["fused", "staged"])
def test_two_runs_and_neighbours(head_dim, triton_device):
    """Bit for bit: a second run, and a sequence by itself."""
    inputs = make_inputs([5, 9], [40, 17], torch.float16, triton_device, head_dim=head_dim)
    first = forward_backward(OP, cross_attention_with_lse, inputs)
    assert_identical(first, forward_backward(OP, cross_attention_with_lse, inputs))
    with torch.no_grad():
        together = cross_attention(**inputs)
        alone = {
            **inputs, "q": inputs["q"][5:], "k": inputs["k"][40:], "v": inputs["v"][40:],
            "cu_seqlens_q": torch.tensor([0, 9], dtype=torch.int32, device=triton_device),
            "cu_seqlens_k": torch.tensor([0, 17], dtype=torch.int32, device=triton_device),
        }  # fmt: skip
        assert torch.equal(cross_attention(**alone), together[5:])


def test_what_lies_behind_a_sequence_is_not_seen(triton_device):
    inputs = make_inputs([5, 9], [40, 17], torch.float16, triton_device)
    expected = cross_attention(**inputs)[:5]
    for name, start in (("q", 5), ("k", 40), ("v", 40)):
        inputs[name] = inputs[name].clone()
        inputs[name][start:] = float("nan")
    assert torch.equal(cross_attention(**inputs)[:5], expected)


def test_channels_that_are_strided_and_a_negative_scale(triton_device):
    inputs = make_inputs([5], [20], torch.float16, triton_device)
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["softmax_scale"] = -0.3
    assert inputs["q"].stride(-1) != 1
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, torch.float16)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 40)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 112, 272]),
)
def test_any_packing(lengths, heads, head_dim, triton_device):
    lengths_q, lengths_k = (list(column) for column in zip(*lengths, strict=True))
    inputs = make_inputs(lengths_q, lengths_k, torch.float16, triton_device, heads=heads, head_dim=head_dim)
    assert_matches(OP, cross_attention_with_lse, cross_attention_with_lse_ref, inputs, torch.float16)


def test_splits_follow_shapes_alone():
    device = torch.device("cpu")
    assert triton_split.split_count(1, 256, device) == triton_split.MAX_SPLITS
    assert triton_split.split_count(10_000, 256, device) == 1
    assert triton_split.split_count(1, 1, device) == 1
