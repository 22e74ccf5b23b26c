"""A model whose adapter's layers run as CUDA graphs answers as without them; on a GPU, the real thing."""

from __future__ import annotations

import pytest
import torch

import hia
import hia_kernels
from hia.encoder.cuda_graphs import EncoderGraphs
from hia.layers.features import ImageFeatures
from tests.hia.captures import Recorder
from tests.hia.conftest import NONE, ONE, TWO, random_images
from tests.hia.encoders import encoder_of
from tests.hia.graphed import adapter_of, both, maps_of, question, recorded, sizes_of
from tests.hia.hosts import stir, tiny_config, tiny_llava
from tests.hia.test_plan import FORMS, available, kept_by

QUESTIONS = ("is there a fracture?", "what changed between the two studies of the chest?", "compare left?", "old?")


@pytest.fixture(params=["paper", "released"])
def graphed(request, base):
    """Make a model whose layers use graphs on the CPU, and the recorder of them."""
    model = stir(hia.get_hia_model(base, tiny_config(base, request.param, num_queries=6))).eval()
    return model, recorded(model.adapter)


def without_graphs(model, answer):
    model.adapter.graphs.enabled = False
    try:
        return answer()
    finally:
        model.adapter.graphs.enabled = True


@pytest.mark.parametrize("keep", ["features", "kv", "folded"])
@torch.no_grad()
def test_questions_about_kept_features(graphed, processor, keep):
    model, recorder = graphed
    (a, b, _), layers = random_images(), len(model.hia_config.layer_indices)
    first = processor(TWO, [a, b])
    features = model.encode_images(first.high_res_pixels, first.windows, keep=keep)
    for number, asked in enumerate(QUESTIONS):
        inputs = processor(f"USER: <image> and <image>\n{asked} ASSISTANT:", [a, b])
        inputs = {name: value for name, value in inputs.items() if name not in ("high_res_pixels", "windows")}
        expected = without_graphs(model, lambda inputs=inputs: model(**inputs, features=features).logits)
        assert torch.equal(model(**inputs, features=features).logits, expected)
        assert recorder.replays == number * layers
        generated = model.generate(**inputs, features=features, max_new_tokens=4, do_sample=False)
        recorder.replays -= layers
        assert torch.equal(
            generated,
            without_graphs(
                model,
                lambda inputs=inputs: model.generate(**inputs, features=features, max_new_tokens=4, do_sample=False),
            ),
        )
    assert len(recorder.captured) == layers and len(sizes_of(model.adapter)) == 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_batches_and_beams(graphed, processor, options):
    model, recorder = graphed
    a, b, c = random_images()
    for asked in QUESTIONS:
        batch = processor([TWO, NONE, ONE.replace("what changed?", asked)], [[a, b], [], [c]])
        found = [
            answer(lambda batch=batch: model.generate(**batch, max_new_tokens=4, do_sample=False, **options))
            for answer in (lambda ask: without_graphs(model, ask), lambda ask: ask())
        ]
        assert torch.equal(*found)
    layers = len(model.hia_config.layer_indices)
    assert len(recorder.captured) == layers and recorder.replays == 3 * layers


@torch.no_grad()
def test_one_switch_for_encoder_and_layers(graphed, processor):
    model, recorder = graphed
    encoder, of_encoder = model.adapter.encoder, Recorder()
    encoder._folded.graphs.capture, encoder._folded.graphs.device_type = of_encoder, "cpu"
    batch = processor(TWO, random_images()[:2])
    layers = len(model.hia_config.layer_indices)

    def ask(times):
        for _ in range(times):
            logits = model(**batch).logits
        return logits

    before = ask(3)
    assert model.cuda_graphs and recorder.replays == 2 * layers and of_encoder.replays == 4
    assert model.set_cuda_graphs(False) is model and not model.cuda_graphs
    assert sizes_of(model.adapter) == encoder._folded.graphs.keys == [] and model.adapter.graphs.nbytes == 0
    assert torch.equal(ask(3), before)
    assert recorder.replays == 2 * layers and of_encoder.replays == 4
    model.set_cuda_graphs(True)
    assert torch.equal(ask(2), before) and recorder.replays == 3 * layers and of_encoder.replays == 6
    with pytest.raises(ValueError, match="^hia: cuda_graphs must be True or False, got 1"):
        model.set_cuda_graphs(1)
    assert isinstance(encoder_of().fold_weights().graphs, EncoderGraphs)


def test_training_between_questions(graphed, processor):
    """Take a step of an optimizer between questions: the answers are those of the weights there are."""
    model, recorder = graphed
    batch = processor(TWO, random_images()[:2])
    answers = []
    for _ in range(2):
        model.eval()
        with torch.no_grad():
            model.fold_weights()
            expected = without_graphs(model, lambda: model(**batch).logits)
            for _ in range(3):
                got = model(**batch).logits
                assert torch.equal(got, expected)
        answers.append(got)
        model.adapter.train()
        optimizer = torch.optim.SGD(model.adapter.layers.parameters(), lr=0.1)
        model(**batch).logits.square().mean().backward()
        optimizer.step()
    assert not torch.equal(*answers) and len(recorder.captured) == 2 * len(model.hia_config.layer_indices)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@torch.no_grad()
def test_a_replay_is_the_eager_layer_bit_for_bit(forms, dtype):
    preset = "released"
    if not available(forms, preset, dtype):
        pytest.skip(f"{'/'.join(forms)} is not offered in {dtype}")
    adapter = adapter_of(preset, dtype, layers=(1, 2)).cuda()
    adapter.fold_weights()
    for layer in adapter.layers.values():
        layer.extractor.form, layer.injection.form = forms
    for seed in range(5):
        hidden, layout = question(seed, dtype)
        hidden, layout = hidden.cuda(), layout.to(torch.device("cuda", 0))
        maps = tuple(image.cuda() for image in maps_of(seed, dtype))
        for layer in (1, 2):  # in turn: what one's graph leaves in the pool is the other's to write over
            expected, got = both(adapter, hidden, maps, layout, layer, keep=kept_by(forms))
            assert torch.equal(got, expected)
            hidden = got
    (cache,) = adapter.graphs.caches.values()
    (size,) = cache._sizes.values()
    assert list(size.graphs) == [1, 2] and cache.nbytes > 0


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_end_with_their_weights_and_come_again():
    adapter = adapter_of().cuda()
    hidden, layout = question(1)
    hidden, layout = hidden.cuda(), layout.to(torch.device("cuda", 0))
    maps = tuple(image.cuda() for image in maps_of(1))
    found = []
    for change in (lambda: None, lambda: adapter.layer(2).injection.out_proj.weight.mul_(2), adapter.unfold_weights):
        change()
        adapter.fold_weights()
        for _ in range(3):
            expected, got = both(adapter, hidden, maps, layout)
            assert torch.equal(got, expected)
        assert len(sizes_of(adapter)) == 1
        found.append(got)
    assert not torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.gpu
@torch.no_grad()
def test_replays_on_two_streams_take_turns():
    adapter = adapter_of(layers=(1, 2)).cuda()
    adapter.fold_weights()
    asked = []
    for seed in range(10):
        hidden, layout = question(seed)
        maps = tuple(image.cuda() for image in maps_of(seed))
        asked.append((hidden.cuda(), maps, layout.to(torch.device("cuda", 0)), 1 + seed % 2))
    expected = [both(adapter, *call)[0] for call in asked]
    for call in asked[:4]:
        both(adapter, *call)
    streams, outs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for number, (hidden, maps, layout, layer) in enumerate(asked):
        with torch.cuda.stream(streams[number % 2]):
            outs.append(adapter.layer(layer)(hidden.clone(), ImageFeatures(maps).packed(), layout))
    torch.cuda.synchronize()
    assert all(torch.equal(out, truth) for out, truth in zip(outs, expected, strict=True))


@pytest.mark.gpu
@torch.no_grad()
def test_a_model_on_a_gpu_answers_as_without_graphs(processor):
    host = tiny_llava()
    model = stir(hia.get_hia_model(host, tiny_config(host))).eval().cuda()
    model.fold_weights()
    a, b, _ = random_images()
    with hia_kernels.use_backend("triton"):
        for asked in QUESTIONS:
            batch = processor(f"USER: <image> and <image>\n{asked} ASSISTANT:", [a, b]).to("cuda")
            expected = without_graphs(model, lambda batch=batch: model(**batch).logits)
            assert torch.equal(model(**batch).logits, expected)
    assert len(sizes_of(model.adapter)) == 1
