"""``bench.workloads``: found by itself, complete, and drawn without values where nothing has any."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

import hia_kernels
from bench import workloads
from bench.workloads.adapter import layout_of
from tests.inputs import OPS


def test_every_op_has_an_entry_and_no_other_has():
    assert set(workloads.ops()) == set(OPS)
    for op in workloads.ops():
        found = workloads.op_entry(op)
        assert found.public is getattr(hia_kernels, op)
        assert set(found.trained) <= set(found.inputs.DIFFERENTIABLE)
        assert isinstance(found.regression, found.inputs.Shape)
        wanted = list(inspect.signature(found.public).parameters)
        given = inspect.signature(found.reference).parameters
        assert [name for name in wanted if name in given] == wanted, f"{op}: the reference takes other arguments"


def test_unknown_and_taken_names():
    for look_up in (workloads.entry, workloads.op_entry, workloads.composite_entry, workloads.unregister):
        with pytest.raises(ValueError, match="op must be among .*linear.*, got 'linaer'"):
            look_up("linaer")
    with pytest.raises(ValueError, match="op must be among .*, got the composite 'encode'"):
        workloads.op_entry("encode")
    with pytest.raises(ValueError, match="composite must be among .*encode.*, got the op 'linear'"):
        workloads.composite_entry("linear")
    with pytest.raises(ValueError, match="name must be new, got 'linear', which is registered"):
        workloads.register(workloads.op_entry("linear"))


@pytest.mark.parametrize("op", OPS)
def test_what_a_gpu_runs_is_drawn_of_fake_tensors(op):
    """The compile tier records the launches of shapes that this machine has no memory for."""
    found = [workload for workload in workloads.gpu_workloads() if workload.op == op]
    assert found
    for workload in found:
        with FakeTensorMode():
            given = workloads.make_inputs(workload, torch.bfloat16, "cpu")
        tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
        assert tensors and all(isinstance(x, FakeTensor) for x in tensors), workload.name


@pytest.mark.parametrize("name", ["tiny-ragged", "13b-ragged-b4", "13b-896-2img-b4"])
def test_rows_are_those_of_the_layout(name):
    """An op's shape lists the rows that the layer's layout selects."""
    case = workloads.CASES[name]
    layout = layout_of(case, "cpu")
    for runs, rows in ((case.visual_runs, layout.visual_rows), (case.instruction_runs, layout.instruction_rows)):
        assert torch.equal(torch.cat([torch.arange(start, stop) for start, stop in runs]), rows)
