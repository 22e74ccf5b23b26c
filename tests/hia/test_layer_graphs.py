"""CUDA graphs of extract and inject, on the CPU with a capture that records: the same bits, and what ends a graph."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading

import pytest
import torch

import hia_kernels
from hia.layers.features import ImageFeatures
from hia.layers.graphs import LayerGraphs
from tests.hia.captures import Recorder
from tests.hia.graphed import MAPS, ROWS, adapter_of, both, maps_of, question, recorded, sizes_of
from tests.hia.test_plan import FORMS, PRESETS, available, kept_by


def each_form():
    """List every form in two dtypes, each time with another preset of those that have the form."""
    cases = []
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    for number, (forms, dtype) in enumerate(zip([*FORMS, *FORMS], dtypes, strict=False)):
        presets = [preset for preset in PRESETS if available(forms, preset, dtype)]
        if presets:
            cases.append(pytest.param(forms, presets[number % len(presets)], dtype, id="-".join((*forms, str(dtype)))))
    return cases


@pytest.mark.parametrize(("forms", "preset", "dtype"), each_form())
@torch.no_grad()
def test_every_question_about_images_of_the_same_sizes_is_one_graph(forms, preset, dtype):
    """Ask questions of other lengths, positions, orders, owners and images: the bits are those of the eager layer."""
    adapter = adapter_of(preset, dtype)
    recorder, layer = recorded(adapter), adapter.layer(2)
    layer.extractor.form, layer.injection.form = forms
    for seed in range(6):
        hidden, layout = question(seed, dtype)
        expected, got = both(adapter, hidden, maps_of(seed, dtype), layout, keep=kept_by(forms))
        assert torch.equal(got, expected) and not torch.equal(got, hidden)
        assert (len(recorder.captured), recorder.replays) == (min(seed, 1), seed)
    assert len(sizes_of(adapter)) == 1


@pytest.mark.parametrize("preset", ["paper", "released"])
@torch.no_grad()
def test_every_copy_of_a_sample_is_written(preset):
    adapter = adapter_of(preset)
    recorder = recorded(adapter)
    for seed in range(4):
        hidden, layout = question(seed, copies=3)
        hidden = hidden.view(2, 3, *hidden.shape[1:])[:, :1].expand(-1, 3, -1, -1).flatten(0, 1)
        expected, got = both(adapter, hidden, maps_of(seed), layout)
        assert torch.equal(got, expected)
        assert torch.equal(got.view(2, 3, -1)[:, 0], got.view(2, 3, -1)[:, 2])
    assert recorder.replays == 3


@torch.no_grad()
def test_layouts_name_the_first_copys_rows_first():
    _, layout = question(1, copies=3)
    assert torch.equal(layout.written_rows[: layout.visual_rows.shape[0]], layout.visual_rows)


@torch.no_grad()
def test_hidden_states_are_changed_in_place_and_the_rest_of_them_stays():
    adapter = adapter_of("released")
    recorded(adapter)
    for seed in range(3):
        hidden, layout = question(seed)
        given = hidden.clone()
        got = adapter.layer(2)(given, ImageFeatures(maps_of(seed)).packed(), layout)
        assert got.data_ptr() == given.data_ptr() and torch.equal(got, given)
        changed = (got != hidden).flatten(0, 1).any(-1).nonzero().flatten()
        assert torch.equal(changed, layout.written_rows.sort().values)


@torch.no_grad()
def test_no_result_changes_with_the_next_question():
    adapter = adapter_of()
    recorder = recorded(adapter)
    outs, expected = [], []
    for seed in range(5):
        hidden, layout = question(seed)
        truth, out = both(adapter, hidden, maps_of(seed), layout)
        outs.append(out)
        expected.append(truth)
    assert recorder.replays == 4
    assert all(torch.equal(out, truth) for out, truth in zip(outs, expected, strict=True))


@torch.no_grad()
def test_hidden_states_may_lie_anywhere():
    adapter = adapter_of()
    recorder = recorded(adapter)
    for seed in range(4):
        hidden, layout = question(seed)
        spread = torch.empty(*hidden.shape[:2], 80).copy_(torch.nan_to_num(hidden.repeat(1, 1, 2)[..., :80]))[..., :64]
        swapped = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        for given in (spread, swapped):
            expected, got = both(adapter, given, maps_of(seed), layout)
            assert torch.equal(got, expected)
    assert recorder.replays == 7


SIZES = {
    "features": lambda: (question(1), ((3, 6), *MAPS[1:]), "auto"),
    "order-of-images": lambda: (question(1, rows=(2, 2, 2)), (MAPS[1], MAPS[0], MAPS[2]), "auto"),
    "rows": lambda: (question(1, rows=(2, 3, 5)), MAPS, "auto"),
    "copies": lambda: (question(1, copies=2), MAPS, "auto"),
    "images": lambda: (question(1, images=1), MAPS[:1], "auto"),
    "backend": lambda: (question(1), MAPS, "reference"),
    "dtype": lambda: (question(1, torch.float64), MAPS, "auto"),
    "plan": lambda: (question(1), MAPS, "auto"),
}


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_every_kind_of_call_has_a_graph_of_its_own(name):
    adapter = adapter_of()
    recorder = recorded(adapter)
    for seed in range(3):
        hidden, layout = question(seed)
        both(adapter, hidden, maps_of(seed), layout)
    (hidden, layout), shapes, backend = SIZES[name]()
    if name == "plan":
        adapter.set_plan("direct/absorbed")
    if name == "dtype":
        adapter.to(torch.float64).fold_weights()
    maps = tuple(torch.rand(*shape, 128, dtype=hidden.dtype) for shape in shapes)
    with hia_kernels.use_backend(backend):
        for call in range(3):
            expected, got = both(adapter, hidden, maps, layout)
            assert torch.equal(got, expected)
            assert (len(recorder.captured), recorder.replays) == (1 + min(call, 1), 2 + call)
    # a cast drops the graphs of the weights before it
    assert len(sizes_of(adapter)) == (1 if name == "dtype" else 2)


@torch.no_grad()
def test_layers_share_the_buffers_of_a_size():
    adapter = adapter_of(layers=(1, 2, 4))
    recorder = recorded(adapter)
    for seed in range(4):
        hidden, layout = question(seed)
        for layer in (1, 2, 4):
            expected, got = both(adapter, hidden, maps_of(seed), layout, layer)
            assert torch.equal(got, expected)
            hidden = got
    (cache,) = adapter.graphs.caches.values()
    assert len(cache.keys) == 1 and len(recorder.captured) == 3 and recorder.replays == 9
    (size,) = cache._sizes.values()
    assert list(size.graphs) == [1, 2, 4]
    assert adapter.graphs.nbytes == recorder.nbytes + sum(buffer.nbytes for buffer in size.buffers)
    assert size.buffers[0].shape == (2, 64) and size.buffers[1].shape == (sum(ROWS), 64)


UPDATES = {
    "queries": lambda layer: layer.extractor.queries.mul_(2),
    "condition": lambda layer: layer.extractor.condition.weight.mul_(2),
    "injection": lambda layer: layer.injection.out_proj.bias.add_(1),
    "data": lambda layer: setattr(layer.injection.q_proj.weight, "data", layer.injection.q_proj.weight * 2),
    "replaced": lambda layer: setattr(layer.injection, "gate", torch.nn.Parameter(layer.injection.gate + 1)),
    "loaded": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True),
}


@pytest.mark.filterwarnings("ignore:hia. parameters have changed since fold_weights")
@pytest.mark.parametrize("name", UPDATES)
@torch.no_grad()
def test_an_update_ends_the_graphs_of_its_layer(name):
    adapter = adapter_of("released", layers=(1, 2))
    recorder = recorded(adapter)
    for seed in range(3):
        hidden, layout = question(seed)
        for layer in (1, 2):
            before = both(adapter, hidden, maps_of(seed), layout, layer)[1]
    UPDATES[name](adapter.layer(2))
    adapter.layer(2).extractor.fold_weights()
    for call in range(3):
        expected, got = both(adapter, hidden, maps_of(seed), layout)
        assert torch.equal(got, expected) and not torch.equal(got, before)
        assert (len(recorder.captured), recorder.replays) == (2 + min(call, 1), 4 + call)
    both(adapter, hidden, maps_of(seed), layout, 1)
    assert (len(recorder.captured), recorder.replays) == (3, 7)  # the other layer's graph stayed


@torch.no_grad()
def test_without_folded_weights_there_are_no_graphs():
    adapter = adapter_of(layers=(1, 2))
    recorder = recorded(adapter)
    hidden, layout = question(0)

    def ask(layers=(1, 2)):
        for layer in layers:
            for _ in range(2):
                expected, got = both(adapter, hidden, maps_of(0), layout, layer)
                assert torch.equal(got, expected)

    ask()
    (cache,) = adapter.graphs.caches.values()
    adapter.unfold_weights()
    assert cache.keys == [] and cache.nbytes == recorder.nbytes == 0
    ask()
    assert len(recorder.captured) == 2
    adapter.fold_weights()
    ask()
    assert len(recorder.captured) == 4 and len(cache.keys) == 1
    adapter.layer(1).extractor.unfold_weights()
    ask([1])
    assert [list(size.graphs) for size in cache._sizes.values()] == [[2]]
    adapter.layer(2).extractor.feature_norm.weight.mul_(2)
    with pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
        ask([2])
    assert cache.keys == [] and len(recorder.captured) == 4


@torch.no_grad()
def test_moved_weights_leave_no_graphs_where_they_were():
    adapter = adapter_of()
    recorder = recorded(adapter)
    (hidden, layout), maps = question(1), maps_of()
    for move in (lambda: adapter.to(torch.float64).to(torch.float32), lambda: adapter.to("meta")):
        adapter.fold_weights()
        for _ in range(2):
            both(adapter, hidden, maps, layout)
        assert len(sizes_of(adapter)) == 1 and adapter.graphs.nbytes > 0
        move()
        assert sizes_of(adapter) == [] and adapter.graphs.nbytes == recorder.nbytes == 0


@torch.no_grad()
def test_the_size_unused_for_longest_goes():
    adapter = adapter_of()
    recorder = recorded(adapter, kept=2)
    questions = {rows: question(1, rows=(rows, 3, 4)) for rows in (2, 3, 4)}
    for rows in (2, 3, 2, 4):
        for _ in range(2):
            expected, got = both(adapter, questions[rows][0], maps_of(rows), questions[rows][1])
            assert torch.equal(got, expected)
    assert [key[0][2][0] for key in sizes_of(adapter)] == [2, 4] and len(recorder.captured) == 3
    both(adapter, questions[3][0], maps_of(3), questions[3][1])
    assert len(recorder.captured) == 3  # it waits: more sizes than graphs must not thrash


def test_inference_mode_leaves_nothing_of_its_own_behind():
    adapter = adapter_of()
    recorder = recorded(adapter)
    for seed, mode in enumerate([torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode]):
        with mode():
            hidden, layout = question(seed)
            expected, got = both(adapter, hidden, maps_of(seed), layout)
            assert torch.equal(got, expected) and got.is_inference() == torch.is_inference_mode_enabled()
    assert len(recorder.captured) == 1 and recorder.replays == 3
    hidden, layout = question(1)
    adapter.layer(2)(hidden, ImageFeatures(maps_of()).packed(), layout).sum().backward()
    assert adapter.layer(2).injection.q_proj.weight.grad is not None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])  # noqa: S301
@torch.no_grad()
def test_copies_have_no_graphs_and_one_cache_of_their_own(copied):
    adapter = adapter_of(layers=(1, 2))
    recorder = recorded(adapter)
    (hidden, layout), maps = question(1), maps_of()
    for _ in range(2):
        both(adapter, hidden, maps, layout)
    adapter.graphs.capture = Recorder  # a lambda can't be pickled
    again = copied(adapter)
    assert isinstance(again.graphs, LayerGraphs) and again.graphs.caches == {} and again.graphs.nbytes == 0
    assert all(layer.graphs is again.graphs is not adapter.graphs for layer in again.layers.values())
    again.fold_weights()
    again.layer(2).injection.out_proj.weight.mul_(3)
    for _ in range(3):
        expected, got = both(again, hidden, maps, layout)
        assert torch.equal(got, expected)
    expected, got = both(adapter, hidden, maps, layout)
    assert torch.equal(got, expected) and recorder.replays == 2


def test_threads_take_turns():
    adapter = adapter_of(layers=(1, 2))
    recorder = recorded(adapter)
    asked = [(layer, *question(seed), maps_of(seed)) for seed, layer in enumerate([1, 2] * 3)]
    with torch.no_grad():
        expected = [both(adapter, hidden, maps, layout, layer)[0] for layer, hidden, layout, maps in asked]
    found = []

    def work(layer, hidden, layout, maps, truth):
        with torch.no_grad():  # a thread has its own
            for _ in range(5):
                out = adapter.layer(layer)(hidden.clone(), ImageFeatures(maps).packed(), layout)
                found.append(torch.equal(out, truth))

    threads = [threading.Thread(target=work, args=(*one, truth)) for one, truth in zip(asked, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30 and all(found)
    assert len(recorder.captured) == 2 and recorder.replays >= 24
