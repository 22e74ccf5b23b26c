"""``model.adapter_health``: its numbers against hand computations in fp64, its verdicts on starts known to be bad."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import hia
from hia.runtime import health
from tests.hia.by_hand import layer_by_hand
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llama, tiny_llava, tiny_processor

PRESETS = {
    "paper": {},
    "lite": {},
    "released": {},
    "tanh": {"gate": "tanh"},
    "blind": {"instruction_aware": False},
    "absorbed": {},
}


def model_of(base, preset):
    name = preset if preset in ("paper", "lite", "released") else "paper"
    plan = "absorbed/absorbed" if preset == "absorbed" else "auto"
    return stir(hia.get_hia_model(base, tiny_config(base, name, **PRESETS[preset]), plan=plan))


def answered(dtype=None):
    """Make a batch of three images of different sizes in two samples, with answers."""
    a, b, c = random_images()
    processor = hia.HiAProcessor(tiny_processor())
    inputs = processor([TWO, ONE], [[a, b], [c]], answers=["no new lesion.", "yes."], padding_side="right")
    return inputs.to("cpu", dtype)


def asked(inputs):
    return {name: value for name, value in inputs.items() if name != "labels"}


def default_start(model):
    """Start as PyTorch does: what was measured to stay at chance."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            for module in layer.modules():
                if isinstance(module, nn.Linear | nn.LayerNorm):
                    module.reset_parameters()
            layer.extractor.queries.normal_(std=0.02)
            if layer.injection.gate is None:
                layer.injection.out_proj.weight.normal_(std=0.02)
    return model


def healthy_start(model, inputs):
    """Start at unit variance everywhere, with the batch's statistics in the encoder's norms."""
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
                    module.bias.zero_()
            layer.extractor.queries.normal_()
        norms = [module for module in model.adapter.encoder.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model.encode_images(inputs.high_res_pixels, inputs.windows)
        for norm in norms:
            norm.eval()
    return model


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_those_of_a_hand_computation(preset):
    base = tiny_llava().double()
    model = model_of(base, preset)
    config = model.hia_config
    inputs = answered(torch.float64)
    index = config.layer_indices[0]
    expected, update, visual = layer_by_hand(model, inputs, index)
    got = model.adapter_health(inputs).layers[index]
    names = {
        "extraction_entropy": "extraction",
        "injection_entropy": "injection",
        "query_cosine": "query",
        "effective_rank": "rank",
        "update_ratio": "ratio",
        "read_cosine": "read",
        "update_cosine": "update",
        "instruction_ratio": "instruction",
    }
    if not config.instruction_aware:
        assert got.instruction_ratio is None and names.pop("instruction_ratio")
    for name, by_hand in names.items():
        assert getattr(got, name) == pytest.approx(expected[by_hand], rel=1e-9, abs=1e-9), name
    # and the hand's update is what the model added
    with torch.no_grad():
        states = model(**asked(inputs), output_hidden_states=True).hidden_states[index + 1]
    after = torch.cat([states[inputs.image_map == image] for image in range(3)])
    added = visual + update
    post = model.adapter.layer(index).injection.post_norm
    torch.testing.assert_close(after, added if post is None else post(added), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_norms_are_those_of_backward(preset):
    base = tiny_llava().double()
    model = model_of(base, preset).train()
    config = model.hia_config
    inputs = answered(torch.float64)
    found = model.adapter_health(inputs)
    loss = model(**inputs).loss
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-9)
    encoder = [p for name, p in model.adapter.named_parameters() if name.startswith("encoder.")]
    assert found.gradients["encoder"].norm == pytest.approx(norm_of(encoder), rel=1e-6)
    for index in config.layer_indices:
        layer = model.adapter.layer(index)
        extractor, injection = layer.extractor, layer.injection
        parts = {
            "queries": [extractor.queries],
            "feature_projection": [*extractor.feature_projection.parameters()],
            "extractor.q": [*extractor.q_proj.parameters()],
            "extractor.kv": [*extractor.kv_proj.parameters()],
            "extractor.out": [*extractor.out_proj.parameters()],
            "injection.q": [*injection.q_proj.parameters()],
            "injection.kv": [*injection.kv_proj.parameters()],
            "injection.out": [*injection.out_proj.parameters()],
            "norms": [p for name, p in layer.named_parameters() if "norm" in name],
        }
        if extractor.condition is not None:
            parts["condition"] = [*extractor.condition.parameters()]
        if injection.gate is not None:
            parts["gate"] = [injection.gate]
        for name, parameters in parts.items():
            gradient = found.gradients[f"{index}.{name}"]
            assert gradient.elements == sum(p.numel() for p in parameters), name
            assert gradient.norm == pytest.approx(norm_of(parameters), rel=1e-6), name
            assert gradient.rms == pytest.approx(gradient.norm / gradient.elements**0.5)
    assert sum(gradient.elements for gradient in found.gradients.values()) == sum(
        p.numel() for p in model.adapter.parameters()
    )


def norm_of(parameters):
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters))


def test_the_default_start_is_called_bad_and_a_start_of_unit_variance_is_not():
    base = tiny_llava()
    config = tiny_config(base, encoder_width=16, num_queries=64, instruction_aware=False)
    processor = hia.HiAProcessor(tiny_processor())
    images = [
        np.random.default_rng(i).integers(0, 256, (14, 14), dtype=np.uint8).repeat(32, 0).repeat(32, 1) for i in (0, 1)
    ]
    inputs = processor(TWO, images, answers="no new lesion.")
    model = healthy_start(hia.get_hia_model(base, config), inputs)
    assert model.adapter_health(inputs).problems() == []

    base = tiny_llava()
    config = config.replace(instruction_aware=True, position="none")  # as it was when this start was measured
    found = default_start(hia.get_hia_model(base, config)).adapter_health(inputs)
    problems = "\n".join(found.problems())
    for index in config.layer_indices:
        assert f"layer {index}: the extraction's attention is uniform (0.99" in problems
        assert f"layer {index}: the injection's attention is uniform (1.000000" in problems
        assert f"layer {index}: the queries' outputs are all the same (cosine 1.000000)" in problems
        assert f"layer {index}: the instruction drowns the queries" in problems
        assert f"layer {index}: the update is the same on every visual token" in problems
    small = found.problems()[-1]
    assert small.startswith("the gradient's RMS is below Adam's epsilon 1e-08, so they hardly move: ")
    assert all(f"{index}.injection.q (" in small for index in config.layer_indices) and "encoder" not in small


def test_equal_queries_have_cosine_one(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config))
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            layer.extractor.queries.copy_(layer.extractor.queries[:1].expand_as(layer.extractor.queries))
    found = model.adapter_health(asked(answered()))
    for layer in found.layers.values():
        assert layer.query_cosine == pytest.approx(1, abs=1e-6)
        assert layer.effective_rank == pytest.approx(1, abs=1e-4)
        assert layer.injection_entropy == pytest.approx(1, abs=1e-6)
    assert sum("queries' outputs are all the same" in problem for problem in found.problems()) == 2


def test_zero_query_projections_make_attention_uniform(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config))
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            for linear in (layer.extractor.q_proj, layer.injection.q_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    found = model.adapter_health(asked(answered()))
    for index, layer in found.layers.items():
        assert layer.extraction_entropy == pytest.approx(1, abs=1e-6)
        assert layer.injection_entropy == pytest.approx(1, abs=1e-6)
        assert layer.update_cosine == pytest.approx(1, abs=1e-6)
        for name in ("extraction", "injection"):
            assert any(f"layer {index}: the {name}'s attention is uniform" in problem for problem in found.problems())


def test_scores_without_bounds_make_attention_one_hot(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config))
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            layer.extractor.q_proj.weight.mul_(1e4)
    found = model.adapter_health(asked(answered()))
    assert all(layer.extraction_entropy < health.ONE_HOT_ENTROPY for layer in found.layers.values())
    assert any("extraction's attention is one-hot" in problem for problem in found.problems())


@pytest.mark.parametrize("gate", ["zero_init", "tanh"])
def test_a_zero_update_has_no_direction_and_all_else_is_defined(base, gate):
    config = tiny_config(base, gate=gate)
    model = hia.get_hia_model(base, config)
    inputs = answered()
    found = model.adapter_health(inputs)
    for layer in found.layers.values():
        assert layer.update_ratio == 0 and layer.update_cosine is None
        assert all(value is not None for name, value in vars(layer).items() if name != "update_cosine")
    # everything behind a zero has no gradient, which is no problem as long as the zero itself has one
    assert not any("gradient" in problem for problem in found.problems())
    opening = "gate" if gate == "tanh" else "injection.out"
    assert all(found.gradients[f"{index}.{opening}"].rms > 1e-6 for index in config.layer_indices)
    with torch.no_grad():
        base.lm_head.weight.zero_()  # every token equally likely, whatever is injected
    problems = model.adapter_health(inputs).problems()
    assert (
        f"layer {config.layer_indices[0]}: the update is zero, and no gradient reaches what would open it" in problems
    )


def test_nan_and_frozen_parameters(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config))
    inputs = answered()
    model.adapter.encoder.requires_grad_(False)
    assert "encoder" not in model.adapter_health(inputs).gradients
    model.adapter.requires_grad_(False)
    base.lm_head.weight.requires_grad_(True)
    assert model.adapter_health(inputs).gradients == {}
    model.adapter.requires_grad_(True)
    with torch.no_grad():
        model.adapter.layer(2).extractor.q_proj.weight[0, 0] = math.nan
    problems = model.adapter_health(inputs).problems()  # attention carries NaN on, to the update and the loss
    (first,) = [problem for problem in problems if problem.startswith("layer 2: NaN or infinite: ")]
    assert "extraction_entropy" in first and "update_ratio" in first and "the loss is nan" in problems
    with torch.no_grad():
        model.adapter.layer(2).extractor.q_proj.weight[0, 0] = 0
        model.adapter.layer(4).injection.out_proj.weight[0, 0] = math.nan
    problems = model.adapter_health(inputs).problems()
    assert "layer 4: NaN or infinite: update_cosine, update_ratio" in problems and "the loss is nan" in problems
    assert problems[-1].startswith("the gradient is NaN or infinite of encoder, 2.queries, ")


def test_an_update_below_the_hosts_rounding_is_lost(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config))
    with torch.no_grad():
        for layer in model.adapter.layers.values():
            layer.injection.out_proj.weight.mul_(1e-5)
            layer.injection.out_proj.bias.zero_()
    inputs = asked(answered())
    assert not any("rounding" in problem for problem in model.adapter_health(inputs).problems())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    problems = model.to(torch.bfloat16).adapter_health(inputs).problems()
    assert sum("below their rounding: it is lost" in problem for problem in problems) == 2


def state_of(model):
    tensors = {
        name: (tensor, tensor.clone(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    gradients = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    hooks = [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]
    modes = [module.training for module in model.modules()]
    return tensors, gradients, hooks, modes, torch.get_rng_state()


def assert_same_state(model, before):
    tensors, gradients, hooks, modes, random = before
    now = state_of(model)
    for name, (tensor, value, _) in tensors.items():
        assert now[0][name][0] is tensor and torch.equal(tensor, value), name
    for name, (gradient, value) in gradients.items():
        assert now[1][name][0] is gradient and (gradient is None or torch.equal(gradient, value)), name
    assert now[2] == hooks and now[3] == modes and torch.equal(now[4], random)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_nothing_is_left_behind(base, training, statistics):
    model = stir(hia.get_hia_model(base, tiny_config(base), batch_norm=statistics)).train(training)
    inputs = answered()
    model(**inputs).loss.backward()  # gradients of an earlier step; and transformers installs hooks in a first forward
    before = state_of(model)
    model.adapter_health(inputs)
    model.adapter_health(asked(inputs))
    assert_same_state(model, before)

    def fail(*_args):
        torch.rand(1)
        raise MemoryError("stand-in for an out-of-memory error")

    handle = model._host[0].layers[3].register_forward_hook(fail)  # between the two chosen layers
    before = state_of(model)
    with pytest.raises(MemoryError):
        model.adapter_health(inputs)
    assert_same_state(model, before)
    handle.remove()


def test_what_fold_weights_made_stays(base):
    config = tiny_config(base)
    model = stir(hia.get_hia_model(base, config)).fold_weights()
    inputs = answered()
    expected = model.adapter_health(asked(inputs))
    assert model.adapter_health(inputs).layers[2].update_ratio == pytest.approx(
        expected.layers[2].update_ratio, rel=1e-5
    )
    assert model.adapter.encoder.current() is not None
    assert all(layer.extractor.current() is not None for layer in model.adapter.layers.values())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_does_not_matter_what_the_caller_records(model, processor, around):
    inputs = answered()
    expected = model.adapter_health(inputs)
    with around():
        got = model.adapter_health(inputs)
    assert got.to_dict() == pytest.approx(expected.to_dict(), rel=1e-5)


def test_gradient_checkpointing_gives_the_same_numbers(model):
    inputs = answered()
    model.train()
    expected = model.adapter_health(inputs).to_dict()
    model.gradient_checkpointing_enable()
    assert model.adapter_health(inputs).to_dict() == pytest.approx(expected, rel=1e-4)


def test_beside_lora_and_dropout_only_the_adapters_gradients_are_taken(base):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    config = tiny_config(base)
    model = stir(hia.get_hia_model(peft.get_peft_model(base, lora), config)).train()
    inputs = answered()
    model(**inputs)  # transformers installs hooks in a first forward
    before = state_of(model)
    found = model.adapter_health(inputs)
    assert found.gradients.keys() == hia_groups(config)
    assert_same_state(model, before)  # the dropout's random numbers among it


def hia_groups(config):
    parts = ("queries", "condition", "feature_projection", "norms", *(f"extractor.{p}" for p in ("q", "kv", "out")))
    parts += tuple(f"injection.{p}" for p in ("q", "kv", "out"))
    return {"encoder", *(f"{index}.{part}" for index in config.layer_indices for part in parts)}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_half_precision_is_measured_in_fp32(preset):
    base = tiny_llava()
    config = tiny_config(base, preset)
    model = stir(hia.get_hia_model(base, config))
    exact = model.adapter_health(answered())
    rounded = model.to(torch.bfloat16).adapter_health(answered(torch.bfloat16))
    assert rounded.rounding == 2.0**-8
    for index, layer in rounded.layers.items():
        for name, value in vars(layer).items():
            assert value == pytest.approx(getattr(exact.layers[index], name), rel=0.1), (index, name)


def test_llama_and_features_encoded_before():
    base = tiny_llama()
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    ids, image_map = torch.randint(6, 40, (2, 12)), torch.full((2, 12), -1)
    image_map[0, 2:6], image_map[1, 3:5] = 0, 1
    pixels = [torch.randint(0, 256, (40 + i, 150, 1), dtype=torch.uint8) for i in range(2)]
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "image_map": image_map,
        "high_res_pixels": pixels,
        "instruction_index": torch.tensor([8, 9]),
    }
    found = model.adapter_health(inputs)
    assert set(found.layers) == {2, 4} and found.gradients["encoder"].rms > 0
    with torch.no_grad():
        inputs["features"] = model.encode_images(inputs.pop("high_res_pixels"))
    again = model.adapter_health(inputs)
    assert again.layers[2].update_ratio == pytest.approx(found.layers[2].update_ratio, rel=1e-5)
    assert again.gradients["encoder"].norm == 0  # features carry no gradient
    assert "so they hardly move: encoder (0.0e+00)" in again.problems()[-1]


def test_features_of_the_caller_keep_their_graph(model):
    inputs = answered()
    features = model.encode_images(inputs.pop("high_res_pixels"), inputs.pop("windows"))
    assert features.maps[0].requires_grad
    found = model.adapter_health({**inputs, "features": features})
    assert found.gradients["encoder"].norm > 0
    model(**inputs, features=features).loss.backward()  # through the same encoding
    assert model.adapter.encoder.conv1.weight.grad.any()


def test_where_there_is_nothing_to_compare(base):
    """Measure with one query and one feature an image."""
    config = tiny_config(base, num_queries=1)
    model = stir(hia.get_hia_model(base, config))
    processor = hia.HiAProcessor(tiny_processor())
    found = model.adapter_health(processor(ONE, np.zeros((32, 32), dtype=np.uint8)))
    for layer in found.layers.values():
        assert layer.extraction_entropy is None and layer.injection_entropy is None and layer.query_cosine is None
        assert layer.effective_rank == pytest.approx(1)
    assert found.feature_cosine is None and "extraction_entropy         -         -" in str(found)


def test_table_dictionary_and_errors(model, processor):
    inputs = answered()
    found = model.adapter_health(inputs)
    flat = found.to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert flat["layers.2.update_ratio"] == found.layers[2].update_ratio
    assert flat["gradients.4.injection.q.rms"] == found.gradients["4.injection.q"].rms
    assert flat["loss"] == found.loss and flat["feature_cosine"] == found.feature_cosine
    text = str(found)
    for word in ("layer 2", "layer 4", "query_cosine", "injection.out", "loss: ", *found.problems()):
        assert word in text
    assert "gradient of" not in str(model.adapter_health(asked(inputs)))
    assert str(health.AdapterHealth({})).endswith("no problem found")
    with pytest.raises(ValueError, match=r"hia: batch must hold images, got one with \['attention_mask', 'input_ids'"):
        model.adapter_health(processor("USER: what is there? ASSISTANT:"))
    with (
        pytest.raises(ValueError, match="must have an adapter that is attached and enabled, got one disabled"),
        model.disable_adapter(),
    ):
        model.adapter_health(inputs)
    with pytest.raises(TypeError, match="batch must be a mapping, the model's arguments, got list"):
        model.adapter_health([inputs])
    with pytest.raises(ValueError, match=r"hia: batch must hold images, got one with \[\]"):
        model.adapter_health({})
    model.unload()
    with pytest.raises(ValueError, match="attached and enabled, got one unloaded"):
        model.adapter_health(inputs)
