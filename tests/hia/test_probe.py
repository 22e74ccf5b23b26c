"""``hia.probe_layers`` on hosts made so that it is known where they stop reading."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import hia
from hia.runtime.probe import LEAST_INCREASE, LayerProbe, LayerReading
from tests.hia.conftest import NONE, ONE, TWO, host_inputs, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llama, tiny_llava
from tests.hia.test_health import assert_same_state, state_of


@pytest.fixture
def base():
    """Make a host that is sure of its answers, with patches that differ."""
    host = tiny_llava()
    with torch.no_grad():
        host.lm_head.weight.mul_(8)
        for parameter in host.model.multi_modal_projector.parameters():
            parameter.mul_(8)
    return host


def own_answers(base, inputs):
    """Give labels that the host would give itself: whatever it no longer reads makes them less likely."""
    with torch.no_grad():
        likeliest = base(
            **{k: inputs[k] for k in ("input_ids", "attention_mask", "pixel_values") if k in inputs}
        ).logits
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, start in enumerate(inputs["instruction_index"].tolist()):
        end = int(inputs["attention_mask"][row].nonzero().max())
        labels[row, start + 1 : end + 1] = likeliest[row, start:end].argmax(-1)
    inputs["labels"] = labels
    return inputs


def answered(base, processor, seed=0):
    rng = np.random.default_rng(seed)
    a, b, c = (rng.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(3))
    long = "no new lesion. yes there is a old fracture left of the knee between chest studies two no no yes"
    inputs = processor([TWO, ONE], [[a, b], [c]], answers=[long, long], padding_side="right")
    return own_answers(base, inputs)


def stop_reading_after(base, layer):
    """Let attention of all later layers add nothing: what this one reads, the output of the one before, is the last."""
    with torch.no_grad():
        for later in base.model.language_model.layers[layer + 1 :]:
            later.self_attn.o_proj.weight.zero_()
    return base


def cut_visual_columns_after(base, layer, visual):
    """Let attention of all later layers find nothing at visual tokens, and read all others."""
    for later in base.model.language_model.layers[layer + 1 :]:
        for linear in (later.self_attn.k_proj, later.self_attn.v_proj):
            linear.register_forward_hook(lambda _m, _a, out: out.masked_fill(visual[..., None], 0))
    return base


@pytest.mark.parametrize("layer", [1, 2, 4])
@pytest.mark.parametrize("how", ["no-attention", "no-visual-columns"])
def test_the_last_read_layer_is_the_one_before_the_cut(base, processor, layer, how):
    if how == "no-attention":
        stop_reading_after(base, layer)
    else:
        cut_visual_columns_after(base, layer, answered(base, processor).image_map >= 0)
    found = hia.probe_layers(base, [answered(base, processor, seed) for seed in range(8)], threshold=0.01)
    assert found.last_read == layer - 1 and len(found.layers) == 6
    assert all(reading.share > 0.01 for reading in found.layers[:layer])
    assert all(reading.loss == found.loss and reading.share == 0 for reading in found.layers[layer:])
    assert f"the output of layer {layer - 1} is the last that the host reads" in str(found)


def test_a_host_that_reads_to_the_end_gets_the_papers_thirds():
    base = tiny_llava()
    plain = LayerReading(1.0, 0.5, 0.0, 0.0, 0.0)
    read = LayerReading(2.0, 0.2, 1.0, 0.1, 1.0)
    found = LayerProbe(1.0, 0.5, read, (*[read] * 39, plain), 100)  # nothing reads the last layer's visual rows
    assert found.last_read == 38 and found.advise() == (13, 26)
    assert found.advise(1) == (19,) and len(set(found.advise(39))) == 39
    short = LayerProbe(1.0, 0.5, read, (*[read] * 2, *[plain] * 4), 100)
    assert short.advise() == (0, 1) and hia.HiAConfig.paper(base, layers=short.advise()).layer_indices == (0, 1)
    for count in (0, 3, 1.0, True):
        with pytest.raises(ValueError, match=f"count must be from 1 to 2, the layers whose output .* got {count}"):
            short.advise(count)
    noisy = LayerReading(1.1, 0.5, 0.1, 0.06, 0.1)
    assert LayerProbe(1.0, 0.5, read, (read, noisy, plain), 100).last_read == 0
    assert LayerProbe(1.0, 0.5, read, (read, noisy, read, plain), 100).last_read == 2
    assert LayerProbe(1.0, 0.5, read, (read, read, plain), 100, threshold=1.5).last_read is None


def test_losses_are_the_hosts_own(base, processor):
    inputs = answered(base, processor)
    found = hia.probe_layers(base, inputs)
    with torch.no_grad():
        output = base(**host_inputs(inputs))
    assert found.loss == pytest.approx(float(output.loss), rel=1e-5)
    assert found.accuracy == 1  # they are its own answers
    assert found.tokens == int((inputs.labels[:, 1:] != -100).sum())
    # another way to the same place: the third layer's forward gives other rows
    layer = base.model.language_model.layers[2]
    forward = layer.forward

    def averaged(*args, **kwargs):
        hidden = forward(*args, **kwargs)
        tensor = (hidden[0] if isinstance(hidden, tuple) else hidden).clone()
        for image in range(3):
            tensor[inputs.image_map == image] = tensor[inputs.image_map == image].mean(0)
        return (tensor, *hidden[1:]) if isinstance(hidden, tuple) else tensor

    layer.forward = averaged
    try:
        with torch.no_grad():
            loss = float(base(**host_inputs(inputs)).loss)
    finally:
        del layer.forward
    assert found.layers[2].loss == pytest.approx(loss, rel=1e-5)
    assert found.layers[2].increase == pytest.approx(found.layers[2].loss - found.loss, abs=1e-6)
    assert found.layers[2].share == pytest.approx(found.layers[2].increase / found.blind.increase)


def test_llama_needs_the_map_and_the_input_is_its_embeddings():
    base = tiny_llama()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(std=0.15) if parameter.dim() > 1 else None
    ids, image_map = torch.randint(6, 40, (2, 30)), torch.full((2, 30), -1)
    image_map[0, 2:8], image_map[1, 3:9], image_map[1, 10:13] = 0, 2, 1
    inputs = own_answers(
        base,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "instruction_index": torch.tensor([13, 14]),
        },
    )
    with pytest.raises(ValueError, match=r"batch must hold images, got .* image_map says which rows are visual"):
        hia.probe_layers(base, inputs)
    found = hia.probe_layers(base, {**inputs, "image_map": image_map})
    embeds = base.get_input_embeddings()(ids).detach().clone()
    for image in range(3):
        embeds[image_map == image] = embeds[image_map == image].mean(0)
    with torch.no_grad():
        loss = float(base(inputs_embeds=embeds, labels=inputs["labels"]).loss)
    assert found.blind.loss == pytest.approx(loss, rel=1e-5)
    assert found.layers[5].increase == 0


def test_an_adapter_is_disabled_and_nothing_else_changes(base, processor):
    inputs = answered(base, processor)
    expected = hia.probe_layers(base, inputs)
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    model.train()
    with torch.no_grad():
        injected = model(**inputs).logits
    before = state_of(model)
    assert hia.probe_layers(model, inputs) == expected
    assert_same_state(model, before)

    def fail(*_args):
        torch.rand(1)
        raise MemoryError("stand-in for an out-of-memory error")

    handle = base.model.language_model.layers[3].register_forward_hook(fail)
    before = state_of(model)
    with pytest.raises(MemoryError):
        hia.probe_layers(model, inputs)
    assert_same_state(model, before)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, injected)
    with model.disable_adapter():
        assert hia.probe_layers(model, inputs) == expected
        assert not model._enabled


def test_a_host_in_half_precision_and_in_a_peft_model(base, processor):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    inputs = answered(base, processor).to("cpu", torch.bfloat16)
    wrapped = peft.get_peft_model(base, lora).to(torch.bfloat16).train()
    found = hia.probe_layers(wrapped, inputs)
    assert found.layers[5].increase == 0 and found.layers[0].increase != 0  # dropout would show after the last layer
    assert hia.probe_layers(wrapped, inputs) == found and wrapped.training
    assert hia.probe_layers(hia.get_hia_model(wrapped, tiny_config(base)), inputs) == found


def test_batches_are_averaged_by_tokens_and_samples_without_images_left_out(base, processor):
    a, b, c = random_images()
    one = own_answers(base, processor(ONE, [c], answers="no new lesion."))
    two = own_answers(base, processor([TWO, NONE], [[a, b], []], answers=["yes there is a old fracture.", "no."]))
    alone = [hia.probe_layers(base, inputs) for inputs in (one, two)]
    together = hia.probe_layers(base, iter([one, two, one]), batches=2)
    tokens = [probe.tokens for probe in alone]
    assert tokens == [5, int((two.labels[0, 1:] != -100).sum())] and together.tokens == sum(tokens)
    for layer in range(6):
        mean = sum(probe.layers[layer].loss * n for probe, n in zip(alone, tokens, strict=True)) / sum(tokens)
        assert together.layers[layer].loss == pytest.approx(mean)
    without_map = {name: value for name, value in one.items() if name != "image_map"}
    assert hia.probe_layers(base, without_map) == alone[0]


def test_a_host_that_reads_nothing_is_told_so(base, processor):
    stop_reading_after(base, -1)
    found = hia.probe_layers(base, answered(base, processor))
    assert found.blind.increase == 0 and not found.reads and found.last_read is None
    assert "the host does not read where things are in its images" in str(found)
    with pytest.raises(ValueError, match="layers must be read by the host to be advised; the host does not read where"):
        found.advise()
    assert "last_read" not in found.to_dict() and "layers.0.share" not in found.to_dict()


def test_an_untrained_host_is_told_apart_from_noise(processor):
    """Draw random labels: the loss goes up or down by chance, and by as much."""
    base = tiny_llava()
    inputs = answered(base, processor)
    marked = inputs["labels"] != -100
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs["labels"][marked] = torch.randint(6, 40, (int(marked.sum()),), generator=generator)
        found = hia.probe_layers(base, inputs)
        assert not found.reads or found.blind.increase > LEAST_INCREASE
        assert found.last_read is None or found.reads
    one_token = LayerReading(2.0, 0.0, 1.0, math.inf, None)
    assert not LayerProbe(1.0, 1.0, one_token, (one_token,), 1).reads


def test_layer_zero_may_have_read_it_all(base, processor):
    found = hia.probe_layers(stop_reading_after(base, 0), answered(base, processor))
    assert found.reads and found.last_read is None
    assert "no layer's output is read" in str(found)


def test_table_dictionary_and_errors(base, processor):
    inputs = answered(base, processor)
    found = hia.probe_layers(base, inputs)
    flat = found.to_dict()
    assert json.loads(json.dumps(flat)) == flat
    assert flat["layers.3.share"] == found.layers[3].share and flat["blind.loss"] == found.blind.loss
    text = str(found)
    assert "at the input" in text and "after layer 5" in text and f"layers={found.advise()}" in text

    a, _, _ = random_images()
    with pytest.raises(ValueError, match="batch must hold labels, the answers, got .*; HiAProcessor takes answers="):
        hia.probe_layers(base, processor(ONE, a))
    with pytest.raises(ValueError, match="batch must hold images, got"):
        hia.probe_layers(base, processor(NONE, answers="no."))
    with pytest.raises(ValueError, match="labels must mark answers of samples with images, got none that is not -100"):
        hia.probe_layers(base, {**inputs, "labels": torch.full_like(inputs.labels, -100)})
    with pytest.raises(ValueError, match="image_map must have the shape of labels"):
        hia.probe_layers(base, {**inputs, "image_map": inputs.image_map[:, 1:]})
    with pytest.raises(ValueError, match="batch must be a batch or an iterable of some, got an empty one"):
        hia.probe_layers(base, [])
    with pytest.raises(TypeError, match="batch must be a mapping or an iterable of some, got Tensor"):
        hia.probe_layers(base, [inputs.input_ids])
    with pytest.raises(TypeError, match="batch must be a mapping or an iterable of some, got int"):
        hia.probe_layers(base, 5)
    for batches in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"batches must be an integer of at least 1 or None, got {batches}"):
            hia.probe_layers(base, inputs, batches=batches)
    for threshold in (-0.1, 1.1, float("nan"), "0.1"):
        with pytest.raises(ValueError, match=f"threshold must be a share from 0 to 1, got {threshold!r}"):
            hia.probe_layers(base, inputs, threshold=threshold)
    with pytest.raises(TypeError, match="base must be one of LlavaForConditionalGeneration"):
        hia.probe_layers(torch.nn.Linear(2, 2), inputs)
