"""Operators and launches that the host issues for one layer's question on a GPU, kernel by kernel and by a graph.

The numbers of docs/adapter.md, "Layers as graphs".
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.launches.device import TARGETS
from bench.launches.record import Recording, recorded
from bench.launches.workloads import stored_configurations
from bench.providers.layers import make_weights, our_step
from bench.workloads import make_inputs, workloads
from hia.layers.features import ImageFeatures
from hia.layers.graphs import Weights, call_of
from hia_kernels.core import triton_support

pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process"),
]


class Issued(TorchDispatchMode):
    """Counts PyTorch's own operators, those inside of ours too, and views apart."""

    def __init__(self):
        super().__init__()
        self.operators = self.views = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            self.views += 1
        else:
            self.operators += 1
        return func(*args, **(kwargs or {}))

    def since(self, before=(0, 0, 0)):
        found = (self.operators, self.views, self.launches)
        return tuple(now - then for now, then in zip(found, before, strict=True))


ISSUED = [  # operators, views and launches of Triton kernels
    pytest.param("13b-896-2img", False, "ln_folded_kv", (25, 12, 7), id="paper-first-question"),
    pytest.param("13b-896-2img", True, "cached_kv", (16, 12, 7), id="paper-later-question"),
    pytest.param("13b-released-896-2img", False, "ln_folded_absorbed", (46, 36, 9), id="released-first-question"),
    pytest.param("13b-released-896-2img", True, "cached_kv", (25, 12, 9), id="released-later-question"),
]


@pytest.mark.parametrize(("case", "kept", "form", "eager"), ISSUED)
@torch.no_grad()
def test_a_replay_leaves_the_host_five_operators_and_one_launch(case, kept, form, eager, monkeypatch):
    issued, add, kernels = Issued(), Recording.add, []

    def counted(recording, launch, grid):
        issued.launches += 1
        kernels.append((launch.kernel, launch.configuration, grid))
        add(recording, launch, grid)

    monkeypatch.setattr(Recording, "add", counted)
    workload = next(one for one in workloads("second_question") if one.name == case)
    with issued, stored_configurations(used=False), recorded(TARGETS["sm_90"]):
        step = our_step(workload.case, make_weights(workload.case, torch.bfloat16, "cuda"))
        inputs = make_inputs(workload, torch.bfloat16, "cuda")
        step.prepare("second_question", inputs)
        layer, rows, layout = step.adapter.layer(step.layer), inputs["hidden"].flatten(0, 1), inputs["layout"]
        packed = ImageFeatures(inputs["maps"], step.caches if kept else ()).packed()
        weights = Weights((), layer.extractor.current())
        call = call_of(layer, rows, packed, layout, weights)  # what all layers share is made here
        buffers = call.allocate()
        before, kernels[:] = issued.since(), []
        layer(inputs["hidden"], packed, layout)
        assert issued.since(before) == eager and call.forms[0] == form
        by_kernel, kernels[:] = list(kernels), []
        call.compute(*buffers)
        assert kernels == by_kernel and len(kernels) == eager[2]  # what is captured are the same kernels
        before = issued.since()
        call.fill(buffers)
        call.take(buffers[1])
        assert issued.since(before) == (5, 0, 0)  # and the replay, which is one launch
