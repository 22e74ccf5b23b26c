"""Extract and inject under torch.compile and in CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import hia
import hia_kernels
from hia.layers import plan
from hia.layers.features import ImageFeatures
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llava
from tests.hia.test_plan import FORMS, adapter_of, available, question
from tests.inputs import OPS, differentiable, inputs_of, small_inputs

SIDES = (7, 9, 12, 20, 33)
DEVICE = torch.device("cuda")
TRAINED = [forms for forms in FORMS if not forms[0].startswith(("ln_folded", "cached"))]


@pytest.mark.compile
@pytest.mark.parametrize("keep", ["kv", "folded"])
@torch.no_grad()
def test_a_compiled_question_sees_no_stale_caches(processor, keep):
    """Use nothing after a step of the optimizer that was kept of the images before it."""
    base = tiny_llava(layers=2)
    model = stir(hia.get_hia_model(base, tiny_config(base, encoder="strided", layers=[1])))
    a, b, c = random_images()
    batch = processor([TWO, ONE], [[a, b], [c]])
    features = model.encode_images(batch.high_res_pixels, batch.windows, keep=keep)
    asked = {name: value for name, value in batch.items() if name not in ("high_res_pixels", "windows")}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    before = compiled(**asked, features=features).logits
    optimizer = torch.optim.SGD(model.adapter.parameters(), lr=0.1)
    for parameter in model.adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    fresh = model.encode_images(batch.high_res_pixels, batch.windows, keep="features")
    after = compiled(**asked, features=hia.ImageFeatures(fresh.maps, features.caches)).logits
    expected = model(**asked, features=fresh).logits
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 0.1


def sweep(forms: tuple[str, str], preset: str, training: bool, dynamic: bool | None) -> tuple[list[int], int]:
    """Count the graphs after each size of a sweep over three images of different sizes, and the plan's forms."""
    adapter = adapter_of(preset, torch.float32)
    if not training:
        adapter.fold_weights()
    layer, counter, taken = adapter.layer(2), CompileCounter(), set()
    layer.extractor.form, layer.injection.form = forms
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    hidden, _, layout = question(3, torch.float32)
    graphs = []
    for side in SIDES:
        maps = tuple(torch.rand(side + image, side + 2 * image + 1, 128) for image in range(3))
        packed, again = ImageFeatures(maps).packed(), ImageFeatures(maps).packed()
        with torch.set_grad_enabled(training):
            got, expected = compiled(hidden.clone(), packed, layout), layer(hidden.clone(), again, layout)
            taken.add(layer.extractor.form_for(again, 2))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        graphs.append(counter.frame_count)
        if training:
            parameters = list(layer.parameters())
            found = [torch.autograd.grad(out.square().mean(), parameters) for out in (got, expected)]
            for one, other in zip(*found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    return graphs, len(taken)


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    ("preset", "forms"),
    [("paper", ("direct", "direct")), ("released", ("absorbed", "absorbed")), ("released", ("auto", "direct"))],
    ids=["direct", "absorbed", "auto"],
)
def test_a_sweep_of_sizes_compiles_one_graph_a_form(preset, forms, training):
    """Compile one graph with dynamic sizes, and where the plan picks, one more each time it picks another form."""
    graphs, taken = sweep(forms, preset, training, dynamic=True)
    assert graphs[0] == 1 and graphs[-1] == taken
    assert taken == 1 or forms[0] == "auto"


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_without_marks_the_second_size_compiles_the_last_graph(training):
    """Leave it to PyTorch, which takes the first size for a constant, and what differs in the second for dynamic."""
    graphs, _ = sweep(("direct", "direct"), "paper", training, dynamic=None)
    assert graphs == [1, 2, 2, 2, 2]


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_conditioned_queries_compile_once_for_any_sizes(training):
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(hia_kernels.condition_queries, backend=counter, fullgraph=True, dynamic=True)
    for tokens, samples in ((40, 2), (57, 3), (300, 8), (1000, 5)):
        given = inputs_of("condition_queries")(tokens, samples, torch.float32)
        given["weight"].requires_grad_(training)
        got, expected = compiled(**given), hia_kernels.condition_queries(**given)
        assert torch.equal(got, expected) and got.requires_grad == training
    assert counter.frame_count == 1


def captured(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Compute by a replay of the function's CUDA graph, whose memory is poisoned in between."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    return results


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make it an error if the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def layer_call(preset: str, forms: tuple[str, str], dtype: torch.dtype, training: bool):
    """Return a function without arguments that runs one layer, forward or forward and backward."""
    adapter = adapter_of(preset, dtype).cuda()
    hidden, maps, layout = question(3, dtype)
    hidden, layout = hidden.cuda().requires_grad_(training), layout.to(DEVICE)
    packed, layer = ImageFeatures(tuple(image.cuda() for image in maps)).packed(), adapter.layer(2)
    layer.extractor.form, layer.injection.form = forms
    wrt = [hidden, *layer.parameters()]
    with torch.no_grad():
        if not training:
            adapter.fold_weights()
        if forms[0].startswith("cached_"):
            packed.caches.update(adapter.layer_caches(packed, forms[0].removeprefix("cached_")))

    def forward() -> tuple[Tensor, ...]:
        packed._memo.clear()  # or a replay would not compute what was remembered
        with torch.no_grad():
            return (layer(hidden.clone(), packed, layout),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        packed._memo.clear()
        out = layer(hidden.clone(), packed, layout)
        return (out.detach(), *torch.autograd.grad(out.square().mean(), wrt, materialize_grads=True))

    return forward_and_backward if training else forward


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


CALLS = [(forms, False) for forms in FORMS] + [(forms, True) for forms in TRAINED]


def calls_in(*dtypes: torch.dtype) -> list[Any]:
    """List every form, forward and backward, in each dtype that it has, with the presets in turn."""
    cases = []
    for number, (dtype, (forms, training)) in enumerate(itertools.product(dtypes, CALLS)):
        presets = [preset for preset in ("paper", "released") if available(forms, preset, dtype)]
        if presets:
            preset = presets[(number + dtypes.index(dtype)) % len(presets)]
            name = "-".join((*forms, "backward" if training else "forward", preset, str(dtype)[6:]))
            cases.append(pytest.param(forms, training, preset, dtype, id=name))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize(("forms", "training", "preset", "dtype"), calls_in(torch.float32, torch.bfloat16))
def test_every_form_is_captured_in_a_cuda_graph(forms, training, preset, dtype):
    """Capture extract and inject, of which nothing waits for the device or allocates by its data."""
    call = layer_call(preset, forms, dtype, training)
    expected = tuple(result.clone() for result in call())
    assert_same(captured(call), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("forms", "training", "preset", "dtype"), calls_in(torch.float32))
def test_no_form_waits_for_the_device(forms, training, preset, dtype):
    call = layer_call(preset, forms, dtype, training)
    expected = tuple(result.clone() for result in call())  # kernels are loaded here
    with no_waiting():
        got = call()
    assert_same(got, expected)


@pytest.mark.gpu
def test_a_layout_goes_up_without_waiting():
    _, maps, layout = question(3, torch.float32)
    maps = tuple(image.cuda() for image in maps)
    with no_waiting():
        moved, packed = layout.to(DEVICE), ImageFeatures(maps).packed()
    for name, value in vars(layout).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(moved, name).cpu(), value), name
    assert packed.cu_seqlens.tolist() == [0, *torch.tensor(packed.lengths).cumsum(0).tolist()]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "training"), [(torch.float32, False), (torch.bfloat16, True)], ids=["fp32-forward", "bf16-backward"]
)
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_captured_in_a_cuda_graph(op, dtype, training):
    given = small_inputs(op, dtype, "cuda")
    wrt = [given[name] for name in differentiable(op) if given[name] is not None]
    wrt = [x.requires_grad_(training) for x in (x.detach() for x in wrt) if x.is_floating_point()]
    leaves = iter(wrt)
    for name in differentiable(op):
        if given[name] is not None and given[name].is_floating_point():
            given[name] = next(leaves)

    def call() -> tuple[Tensor, ...]:
        out = getattr(hia_kernels, op)(**given)
        out = out[0] if isinstance(out, tuple) else out
        if not training:
            return (out,)
        return (out.detach(), *torch.autograd.grad(out.square().sum(), wrt))

    expected = tuple(result.clone() for result in call())
    assert_same(captured(call), expected)


def test_every_form_has_a_capture_test():
    assert {extract for extract, _ in FORMS} == set(plan.EXTRACT_FORMS)
    assert {inject for _, inject in FORMS} == set(plan.INJECT_FORMS)
