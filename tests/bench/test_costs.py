"""FLOPs and bytes of ops and composites."""

from __future__ import annotations

import pytest
import torch

from bench import workloads
from bench.measure import costs
from bench.providers import layers


def workload(op, case, role=""):
    return workloads.Workload(op, workloads.CASES[case], role)


@pytest.mark.parametrize("role", ["extract", "inject"])
def test_costs_of_attention_are_those_of_its_page(role):
    found = workload("cross_attention", "tiny", role)
    given = workloads.make_inputs(found, torch.float32, "cpu")
    (tq, heads, dim), lk = given["q"].shape, given["max_seqlen_k"]
    product = 2 * tq * lk * heads * dim
    assert costs.flops(found, given, None, "forward") == 2 * product
    assert costs.flops(found, given, None, "backward") == 5 * product
    assert costs.flops(found, given, None, "both") == 7 * product
    tensors = (given["q"].numel() + given["k"].numel()) * 2 * 4
    packing = sum(given[f"cu_seqlens_{name}"].nbytes for name in "qk")
    assert costs.moved_bytes(found, given, None, (), "forward", itemsize=4) == tensors + packing


def test_a_composites_passes_add_up():
    """A backward of products alone is two products for each of the forward's; attention's is five for two."""
    found = workload("inject", "tiny")
    given = workloads.make_inputs(found, torch.float32, "cpu")
    weights = layers.make_weights(found.case, torch.float32, "cpu")
    forward, backward, both = (costs.flops(found, given, weights, mode) for mode in ("forward", "backward", "both"))
    assert forward + backward == both and 2 * forward <= backward <= 2.5 * forward


def test_ragged_attention_is_counted_by_its_lengths():
    found = workload("cross_attention", "tiny-ragged", "extract")
    lengths_q, lengths_k = found.case.attention_lengths("extract")
    given = workloads.make_inputs(found, torch.float32, "cpu")
    exact = 4 * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True)) * found.case.config.dim
    assert costs.flops(found, given, None, "forward") == exact


def test_second_question_saves_the_encoder():
    counted = {}
    for op in ("encode", "extract", "inject", "second_question", "adapter_layer"):
        found = workloads.Workload(op, workloads.CASES["tiny"])
        given = workloads.make_inputs(found, torch.float32, "cpu")
        weights = layers.make_weights(found.case, torch.float32, "cpu")
        counted[op] = costs.flops(found, given, weights, "forward")
    assert counted["second_question"] == counted["extract"] + counted["inject"]
    assert counted["adapter_layer"] == counted["second_question"] + counted["encode"]


@pytest.mark.parametrize(
    ("op", "role", "gathered"), [("condition_queries", "", "hidden"), ("norm_linear", "visual", "x")]
)
def test_gathering_reads_the_rows_that_are_named(op, role, gathered):
    found = workload(op, "tiny", role)
    given = workloads.make_inputs(found, torch.float32, "cpu")
    source, rows = given[gathered], given["row_idx"]
    assert rows.shape[0] < source.shape[0], "a case that reads every row proves nothing"
    others = sum(value.nbytes for name, value in given.items() if name != gathered and isinstance(value, torch.Tensor))
    out = found.entry.public(**given)
    expected = rows.shape[0] * source.shape[1] * source.element_size() + others + out.nbytes
    assert found.entry.inputs.moved_bytes(found.shape, 4, "forward") == expected
