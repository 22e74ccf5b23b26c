"""Training: no leak from the answer, gradient checkpointing, LoRA beside the adapter, a loss that falls."""

from __future__ import annotations

import pytest
import torch

import hia
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llama, tiny_llava


@pytest.fixture
def training_batch(processor):
    a, b, c = random_images()
    return processor([TWO, ONE], [[a, b], [c]], answers=["no new lesion.", "yes."], padding_side="right")


def adapter_gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.adapter.named_parameters() if p.grad is not None}


def test_answers_do_not_leak_into_visual_tokens(model, processor):
    """Change the answer: the visual rows, which the answer's tokens attend to, are the same at every layer."""
    a, b, _ = random_images()
    batches = [processor(TWO, [a, b], answers=answer) for answer in ("no new lesion.", "yes yes old fracture")]
    assert batches[0].input_ids.shape == batches[1].input_ids.shape
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states for inputs in batches]
    visual = batches[0].image_map >= 0
    for one, two in zip(*states, strict=True):
        torch.testing.assert_close(one[visual], two[visual], rtol=1e-5, atol=1e-6)


def test_the_released_choice_of_token_would_leak(model, processor):
    """Show that the test above can fail: conditioned on position -1, the same rows differ."""
    a, b, _ = random_images()
    batches = [processor(TWO, [a, b], answers=answer) for answer in ("no new lesion.", "yes yes old fracture")]
    for inputs in batches:
        inputs["instruction_index"] = torch.tensor([inputs.input_ids.shape[1] - 2])  # before </s>
    with torch.no_grad():
        states = [model(**inputs, output_hidden_states=True).hidden_states[-1] for inputs in batches]
    visual = batches[0].image_map >= 0
    assert (states[0][visual] - states[1][visual]).abs().max() > 1e-3


def test_training_and_generation_condition_on_the_same_token(processor):
    a, b, _ = random_images()
    asked, answered = processor(TWO, [a, b]), processor(TWO, [a, b], answers="yes.")
    index = int(answered.instruction_index[0])
    assert index == asked.input_ids.shape[1] - 1
    assert torch.equal(answered.input_ids[0, : index + 1], asked.input_ids[0])
    assert (answered.labels[0, : index + 1] == -100).all()
    assert (answered.labels[0, index + 1 :] == answered.input_ids[0, index + 1 :]).all()


def test_every_adapter_parameter_gets_a_gradient(model, training_batch):
    gradients = adapter_gradients(model.train(), training_batch)
    assert set(gradients) == {name for name, _ in model.adapter.named_parameters()}
    # A key's bias shifts all scores of a query alike: the softmax doesn't see it.
    assert not [name for name, grad in gradients.items() if not grad.any()]
    assert not any(p.grad is not None for p in model.base_model.parameters())


@pytest.mark.parametrize("host", ["llava", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(host, model, training_batch):
    if host == "llama":
        base = tiny_llama()
        model = stir(hia.get_hia_model(base, tiny_config(base)))
        pixels = [torch.randint(0, 256, (40, 50, 1), dtype=torch.uint8)]
        ids, image_map = torch.randint(6, 40, (1, 12)), torch.full((1, 12), -1)
        image_map[0, 2:6] = 0
        training_batch = {
            "input_ids": ids,
            "labels": ids,
            "image_map": image_map,
            "high_res_pixels": pixels,
            "instruction_index": torch.tensor([8]),
        }
    model.train()
    expected = adapter_gradients(model, training_batch)
    model.gradient_checkpointing_enable()
    got = adapter_gradients(model, training_batch)
    assert set(got) == set(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)


def test_checkpointed_backward_of_two_forwards_keeps_them_apart(model, processor):
    """Recompute after both forwards: each must find its own images."""
    a, b, c = random_images()
    one = processor(TWO, [a, b], answers="yes.")
    two = processor(ONE, [c], answers="no.")
    model.train()
    expected = [adapter_gradients(model, inputs) for inputs in (one, two)]
    model.gradient_checkpointing_enable()
    model.zero_grad()
    (model(**one).loss + model(**two).loss).backward()
    for name, parameter in model.adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[0][name] + expected[1][name], rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_is_refused(model, training_batch):
    model.train()
    model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing must not be re-entrant"):
        model(**training_batch)
    with torch.no_grad():
        model(**training_batch)


def test_loss_falls(base, training_batch):
    model = hia.get_hia_model(base, tiny_config(base)).train()
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=3e-3)
    before = {name: p.clone() for name, p in base.named_parameters()}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**training_batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


@pytest.mark.parametrize("order", ["lora-first", "lora-second", "peft-model"])
def test_lora_on_the_same_host(training_batch, order):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = tiny_llava()
    if order == "lora-first":
        peft.inject_adapter_in_model(lora, base)
        model = hia.get_hia_model(base, tiny_config(base))
    elif order == "lora-second":
        model = hia.get_hia_model(base, tiny_config(base))
        peft.inject_adapter_in_model(lora, base)
    else:
        model = hia.get_hia_model(peft.get_peft_model(base, lora), tiny_config(base))
    stir(model).train()
    model(**training_batch).loss.backward()
    lora_parameters = {n: p for n, p in model.base_model.named_parameters() if "lora_" in n and "language_model" in n}
    assert lora_parameters
    assert all(p.requires_grad and p.grad is not None for p in lora_parameters.values())
    assert all(p.grad is not None for p in model.adapter.parameters())
    frozen = [n for n, p in model.base_model.named_parameters() if "lora_" not in n and p.requires_grad]
    assert not frozen
    model.eval()
    with torch.no_grad():
        injected = model(**training_batch).logits
        with model.disable_adapter():
            assert not torch.equal(model(**training_batch).logits, injected)
    model.generate(**{k: v for k, v in training_batch.items() if k != "labels"}, max_new_tokens=2)
