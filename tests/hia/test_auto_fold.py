"""Weights that fold by themselves: from the second call on, only where they stay, and never out of date."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import hia
import hia_kernels
from bench.measure.footprint import held_beside
from hia import folding
from hia.layers.adapter import HiAAdapter
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of
from tests.hia.hosts import stir, tiny_config, tiny_llava
from tests.hia.test_encoder import CHANGES, reference_of, step_of

pytestmark = pytest.mark.filterwarnings("error:hia. (parameters have|weights did)")


def auto_encoder(**changes):
    encoder = encoder_of(**changes)
    encoder.set_auto_fold(True)
    return encoder


@pytest.fixture
def auto(base):
    """Make a model of the released maths, whose extractors gain from folding at tiny sizes too."""
    return stir(hia.get_hia_model(base, tiny_config(base, "released")))


@pytest.fixture
def asked(processor):
    a, b, c = random_images()
    return processor([TWO, ONE], [[a, b], [c]])


def folded_units(model):
    return [unit._folded is not None for unit in model.adapter.folding_units()]


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_the_second_call_folds(around):
    encoder, pixels = auto_encoder(), pixels_of(75, 101)
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with around():
        first = encoder(pixels, WINDOW)
        assert encoder.current() is None
        second = encoder(pixels, WINDOW)
    folded = encoder.current()
    assert folded is not None and folded.nbytes > 0 and encoder.folding_state() == "folded by themselves"
    assert distance(second, first) < 2e-6 and distance(second, reference_of(encoder, pixels)) < 2e-6
    with torch.no_grad():  # what an inference mode has folded serves outside it
        assert torch.equal(encoder(pixels, WINDOW), second) and encoder.current() is folded
    assert list(encoder.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert all(gradient is not None for gradient in gradients_of(encoder, pixels))


def gradients_of(encoder, pixels):
    return torch.autograd.grad(encoder(pixels, WINDOW).square().mean(), list(encoder.parameters()))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(encoder):
    parametrize.register_parametrization(encoder.layer1[0].conv1, "weight", Doubled())


def run(encoder, context=torch.no_grad):
    with torch.no_grad(), context():
        return encoder(pixels_of(64, 64), WINDOW)


NEVER = {
    "gradients": lambda encoder: encoder(pixels_of(64, 64), WINDOW),
    "training": lambda encoder: run(encoder.train()),
    "a norm in training": lambda encoder: encoder.bn1.train() and run(encoder),
    "a dispatch mode": lambda encoder: run(encoder, lambda: FlopCounterMode(display=False)),
    "a backend": lambda encoder: run(encoder, lambda: hia_kernels.use_backend("reference")),
    "the compiler": lambda encoder: run(torch.compile(encoder, backend="eager", fullgraph=True)),
    "switched off": lambda encoder: encoder.set_auto_fold(False) or run(encoder),
    "unfolded": lambda encoder: encoder.unfold_weights() or run(encoder),
    "computed weights": lambda encoder: parametrized(encoder) or run(encoder),
    "weights of an inference mode": lambda encoder: run(in_inference_mode(encoder)),
}


def in_inference_mode(encoder):
    with torch.inference_mode():
        encoder.conv1.weight = nn.Parameter(encoder.conv1.weight.clone(), requires_grad=False)
    return encoder


@pytest.mark.parametrize("call", NEVER.values(), ids=NEVER)
def test_what_folds_nothing(call):
    encoder = auto_encoder()
    for _ in range(3):
        call(encoder)
    assert encoder._folded is None


def test_it_folds_under_autocast_in_full_precision(auto, asked):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        auto(**asked), auto(**asked)
    assert folded_units(auto) == [True] * 3
    for unit in auto.adapter.folding_units()[1:]:
        by_itself = unit.current()
        assert torch.equal(by_itself.kv_weight, unit.fold_weights().kv_weight)


CHANGES_UNCOUNTED = {**CHANGES, "through .data": lambda encoder: average_into(encoder)}


def average_into(encoder):
    """Write as an average of weights does that is swapped in for an evaluation; PyTorch counts no such write."""
    for parameter in encoder.parameters():
        parameter.data.mul_(1.5)


@pytest.mark.parametrize("change", CHANGES_UNCOUNTED.values(), ids=CHANGES_UNCOUNTED)
def test_any_change_shows_at_once_and_silently(change):
    encoder, pixels = auto_encoder(), pixels_of(64, 64)
    with torch.no_grad():
        before = [encoder(pixels, WINDOW) for _ in range(2)][1]
        assert encoder._folded is not None
        change(encoder)
        expected = reference_of(encoder, pixels)
        for folded in (False, True, True):  # it counts anew
            out = encoder(pixels, WINDOW)
            assert distance(out, expected) < 2e-6 and (encoder._folded is not None) == folded
        assert not torch.equal(out, before.to(out))


def test_an_evaluation_a_step_never_folds():
    encoder, pixels = auto_encoder(), pixels_of(64, 75)
    for mode in (True, False):  # weights may be trained in eval mode, too
        for _ in range(3):
            step_of(encoder.train(mode), pixels)
            run(encoder.eval())
            assert encoder._folded is None
    run(encoder)
    assert encoder._folded is not None


def test_training_has_the_memory():
    encoder = auto_encoder()
    run(encoder), run(encoder)
    encoder.train()
    assert encoder._folded is None
    run(encoder.eval())
    assert encoder._folded is None
    folded = encoder.fold_weights()
    assert encoder.train()._folded is folded, "what was asked for stays"


def test_asked_for_and_unfolded():
    encoder = auto_encoder()
    folded = encoder.fold_weights()
    encoder.set_auto_fold(False)
    run(encoder)
    assert encoder.current() is folded and encoder.folding_state() == "folded by fold_weights()"
    encoder.set_auto_fold(True)
    encoder.unfold_weights()
    assert (encoder.auto_fold, encoder.folding_state()) == (False, "not folded, auto_fold is False")
    encoder.set_auto_fold(True)
    run(encoder), run(encoder)
    assert encoder.folding_state() == "folded by themselves"
    encoder.set_auto_fold(False)
    assert encoder._folded is None


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_model_folds_with_its_second_prompt(auto, asked, around, capsys):
    plain = stir(hia.get_hia_model(tiny_llava(), auto.hia_config, auto_fold=False))
    keys = list(auto.state_dict())
    with around():
        expected = plain(**asked).logits
        first, answer = auto(**asked).logits, plain.generate(**asked, max_new_tokens=4)
        assert folded_units(auto) == [False] * 3
        assert torch.equal(first, expected)
        assert torch.equal(auto.generate(**asked, max_new_tokens=4), answer)
        assert folded_units(auto) == [True] * 3 and folded_units(plain) == [False] * 3
        torch.testing.assert_close(auto(**asked).logits, expected, rtol=1e-4, atol=1e-4)
    assert list(auto.state_dict()) == keys
    for model, text in ((auto, "folded by themselves, "), (plain, "not folded, auto_fold is False, 0.0 MiB")):
        model.explain_plan([(70, 50)])
        printed = capsys.readouterr().out
        assert f"weights of the encoder: {text}" in printed and f"weights of the extractors: {text}" in printed


def test_every_way_in_counts(auto, asked):
    with torch.no_grad():
        features = auto.encode_images(asked["high_res_pixels"], asked["windows"], keep="kv")
        assert folded_units(auto) == [False] * 3
        auto(**asked)
        assert folded_units(auto) == [True] * 3
        pixels = {name: asked[name] for name in ("high_res_pixels", "windows")}
        given = {name: value for name, value in asked.items() if name not in pixels}
        kept = auto(**given, features=features).logits
        again = auto(**given, features=auto.encode_images(**pixels, keep="kv")).logits
    torch.testing.assert_close(again, kept, rtol=1e-4, atol=1e-4)


def test_extractors_fold_only_for_forms_that_read_it(auto, asked):
    with torch.no_grad():
        for _ in range(3):
            auto.set_plan("absorbed/direct")(**asked)
        assert folded_units(auto) == [True, False, False]
        features = auto.encode_images(asked["high_res_pixels"], asked["windows"], keep="kv")
        auto.unfold_weights().set_auto_fold(True).set_plan("auto")
        given = {name: asked[name] for name in asked if name not in ("high_res_pixels", "windows")}
        for _ in range(3):
            auto(**given, features=features)  # keys and values are there
        assert folded_units(auto) == [False] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda model: stir(model, seed=2),
        lambda model: model.adapter.load_state_dict({k: v / 2 for k, v in model.adapter.state_dict().items()}),
        lambda model: [parameter.data.mul_(0.5) for parameter in model.adapter.parameters()],
        lambda model: model.double(),
    ],
    ids=["in place", "loaded", "through .data", "cast"],
)
def test_a_models_weights_are_never_out_of_date(auto, asked, change):
    with torch.no_grad():
        auto(**asked), auto(**asked)
        change(auto)
        asked["pixel_values"] = asked["pixel_values"].to(auto.dtype)
        found = [auto(**asked).logits for _ in range(2)]
        expected = auto.set_auto_fold(False)(**asked).logits
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])  # noqa: S301
def test_copies_fold_for_themselves(auto, asked, copied):
    with torch.no_grad():
        auto(**asked), auto(**asked)
        again = copied(auto.adapter)
        assert [unit._folded for unit in again.folding_units()] == [None] * 3 and again.auto_fold
        pixels = asked["high_res_pixels"][0]
        for _ in range(2):
            assert distance(again.encoder(pixels, WINDOW), auto.adapter.encoder(pixels, WINDOW)) < 2e-6
        assert again.encoder._folded is not None
    auto.adapter.set_auto_fold(False)
    assert not copied(auto.adapter).auto_fold


def test_a_compiled_layer_runs_with_what_folded_beside_it(auto, asked):
    with torch.no_grad():
        expected = auto(**asked).logits
        for layer in auto.adapter.layers.values():
            layer.compile(backend="eager", fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(auto(**asked).logits, expected, rtol=1e-4, atol=1e-4)
        assert folded_units(auto) == [True] * 3
        [parameter.mul_(0.5) for parameter in auto.adapter.parameters()]
        found = auto(**asked).logits
        expected = auto.set_auto_fold(False)(**asked).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_threads_see_whole_weights_or_none(monkeypatch):
    encoder, pixels, made = auto_encoder(), pixels_of(64, 64), []
    expected = run(encoder)
    meet = threading.Barrier(2, timeout=60)

    def slowly(self):
        made.append(type(self)._made(self))
        meet.wait()  # the other one has run meanwhile
        return made[-1]

    monkeypatch.setattr(encoder, "_made", slowly.__get__(encoder))

    def other():
        with torch.no_grad():
            results.append(encoder(pixels, WINDOW))
        meet.wait()

    results: list[torch.Tensor] = []
    thread = threading.Thread(target=other)
    with torch.no_grad():
        folding_thread = threading.Thread(target=lambda: results.append(run(encoder)))
        folding_thread.start()
        while not made:
            assert folding_thread.is_alive()
        thread.start()
        for each in (thread, folding_thread):
            each.join(60)
    assert len(made) == 1 and encoder._folded is made[0]
    assert all(distance(result, expected) < 2e-6 for result in results) and len(results) == 2


def test_short_memory_leaves_weights_as_they_are(monkeypatch):
    encoder = auto_encoder()
    needed = encoder.folding_bytes()
    assert needed >= sum(parameter.nbytes for parameter in encoder.parameters())
    monkeypatch.setattr(folding, "free_bytes", lambda device: 2 * needed - 1)
    for _ in range(3):
        run(encoder)
    assert encoder._folded is None
    encoder.set_auto_fold(True)
    monkeypatch.setattr(folding, "free_bytes", lambda device: 2 * needed)
    run(encoder), run(encoder)
    assert encoder._folded is not None


def test_running_out_of_memory_fails_no_call(monkeypatch):
    encoder, attempts = auto_encoder(), []

    def fail():
        attempts.append(1)
        raise torch.OutOfMemoryError("made up")

    monkeypatch.setattr(encoder, "_made", fail)
    expected = run(encoder)
    with pytest.warns(UserWarning, match="weights did not fold by themselves and stay as they are: made up"):
        assert torch.equal(run(encoder), expected)
    assert torch.equal(run(encoder), expected) and len(attempts) == 1
    assert folding._folding.acquire(blocking=False)
    folding._folding.release()


def test_the_peak_of_folding_is_not_underrated():
    from bench.measure.memory import peak_bytes

    for preset in ("paper", "released"):
        base = tiny_llava()
        adapter = HiAAdapter(tiny_config(base, preset, encoder_width=64))
        for dtype in (torch.float32, torch.bfloat16):
            extractor = adapter.to(dtype).layer(2).extractor
            extractor.unfold_weights()
            assert peak_bytes(extractor.fold_weights, "cpu") <= extractor.folding_bytes()


def test_table_3_counts_what_folded_by_itself(auto, asked):
    before = sum(tensor.nbytes for tensor in held_beside(auto.adapter))
    with torch.no_grad():
        auto(**asked), auto(**asked)
    extractors = [unit.current() for unit in auto.adapter.folding_units()[1:]]
    more = sum(tensor.nbytes for tensor in held_beside(auto.adapter)) - before
    assert more >= sum(folded.nbytes for folded in extractors) > 0


def test_offloaded_weights_stay_unfolded(auto, asked):
    accelerate = pytest.importorskip("accelerate")
    with torch.no_grad():
        expected = auto(**asked).logits
    classes = ["Extractor", "Injection", "SharedProjection", type(auto.adapter.encoder).__name__]
    accelerate.cpu_offload(auto.adapter, torch.device("cpu"), preload_module_classes=classes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert torch.equal(auto(**asked).logits, expected)
    assert folded_units(auto) == [False] * 3


@pytest.mark.parametrize("whole", [False, True])
def test_sharded_weights_stay_unfolded(auto, asked, whole):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    from torch.distributed.fsdp import fully_shard

    with torch.no_grad():
        expected = auto(**asked).logits
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for unit in () if whole else (auto.adapter.encoder, *auto.adapter.layers.values()):
            fully_shard(unit, mesh=mesh)
        fully_shard(auto, mesh=mesh)
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(auto(**asked).logits, expected)
        assert folded_units(auto) == [False] * 3
    finally:
        dist.destroy_process_group()


def test_a_choice_of_the_run(base, tmp_path):
    config = tiny_config(base)
    model = hia.get_hia_model(base, config)
    assert model.auto_fold and model.set_auto_fold(False) is model and not model.auto_fold
    model.save_pretrained(tmp_path)
    assert hia.HiAModel.from_pretrained(tiny_llava(), tmp_path).auto_fold
    assert not hia.HiAModel.from_pretrained(tiny_llava(), tmp_path, auto_fold=False).auto_fold
    for call in (model.set_auto_fold, lambda value: hia.get_hia_model(tiny_llava(), config, auto_fold=value)):
        with pytest.raises(ValueError, match="^hia: auto_fold must be True or False, got 1$"):
            call(1)
