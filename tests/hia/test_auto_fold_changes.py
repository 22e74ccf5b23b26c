"""Changes to weights that have folded by themselves: partial writes, transforms, casts, NaN, plans."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

import hia
from hia import free_memory
from hia.unit import is_sharded
from tests.hia.captures import Recorder
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.encoders import WINDOW, distance, pixels_of
from tests.hia.hosts import stir, tiny_config
from tests.hia.test_auto_fold import auto_encoder, folded_units

PIXELS = pixels_of(64, 64)


def folded_encoder():
    encoder = auto_encoder()
    with torch.no_grad():
        for _ in range(3):
            encoder(PIXELS, WINDOW)
    assert encoder._folded is not None
    return encoder


def truth_of(encoder):
    """Compute without folded weights."""
    encoder.set_auto_fold(False)
    with torch.no_grad():
        return encoder(PIXELS, WINDOW)


def first_filter(encoder):
    encoder.layer1[0].conv1.weight.data[0].zero_()


def first_rows(encoder):
    for parameter in encoder.parameters():
        parameter.data[0] = 0


def a_column(encoder):
    encoder.layer3[0].conv1.weight.data[:, 1] = 0


def larger_eps(encoder):
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-2


@pytest.mark.parametrize("change", [first_filter, first_rows, a_column, larger_eps], ids=lambda f: f.__name__)
def test_what_no_version_counts_shows_at_once(change):
    encoder = folded_encoder()
    change(encoder)
    with torch.no_grad():
        out = encoder(PIXELS, WINDOW)
    assert distance(out, truth_of(encoder)) < 2e-6


def test_transforms_go_past_what_folded_by_itself(tmp_path):
    encoder = folded_encoder()
    stacked = {name: torch.stack([x, 1.1 * x]) for name, x in encoder.named_parameters()}
    with torch.no_grad():
        both = torch.func.vmap(lambda p: torch.func.functional_call(encoder, p, (PIXELS, WINDOW)))(stacked)
        flat = torch.func.functionalize(lambda x: encoder(x, WINDOW))(PIXELS)
        torch.jit.trace(encoder, (PIXELS, WINDOW), check_trace=False).save(tmp_path / "encoder.pt")
    expected = truth_of(encoder)
    assert distance(both[0], expected) < 2e-6 and distance(flat, expected) < 2e-6


def assigned(encoder):
    encoder.load_state_dict({name: x.clone() for name, x in encoder.state_dict().items()}, assign=True)
    with torch.no_grad():
        encoder(PIXELS, WINDOW)  # notices it


@pytest.mark.parametrize("change", [lambda encoder: encoder.half(), assigned], ids=["cast", "assigned"])
def test_old_weights_are_not_kept(change):
    encoder = folded_encoder()
    old = [StorageWeakRef(x.untyped_storage()) for x in encoder.parameters()]
    change(encoder)
    gc.collect()
    assert all(reference.expired() for reference in old)


def test_nan_is_no_change():
    encoder = auto_encoder()
    with torch.no_grad():
        encoder.conv1.weight.fill_(float("nan"))
        for _ in range(2):
            encoder(PIXELS, WINDOW)
        folded = encoder._folded
        encoder(PIXELS, WINDOW)
    assert folded is not None and encoder._folded is folded


@pytest.fixture
def asked(processor):
    a, b, c = random_images()
    return processor([TWO, ONE], [[a, b], [c]])


class Masked(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.register_buffer("mask", torch.ones_like(like))

    def forward(self, weight):
        return weight * self.mask


def test_a_computed_shared_projection_never_folds(base, asked):
    """Look at all modules whose weights are folded: the released maths' projection is no child of the extractors."""
    model = stir(hia.get_hia_model(base, tiny_config(base, "released"))).eval()
    shared = model.adapter.feature_projection
    parametrize.register_parametrization(shared, "weight", Masked(shared.weight))
    with torch.no_grad():
        for _ in range(3):
            model(**asked)
    assert folded_units(model) == [True, False, False]


def test_extractors_in_training_mode_never_fold(base, asked):
    model = stir(hia.get_hia_model(base, tiny_config(base, "released"))).train()
    with torch.no_grad():
        for _ in range(3):
            model(**asked)
    assert folded_units(model) == [False] * 3


def test_a_forced_plan_that_needs_folded_weights_always_has_them(base, asked):
    model = stir(hia.get_hia_model(base, tiny_config(base, "released"), plan="ln_folded_kv/direct")).eval()
    with torch.no_grad():
        for call in range(6):
            if call == 3:
                next(iter(model.adapter.layers.values())).extractor.kv_proj.weight.mul_(1.01)
            model(**asked)
    model.set_auto_fold(False)
    with torch.no_grad(), pytest.raises(ValueError, match="fold_weights"):
        model(**asked)


@pytest.mark.parametrize(
    "end", [lambda model: model.train(), lambda model: model.set_auto_fold(False), lambda model: model.fold_weights()]
)
def test_graphs_go_with_the_weights_that_they_hold(end, base, asked):
    model = stir(hia.get_hia_model(base, tiny_config(base, "released"))).eval()
    graphs, recorder = model.adapter.graphs, Recorder()
    graphs.capture, graphs.device_type = lambda: recorder, "cpu"
    with torch.no_grad():
        for _ in range(5):
            model(**asked)
    assert graphs.nbytes > 0
    end(model)
    assert graphs.nbytes == 0


def test_free_memory_counts_the_cache_and_keeps_to_the_limit(monkeypatch):
    cuda = {
        "mem_get_info": (600, 1000),
        "memory_reserved": 300,
        "memory_allocated": 200,
        "get_per_process_memory_fraction": 1.0,
    }
    for name in cuda:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: cuda[name])
    assert free_memory.free_bytes(torch.device("cuda", 0)) == 600 + 300 - 200
    cuda["get_per_process_memory_fraction"] = 0.5
    assert free_memory.free_bytes(torch.device("cuda", 0)) == 500 - 200
    assert free_memory.free_bytes(torch.device("cpu")) is None


def test_weights_of_zero_3_are_sharded():
    weight = nn.Parameter(torch.ones(3))
    assert not is_sharded(weight)
    weight.ds_id = 7
    assert is_sharded(weight)
