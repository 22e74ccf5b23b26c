"""HiAConfig: presets, layer choice, errors."""

from __future__ import annotations

import copy
import pickle

import pytest

import hia
from tests.hia.hosts import llava_config, text_config

LLAMA_13B = text_config(layers=40, hidden_size=5120, num_attention_heads=40, num_key_value_heads=40)


def test_paper_preset_of_13b():
    config = hia.HiAConfig.paper(LLAMA_13B)
    assert (config.dim, config.num_heads, config.head_dim, config.num_queries) == (5120, 40, 128, 256)
    assert config.layer_indices == (13, 26)
    assert config.encoder_channels == 2048


def test_released_preset_of_13b():
    config = hia.HiAConfig.released(LLAMA_13B)
    assert (config.dim, config.num_heads, config.head_dim) == (5120, 8, 640)
    assert (config.norms, config.gate, config.shared_projection) == ("pre_post", "none", True)


def test_lite_preset_of_13b():
    config = hia.HiAConfig.lite(LLAMA_13B)
    assert (config.dim, config.num_heads, config.head_dim) == (1024, 8, 128)


@pytest.mark.parametrize(
    ("layers", "expected"), [("half", (20,)), ("thirds", (13, 26)), ("quarters", (10, 20, 30)), ([3, 1], (3, 1))]
)
def test_layers(layers, expected):
    assert hia.HiAConfig.paper(LLAMA_13B, layers=layers).layer_indices == expected


def test_host_facts_come_from_the_text_config():
    config = hia.HiAConfig.paper(llava_config(layers=9))
    assert (config.hidden_size, config.num_hidden_layers, config.host_type) == (64, 9, "llava")


def test_heads_of_a_width_that_128_does_not_divide():
    assert hia.HiAConfig.paper(text_config(hidden_size=96, num_attention_heads=6, num_key_value_heads=6)).head_dim == 96
    config = hia.HiAConfig.lite(LLAMA_13B, dim=320)
    assert (config.num_heads, config.head_dim) == (4, 80)


def test_dict_round_trip():
    config = hia.HiAConfig.lite(LLAMA_13B, layers=[5, 7])
    assert hia.HiAConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"query_residual": "false"}, "query_residual must be True or False, got 'false'", id="switch"),
        pytest.param({"instruction_aware": 1}, "instruction_aware must be True or False, got 1", id="switch-int"),
        pytest.param(
            {"encoder": "strided", "encoder_bias": True},
            "encoder_bias must be False with encoder 'strided', got True",
            id="bias-of-strided",
        ),
        pytest.param({"layers": [40]}, r"layers must be in \[0, 40\), got \[40\]", id="beyond"),
        pytest.param({"layers": [-1]}, r"layers must be in \[0, 40\), got \[-1\]", id="negative"),
        pytest.param({"layers": []}, "layers must name at least one", id="none"),
        pytest.param({"layers": [3, 3]}, r"layers must not repeat, got \[3, 3\]", id="twice"),
        pytest.param({"layers": "fifths"}, "layers must be 'half' or 'thirds' or 'quarters', got 'fifths'", id="name"),
        pytest.param({"num_heads": 7}, "num_heads must divide dim 5120, got 7", id="heads"),
        pytest.param({"num_heads": 4}, r"multiple of 16 of at most 640, got 5120 / 4 = 1280", id="head-dim"),
        pytest.param({"num_queries": 0}, "num_queries must be a positive int, got 0", id="queries"),
        *(
            pytest.param({"query_std": value}, f"query_std must be a finite number that is not negative, got {value!r}")
            for value in (-0.1, float("nan"), float("inf"), "1", True)
        ),
        pytest.param({"encoder": "swin"}, "encoder must be 'resnet50' or 'strided', got 'swin'", id="encoder"),
        pytest.param({"encoder_stride": 16}, "encoder_stride must be 32, got 16", id="stride"),
        pytest.param({"gate": "sigmoid"}, "gate must be 'zero_init' or 'tanh' or 'none'", id="gate"),
        pytest.param({"norms": "post"}, "norms must be 'pre' or 'pre_post', got 'post'", id="norms"),
        pytest.param({"image_std": (1, 1, 0)}, "image_std must hold three values", id="std"),
    ],
)
def test_bad_values_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        hia.HiAConfig.paper(LLAMA_13B, **changes)


def test_unknown_field_in_a_file():
    with pytest.raises(ValueError, match=r"got unknown \['colour'\], missing \['num_hidden_layers'\]"):
        hia.HiAConfig.from_dict({"hidden_size": 64, "colour": 1})


@pytest.mark.parametrize(
    ("name", "value"), [("plan", "direct/direct"), ("high_resolution", False), ("batch_norm", "batch")]
)
def test_choices_of_a_run_are_no_fields(name, value):
    config = hia.HiAConfig.paper(LLAMA_13B)
    assert name not in config.to_dict()
    message = rf"fields must say what the weights are, got {name}={value!r}, a choice of a run; .* model.set_{name}\("
    for make in (
        lambda: hia.HiAConfig.paper(LLAMA_13B, **{name: value}),
        lambda: hia.HiAConfig(hidden_size=64, num_hidden_layers=2, **{name: value}),
        lambda: config.replace(**{name: value}),
        lambda: hia.HiAConfig.from_dict({**config.to_dict(), name: value}),
    ):
        with pytest.raises(TypeError, match=message):
            make()


def test_an_older_dict_that_chose_nothing_is_read():
    config = hia.HiAConfig.paper(LLAMA_13B)
    usual = {"plan": "auto", "high_resolution": True, "batch_norm": "running"}
    assert hia.HiAConfig.from_dict({**config.to_dict(), **usual}) == config


def test_a_config_is_copied_and_pickled():
    config = hia.HiAConfig.lite(LLAMA_13B)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))  # noqa: S301


def test_host_that_is_no_model():
    with pytest.raises(TypeError, match="host must be a transformers model or config"):
        hia.HiAConfig.paper(object())


def test_a_strided_encoder_has_no_biases():
    config = hia.HiAConfig.released(LLAMA_13B, encoder="strided")
    assert config.encoder_bias is False
    assert hia.HiAConfig.from_dict({**config.to_dict(), "encoder_bias": True}) == config  # as older files may say
