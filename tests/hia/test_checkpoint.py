"""Saving and loading: exact keys, whole files or none, clear errors."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import hia
from hia.config import RUN_OPTIONS
from tests.hia.hosts import stir, tiny_config, tiny_llama, tiny_llava


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_tensors(directory, change):
    tensors = load_file(directory / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, directory / "adapter_model.safetensors")


def test_round_trip(model, batch, saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert set(load_file(saved / "adapter_model.safetensors")) == set(model.adapter.state_dict())
    again = hia.HiAModel.from_pretrained(tiny_llava(), saved)
    assert again.hia_config == model.hia_config
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def older(saved, **options):
    """Rewrite the config as versions wrote it that held choices of a run."""
    path = saved / "adapter_config.json"
    settings = json.loads(path.read_text())
    assert not set(RUN_OPTIONS) & set(settings["config"])
    settings["config"] |= {**RUN_OPTIONS, **options}
    path.write_text(json.dumps(settings))
    return saved


@pytest.mark.parametrize(
    "options",
    [{}, {"plan": "textbook/absorbed"}, {"high_resolution": False}, {"batch_norm": "batch"}],
    ids=lambda options: next(iter(options), "usual"),
)
def test_an_older_file_is_followed_with_one_warning(model, batch, saved, options):
    held = {**RUN_OPTIONS, **options}
    if "plan" in options:
        held["plan"] = "direct/absorbed"  # as the form is called now
    with pytest.warns(FutureWarning) as warned:
        again = hia.HiAModel.from_pretrained(tiny_llava(), older(saved, **options))
    (warning,) = warned
    for name, value in held.items():
        assert f"{name}={value!r}" in str(warning.message) and f"model.set_{name}(...)" in str(warning.message)
        assert getattr(again, name) == value
        getattr(model, f"set_{name}")(value)
    assert warning.filename == __file__
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert again.hia_config == model.hia_config
    again.save_pretrained(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = hia.HiAModel.from_pretrained(tiny_llava(), saved)
        assert {name: getattr(usual, name) for name in RUN_OPTIONS} == RUN_OPTIONS


def test_arguments_are_stronger_than_an_older_file(saved):
    chosen = {"plan": "absorbed/direct", "high_resolution": True, "batch_norm": "batch"}
    older(saved, plan="direct/direct", high_resolution=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = hia.HiAModel.from_pretrained(tiny_llava(), saved, **chosen)
    assert {name: getattr(model, name) for name in RUN_OPTIONS} == chosen
    with pytest.warns(FutureWarning, match=r"holds high_resolution=False, which this run follows"):
        model = hia.HiAModel.from_pretrained(tiny_llava(), saved, plan="auto", batch_norm="running")
    assert not model.high_resolution


def test_saving_twice_leaves_three_files(model, saved):
    model.save_pretrained(saved)
    assert len(list(saved.iterdir())) == 3


def test_an_interrupted_save_keeps_the_old_adapter(model, saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    stir(model, seed=9)
    monkeypatch.setattr("hia.runtime.checkpoint._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_missing_extra_and_wrong_shaped_tensors_are_listed(saved):
    def change(tensors):
        del tensors["layers.2.extractor.queries"]
        tensors["stranger"] = torch.zeros(1)
        tensors["layers.4.injection.out_proj.bias"] = torch.zeros(3)

    edit_tensors(saved, change)
    base = tiny_llava()
    with pytest.raises(ValueError) as error:
        hia.HiAModel.from_pretrained(base, saved)
    message = str(error.value)
    assert "missing ['layers.2.extractor.queries']" in message
    assert "unexpected ['stranger']" in message
    assert "layers.4.injection.out_proj.bias of shape [3] instead of [64]" in message
    assert not any(m._forward_hooks for m in base.modules())
    assert all(p.requires_grad for p in base.parameters())


def test_truncated_file(saved):
    path = saved / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors must be a whole safetensors file"):
        hia.HiAModel.from_pretrained(tiny_llava(), saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"an adapter's directory must hold {name}"):
        hia.HiAModel.from_pretrained(tiny_llava(), saved)


def test_adapter_of_another_host(saved):
    with pytest.raises(
        ValueError, match=r"holds an adapter made for a host with .*'num_hidden_layers': 6.* got a base with .*: 7"
    ):
        hia.HiAModel.from_pretrained(tiny_llava(layers=7), saved)
    with pytest.raises(ValueError, match=r"'host_type': 'llava'.* got a base with .*'host_type': 'llama'"):
        hia.HiAModel.from_pretrained(tiny_llama(), saved)


def test_config_of_another_tool(saved):
    (saved / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="must describe an adapter of peft_type HIA, got 'LORA'"):
        hia.HiAModel.from_pretrained(tiny_llava(), saved)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json must be JSON"):
        hia.HiAModel.from_pretrained(tiny_llava(), saved)


def test_saving_onto_a_file(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="save_directory must be a directory"):
        model.save_pretrained(tmp_path / "file")


def test_load_onto_a_meta_host_and_back(model, batch, saved):
    """Inspect an adapter by the host's config alone; its weights stay loaded."""
    with torch.device("meta"):
        base = tiny_llava_on_meta()
    loaded = hia.HiAModel.from_pretrained(base, saved)
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(loaded.adapter.state_dict()[name], tensor), name


def tiny_llava_on_meta():
    from transformers import LlavaForConditionalGeneration

    from tests.hia.hosts import llava_config

    return LlavaForConditionalGeneration(llava_config())


def test_saving_a_meta_adapter_is_refused(tmp_path):
    with torch.device("meta"):
        base = tiny_llava_on_meta()
    model = hia.get_hia_model(base, tiny_config(base))
    with pytest.raises(ValueError, match=r"save_pretrained needs parameters with values, got .* on the meta device"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
