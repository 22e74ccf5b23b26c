"""generate(): prefill injects, decoding does not; caches that would be wrong are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import hia
from tests.hia.conftest import NONE, ONE, TWO, host_inputs, random_images


def greedy(model, inputs, steps=6):
    """Decode greedily by whole forward passes, without a cache: the definition generate() must meet."""
    inputs = dict(inputs)
    finished = torch.zeros(len(inputs["input_ids"]), dtype=torch.bool)
    new = []
    for _ in range(steps):
        with torch.no_grad():
            token = model(**inputs).logits[:, -1].argmax(-1)
        token = torch.where(finished, 3, token)  # pad
        finished |= token == 2
        new.append(token)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[:, None]], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)[:, None]], 1)
        if "image_map" in inputs:
            inputs["image_map"] = torch.cat([inputs["image_map"], torch.full_like(token, -1)[:, None]], 1)
    return torch.stack(new, 1)


@pytest.mark.parametrize(
    "kwargs", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=["dynamic", "static", "none"]
)
def test_greedy_equals_forward_after_forward(model, batch, kwargs):
    got = model.generate(**batch, max_new_tokens=6, do_sample=False, **kwargs)
    expected = greedy(model, batch)
    new = got[:, batch.input_ids.shape[1] :]
    assert torch.equal(new, expected[:, : new.shape[1]])
    plain = model.base_model.generate(**host_inputs(batch), max_new_tokens=6, do_sample=False)
    assert not torch.equal(got, plain)  # the adapter had a say


def test_batched_generation_equals_one_at_a_time(model, processor):
    a, b, c = random_images()
    asked = [(TWO, [a, b]), (NONE, []), (ONE, [c])]
    together = processor([text for text, _ in asked], [images for _, images in asked])
    got = model.generate(**together, max_new_tokens=5, do_sample=False)[:, together.input_ids.shape[1] :]
    for row, (text, images) in enumerate(asked):
        alone = processor(text, images)
        new = model.generate(**alone, max_new_tokens=5, do_sample=False)[0, alone.input_ids.shape[1] :]
        assert torch.equal(got[row][: len(new)], new)


@pytest.mark.parametrize("beams", [1, 2])
def test_right_padding_generates_what_left_padding_does(model, processor, beams):
    a, b, c = random_images()
    left, right = (processor([TWO, NONE, ONE], [[a, b], [], [c]], padding_side=side) for side in ("left", "right"))
    assert not torch.equal(left.input_ids, right.input_ids)
    expected, got = (
        model.generate(**inputs, max_new_tokens=5, num_beams=beams, do_sample=False) for inputs in (left, right)
    )
    assert torch.equal(got, expected)


def test_beams_equal_beams_one_at_a_time(model, processor, batch):
    a, b, c = random_images()
    got = model.generate(**batch, max_new_tokens=5, num_beams=3, do_sample=False)
    for row, (text, images) in enumerate([(TWO, [a, b]), (NONE, []), (ONE, [c])]):
        alone = processor(text, images)
        new = model.generate(**alone, max_new_tokens=5, num_beams=3, do_sample=False)[0, alone.input_ids.shape[1] :]
        assert torch.equal(got[row, batch.input_ids.shape[1] :][: len(new)], new)


def test_every_beam_sees_its_own_samples_images(model, batch):
    """Keep beams apart that transformers alone mixes up when samples have different numbers of images."""

    def prefill(**kwargs):
        options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, "max_new_tokens": 1}
        return model.generate(**batch, **options, **kwargs).logits[0]

    single, beams = prefill(), prefill(num_beams=3).view(3, 3, -1)
    for beam in range(3):
        torch.testing.assert_close(beams[:, beam], single, rtol=1e-4, atol=1e-4)


def test_sampling_with_several_returns(model, batch):
    torch.manual_seed(3)
    got = model.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert got.shape[0] == 6


def test_two_questions_on_cached_features(model, processor):
    a, b, _ = random_images()
    first = processor("USER: <image> <image>\nwhat changed? ASSISTANT:", [a, b])
    second = processor("USER: <image> <image>\nis there a fracture? ASSISTANT:", [a, b])
    features = model.encode_images(first.high_res_pixels, first.windows)
    for inputs in (first, second):
        cached = {k: v for k, v in inputs.items() if k not in ("high_res_pixels", "windows")}
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(model.generate(**cached, features=features, max_new_tokens=5, do_sample=False), expected)


def test_injection_runs_once_per_layer(model, batch, monkeypatch):
    calls = []
    for index, layer in model.adapter.layers.items():
        monkeypatch.setattr(layer, "forward", lambda *a, f=layer.forward, i=index: calls.append(i) or f(*a))
    model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert calls == [str(index) for index in model.hia_config.layer_indices]


def test_generate_with_the_adapter_disabled(base, model, batch):
    expected = base.generate(**host_inputs(batch), max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), expected)


def test_manual_decoding_with_the_returned_cache(model, batch):
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([batch.attention_mask, torch.ones(3, 1, dtype=torch.int64)], 1)
        positions = mask.cumsum(1)[:, -1:] - 1
        step = model(
            input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=out.past_key_values
        ).logits[:, -1]
        whole = hia.HiABatch(batch)
        whole["input_ids"] = torch.cat([batch.input_ids, token], 1)
        whole["attention_mask"] = mask
        whole["image_map"] = torch.cat([batch.image_map, torch.full_like(token, -1)], 1)
        whole["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        prefix = dict(batch, position_ids=whole["position_ids"][:, :-1])
        cache = model(**prefix, use_cache=True).past_key_values
        step = model(input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        expected = model(**whole).logits[:, -1]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_second_turn_on_a_cache_with_images_is_refused(model, batch):
    out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    question = torch.randint(6, 20, (3, 5))
    longer = torch.cat([out.sequences, question], 1)
    with pytest.raises(NotImplementedError, match="past_key_values must be empty when a new question is asked"):
        model.generate(longer, past_key_values=out.past_key_values, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="conditioned on an earlier instruction, and 5 new tokens"):
        model(input_ids=question, past_key_values=out.past_key_values)
    with pytest.raises(NotImplementedError, match="past_key_values must be empty when images are given"):
        model.generate(**batch, past_key_values=out.past_key_values, max_new_tokens=2)


def test_second_turn_without_images_may_reuse_its_cache(base, model):
    ids = torch.randint(6, 20, (1, 7))
    first = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, do_sample=False)
    longer = torch.cat([first.sequences, torch.randint(6, 20, (1, 4))], 1)
    got = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=3, do_sample=False)
    assert torch.equal(got, base.generate(longer, max_new_tokens=3, do_sample=False))


def test_chunked_prefill_is_refused(model, batch):
    message = "must reach the decoder layers in one piece of 18 tokens, got a first piece of 4"
    with pytest.raises(NotImplementedError, match=message):
        model.generate(**batch, max_new_tokens=3, prefill_chunk_size=4, do_sample=False)
    embeds = model.get_input_embeddings()(batch.input_ids[:, :4])  # a loop of the caller's own
    maps = {name: batch[name] for name in ("image_map", "instruction_index", "high_res_pixels", "windows")}
    with pytest.raises(NotImplementedError, match=message):
        model(inputs_embeds=embeds, **maps)
    with pytest.raises(ValueError, match="image_map must cover the 20 tokens the decoder layers see, got 18"):
        model(inputs_embeds=embeds.repeat(1, 5, 1), **maps)


def test_filled_cache_in_forward_is_refused(model, batch):
    cache = DynamicCache()
    model.base_model(input_ids=torch.randint(6, 20, (3, 4)), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="got a cache of 4 tokens"):
        model(**batch, past_key_values=cache)
