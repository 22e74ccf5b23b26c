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


def test_the_named_shapes_are_the_real_ones():
    case = workloads.CASES["13b-896-2img-b4"]
    assert (case.hidden_size, case.batch, case.images, case.seq_len) == (5120, 4, 8, 2 * 576 + 60)
    assert case.feature_lengths == [28 * 28] * 8 and case.config.head_dim == 128
    assert workloads.CASES["13b-released-896-2img"].config.head_dim == 640
    assert workloads.CASES["7b-released-448"].config.head_dim == 512
    assert workloads.CASES["lite-4096"].config.dim == 1024 and workloads.CASES["lite-4096"].feature_lengths == [
        128 * 128
    ]
    assert not workloads.CASES["13b-ragged-b4"].is_even
    for host in ("13b", "7b"):
        for side in (448, 896, 1792, 4096):
            assert {f"{host}-{side}", f"{host}-{side}-2img", f"{host}-{side}-b4", f"{host}-{side}-2img-b4"} <= set(
                workloads.CASES
            )


@pytest.mark.parametrize("op", workloads.ops() + workloads.composites())
def test_every_op_has_cases_in_every_set(op):
    for name in ("cpu", "gpu", "quick"):
        assert [found for found in workloads.workloads(op) if workloads.in_set(found, name)], f"{op} has none in {name}"


def test_unknown_op_of_workloads():
    with pytest.raises(ValueError, match="op must be among .*, got 'stemm'"):
        workloads.workloads("stemm")
