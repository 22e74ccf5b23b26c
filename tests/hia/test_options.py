"""Plan, resolution and batch-norm's statistics are choices of a run: made at any time, kept by no checkpoint."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import hia
from hia.layers.adapter import HiAAdapter
from tests.hia.hosts import tiny_config, tiny_llava, tiny_processor


def test_the_choices_are_made_at_once_or_later(base):
    model = hia.get_hia_model(base, tiny_config(base))
    assert (model.plan, model.high_resolution, model.batch_norm) == ("auto", True, "running")
    assert model.set_plan("absorbed").set_high_resolution(False).set_batch_norm("batch") is model
    at_once = tiny_llava()
    at_once = hia.get_hia_model(
        at_once, tiny_config(at_once), plan="absorbed/absorbed", high_resolution=False, batch_norm="batch"
    )
    for made in (model, at_once):
        assert (made.plan, made.high_resolution, made.batch_norm) == ("absorbed/absorbed", False, "batch")
        assert made.hia_config == tiny_config(base)


def test_a_plan_holds_for_the_next_call(model, batch):
    with torch.no_grad():
        found = {plan: model.set_plan(plan)(**batch).logits for plan in ("auto", "direct/direct", "absorbed", "auto")}
        assert torch.equal(found["auto"], model.set_plan("auto")(**batch).logits)
        torch.testing.assert_close(found["absorbed"], found["direct/direct"], rtol=1e-4, atol=1e-4)
        assert not torch.equal(found["absorbed"], found["direct/direct"])


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_statistics_change_in_training_too(model):
    norms = [module for module in model.adapter.encoder.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    model.train().set_batch_norm("batch")
    assert all(norm.training for norm in norms)
    model.set_batch_norm("running")
    assert model.adapter.encoder.training and not any(norm.training for norm in norms)
    model.eval().set_batch_norm("batch")
    assert not any(norm.training for norm in norms)


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("plan", "fast", "plan must be 'auto' or '<extract>/<inject>'"),
        ("plan", float("nan"), "plan must be 'auto' or '<extract>/<inject>'"),  # and no warning of an old name
        ("plan", torch.zeros(2), "plan must be 'auto' or '<extract>/<inject>'"),
        ("high_resolution", 1, "high_resolution must be True or False, got 1"),
        ("batch_norm", "layer", "batch_norm must be 'running' or 'batch', got 'layer'"),
    ],
)
def test_a_choice_there_is_none_of_attaches_nothing(base, name, value, message):
    with pytest.raises(ValueError, match=message):
        hia.get_hia_model(base, tiny_config(base), **{name: value})
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks for module in base.modules())
    model = hia.get_hia_model(base, tiny_config(base))
    before = getattr(model, name)
    with pytest.raises(ValueError, match=message):
        getattr(model, f"set_{name}")(value)
    assert getattr(model, name) == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapter: pickle.loads(pickle.dumps(adapter))])  # noqa: S301
def test_copies_of_an_adapter_keep_the_choices(base, copied):
    adapter = HiAAdapter(tiny_config(base, "released"))
    adapter.set_plan("folded/direct")
    adapter.encoder.set_batch_norm("batch")
    adapter.fold_weights()
    again = copied(adapter)
    assert (
        again.plan == "folded/direct"
        and again.encoder.live_statistics
        and set(again.state_dict()) == set(adapter.state_dict())
    )
    layers = [*again.layers.values()]
    assert {(layer.extractor.form, layer.injection.form) for layer in layers} == {("folded", "direct")}
    assert all(layer.extractor._shared == (again.feature_projection,) for layer in layers)


def test_an_old_call_of_the_processor_warns(base):
    with pytest.warns(FutureWarning, match=r"HiAProcessor takes no config any more.* high_resolution=\.\.\.\) says"):
        processor = hia.HiAProcessor(tiny_processor(), tiny_config(base))
    assert processor.high_resolution
