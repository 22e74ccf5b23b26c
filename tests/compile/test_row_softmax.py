"""The order of a row's sum in compiled ``row_softmax``: it follows where rows lie, and in place it is the same."""

from __future__ import annotations

import re

import pytest
import torch

import hia_kernels
from bench.launches.compile import _source
from bench.launches.device import TARGETS
from bench.launches.record import recorded
from hia_kernels.core import triton_support

triton = pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process"),
]
PROMISED = [  # columns, first element, elements from row to row
    pytest.param(784, 0, 784, id="whole"),
    pytest.param(70, 0, 70, id="columns-no-multiple-of-16"),
    pytest.param(70, 1, 79, id="columns-no-multiple-of-16-misaligned"),
    pytest.param(70, 16, 96, id="columns-no-multiple-of-16-in-wider-rows"),
    pytest.param(20000, 16, 20032, id="in-chunks-in-wider-rows"),
    pytest.param(20001, 1, 20003, id="in-chunks-misaligned"),
]


def order_of_sums(function, columns, first, stride, dtype):
    """Return the kernel that a call launches, and which elements its reductions have in which thread."""
    with recorded(TARGETS["sm_90"]) as found:
        memory = torch.empty(first + 4 * stride, dtype=dtype, device="cuda")
        function(memory.as_strided((4, columns), (stride, 1), first), 0.5)
    (launch,) = found.launches
    compiled = triton.compile(_source(launch), target=TARGETS["sm_90"].gpu_target(), options=dict(launch.options))
    text = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, flags=re.MULTILINE))
    reduced = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<[^>]*?(#\w+)>', text, flags=re.DOTALL)
    assert len(reduced) == 2, "the maximum and the sum"
    return launch.kernel, [layouts[name] for name in reduced]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("columns", "first", "stride"), PROMISED)
def test_in_place_sums_in_the_same_order(columns, first, stride, dtype):
    where = columns, first, stride, dtype
    assert order_of_sums(hia_kernels.row_softmax_, *where) == order_of_sums(hia_kernels.row_softmax, *where)


def test_the_order_follows_where_rows_lie():
    """Find what docs/row_softmax.md warns of, so that the test above compares something."""
    aligned, misaligned = (order_of_sums(hia_kernels.row_softmax_, 784, first, 784, torch.float32) for first in (0, 1))
    assert aligned[0] == misaligned[0] and aligned[1] != misaligned[1]
