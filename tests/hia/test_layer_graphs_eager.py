"""Calls that graphs of extract and inject cannot serve: they run kernel by kernel, and the reason is told."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hia.layers import graphs
from hia.layers.features import ImageFeatures
from tests.hia.captures import Recorder
from tests.hia.graphed import ROWS, adapter_of, both, eagerly, maps_of, question, recorded, sizes_of


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@contextmanager
def patched(*change):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*change)
        yield


@contextmanager
def debugging(adapter):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIA_DEBUG", "1")
        yield


@contextmanager
def training(adapter):
    adapter.layer(2).train()
    yield
    adapter.layer(2).eval()


@contextmanager
def hooked(adapter):
    seen = []
    handle = adapter.layer(2).injection.register_forward_pre_hook(lambda module, args: seen.append(module))
    yield
    handle.remove()
    assert len(seen) == 3


@contextmanager
def wrapped(adapter):
    injection = adapter.layer(2).injection
    injection.forward = lambda *args, forward=injection.forward: forward(*args)
    yield
    del injection.forward


@contextmanager
def for_cuda(adapter):
    adapter.graphs.device_type = "cuda"
    yield
    adapter.graphs.device_type = "cpu"


@contextmanager
def unfolded(adapter):
    folded, adapter.layer(2).extractor._folded = adapter.layer(2).extractor._folded, None
    yield
    adapter.layer(2).extractor._folded = folded


EAGER = {  # context, and the reason given there
    "gradients": (lambda _: torch.enable_grad(), "gradients are recorded"),
    "autocast": (lambda _: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
    "compiler": (lambda _: patched("torch.compiler.is_compiling", lambda: True), "torch.compile is tracing"),
    "dispatch-mode": (lambda _: Passing(), "a dispatch mode is active"),
    "debugging": (debugging, "HIA_DEBUG=1 reads values"),
    "capturing": (lambda _: patched("hia.cuda_graphs.capturing", lambda _: True), "a graph is being captured"),
    "device": (for_cuda, "hidden states are a Tensor on cpu"),
    "forward-mode": (
        lambda _: torch.autograd.forward_ad.dual_level(),
        "a transform of torch.func or forward-mode AD is active",
    ),
    "training": (training, "the layer is in training mode"),
    "hooks": (hooked, "there are hooks on what a replay does not call"),
    "wrapped": (wrapped, "there are hooks on what a replay does not call"),
    "unfolded": (unfolded, "there are no folded weights"),
    "long": (lambda _: patched(graphs, "LONGEST_SECONDS", 1e-5), "the kernels are estimated to take more than 0.01 ms"),
    "large": (lambda _: patched(graphs, "LARGEST_COPY", 1000), "more than 1000 bytes are read of the features"),
    "switched-off": (eagerly, "graphs are switched off"),
}


@pytest.mark.parametrize(("context", "reason"), EAGER.values(), ids=EAGER)
@torch.no_grad()
def test_where_a_graph_cannot_serve_the_call_is_eager(context, reason):
    adapter = adapter_of()
    recorder, layer = recorded(adapter), adapter.layer(2)
    hidden, layout = question(1)
    packed = ImageFeatures(maps_of()).packed()
    with context(adapter):
        outs = [layer(hidden.clone(), packed, layout) for _ in range(3)]
        reasons = adapter.graphs.eager_reasons(layer, hidden.flatten(0, 1), packed, layout)
    assert reasons == [reason] and recorder.captured == []
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert adapter.graphs.eager_reasons(layer, hidden.flatten(0, 1), packed, layout) == []
    for _ in range(2):
        layer(hidden.clone(), packed, layout)
    assert len(recorder.captured) == 1


@torch.no_grad()
def test_tensors_of_another_kind_or_place_are_refused():
    adapter = adapter_of()
    recorded(adapter)
    hidden, layout = question(1)
    layer, rows, packed = adapter.layer(2), hidden.flatten(0, 1), ImageFeatures(maps_of()).packed()
    elsewhere = packed.to(torch.device("meta"))
    for features, placed in ((elsewhere, layout), (packed, layout.to(torch.device("meta")))):
        reasons = adapter.graphs.eager_reasons(layer, rows, features, placed)
        assert reasons == ["features or layout are elsewhere, or no plain tensors"]
    layer.injection.out_proj.to("meta")
    assert adapter.graphs.eager_reasons(layer, rows, packed, layout) == ["weights are elsewhere"]
    wrapped = torch.nn.Parameter(rows)
    assert "hidden states are a Parameter on cpu" in adapter.graphs.eager_reasons(layer, wrapped, packed, layout)


@torch.no_grad()
def test_a_failed_capture_warns_once_and_stays_eager():
    adapter = adapter_of(layers=(1, 2))
    recorded(adapter, Recorder(fails=lambda buffers: buffers[1].shape[0] == sum(ROWS)))
    (hidden, layout), maps = question(1), maps_of()
    for layer in (1, 2):
        both(adapter, hidden, maps, layout, layer)
    message = (
        "^hia: no CUDA graph of the adapter's layers for 9 visual rows and 52 features, .*: operation not permitted"
    )
    with pytest.warns(UserWarning, match=message):
        expected, got = both(adapter, hidden, maps, layout)
    assert torch.equal(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer in (1, 2, 1, 2):
            expected, got = both(adapter, hidden, maps, layout, layer)
            assert torch.equal(got, expected)
        hidden, layout = question(1, rows=(2, 3, 5))  # of other sizes nothing is known
        for _ in range(2):
            expected, got = both(adapter, hidden, maps, layout)
            assert torch.equal(got, expected)
    assert len(sizes_of(adapter)) == 1


@torch.no_grad()
def test_a_wrong_call_is_refused_though_there_is_a_graph():
    adapter = adapter_of()
    recorder = recorded(adapter)
    (hidden, layout), packed = question(1), ImageFeatures(maps_of()).packed()
    for _ in range(2):
        adapter.layer(2)(hidden.clone(), packed, layout)
    for _ in range(3):
        with pytest.raises(ValueError, match="^hia::condition_queries: weight must have shape"):
            adapter.layer(2)(hidden[..., :32].clone(), packed, layout)
    expected, got = both(adapter, hidden, maps_of(), layout)
    assert torch.equal(got, expected) and recorder.replays == 2
