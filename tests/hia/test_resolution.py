"""``high_resolution=False`` holds on every way into the model, or is an error."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hia
from hia.runtime import resolution
from tests.hia.conftest import ONE, TWO, random_images
from tests.hia.hosts import IMAGE_SIZE, stir, tiny_config, tiny_llama, tiny_llava, tiny_processor


@pytest.fixture
def low():
    base = tiny_llava()
    return stir(hia.get_hia_model(base, tiny_config(base), high_resolution=False, auto_fold=False))


def batches():
    """Make batches of one prompt with images, by the ablation's processor and by the full model's."""
    a, b, c = random_images()
    both = [hia.HiAProcessor(tiny_processor(), high_resolution=high) for high in (False, True)]
    return [processor([TWO, ONE], [[a, b], [c]]) for processor in both]


def test_raw_pixels_are_resized_as_the_processor_does_it(low):
    small, raw = batches()
    assert [tuple(pixels.shape[:2]) for pixels in small.high_res_pixels] == [(IMAGE_SIZE, IMAGE_SIZE)] * 3
    assert max(max(pixels.shape) for pixels in raw.high_res_pixels) == 90
    assert torch.equal(small.windows, raw.windows)
    with torch.no_grad():
        expected = low.encode_images(small.high_res_pixels, small.windows)
        got = low.encode_images(raw.high_res_pixels, raw.windows)
        logits = low(**small).logits
        assert all(torch.equal(one, two) for one, two in zip(got, expected, strict=True))
        assert torch.equal(low(**raw).logits, logits)
        assert torch.equal(low(**{**raw, "windows": None}).logits, logits)  # an image's own range, not the small one's
    assert torch.equal(low.generate(**raw, max_new_tokens=3), low.generate(**small, max_new_tokens=3))
    assert low.adapter_health(raw) == low.adapter_health(small)


def test_the_ablation_would_have_measured_the_full_model(low):
    """Show that the test above can fail: at their own size the images give other logits."""
    small, raw = batches()
    full = hia.get_hia_model(tiny_llava(), low.hia_config, auto_fold=False)
    full.adapter.load_state_dict(low.adapter.state_dict())
    with torch.no_grad():
        assert torch.equal(full(**small).logits, low(**small).logits)
        assert not torch.equal(full(**raw).logits, low(**raw).logits)


def test_pixels_of_the_hosts_size_pass_unchanged(low):
    small, raw = batches()
    mixed = [small.high_res_pixels[0], raw.high_res_pixels[1]]
    seen = resolution.limited(low.high_resolution, low._host[0], mixed)
    assert seen[0] is mixed[0] and tuple(seen[1].shape[:2]) == (IMAGE_SIZE, IMAGE_SIZE)
    assert resolution.limited(True, low._host[0], mixed) is mixed
    with pytest.raises(ValueError, match=r"high_res_pixels\[1\] must have shape \[H, W, 1\]"):
        low.encode_images([small.high_res_pixels[0], raw.high_res_pixels[1][..., 0]])


def test_small_images_are_enlarged_as_the_processor_does_it(low):
    image = np.arange(12 * 13, dtype=np.uint8).reshape(12, 13)
    inputs = hia.HiAProcessor(tiny_processor(), high_resolution=False)(ONE, image)
    with torch.no_grad():
        got = low.encode_images([torch.from_numpy(image)[..., None]])
        assert torch.equal(got.maps[0], low.encode_images(inputs.high_res_pixels, inputs.windows).maps[0])


def test_features_of_larger_images_are_refused(low):
    small, raw = batches()
    given = {name: value for name, value in raw.items() if name not in ("high_res_pixels", "windows")}
    with torch.no_grad():
        own = low.encode_images(raw.high_res_pixels, raw.windows, keep="features")
        assert torch.equal(low(**given, features=own).logits, low(**small).logits)
        full = hia.get_hia_model(tiny_llava(), low.hia_config, auto_fold=False)
        features = full.encode_images(raw.high_res_pixels, raw.windows)
    message = (
        r"features must be of images at the host's resolution with high_resolution=False, at most 1 x 1 for "
        r"28 x 28 pixels, got 3 x 2 for image 0; make them with this model's encode_images"
    )
    for call in (low, low.generate, lambda **inputs: low.adapter_health(inputs)):
        with pytest.raises(ValueError, match=message):
            call(**given, features=features)
    with low.disable_adapter():
        low(**given, features=features)  # ignored, as everything for the adapter is


def test_the_plan_is_that_of_the_hosts_resolution(low, capsys):
    low.explain_plan([(4096, 4096), (700, 20)])
    explained = capsys.readouterr().out
    low.explain_plan([(IMAGE_SIZE, IMAGE_SIZE)] * 2)
    assert capsys.readouterr().out == explained
    full = hia.get_hia_model(tiny_llava(), low.hia_config, auto_fold=False)
    full.explain_plan([(4096, 4096), (700, 20)])
    assert capsys.readouterr().out != explained


def test_it_is_a_choice_of_the_run_not_of_the_weights(low, tmp_path):
    small, raw = batches()
    low.save_pretrained(tmp_path)
    again = hia.HiAModel.from_pretrained(tiny_llava(), tmp_path, high_resolution=False, auto_fold=False)
    full = hia.HiAModel.from_pretrained(tiny_llava(), tmp_path, auto_fold=False)
    with torch.no_grad():
        expected = low(**raw).logits
        assert torch.equal(again(**raw).logits, expected)
        own = full(**raw).logits
        assert not torch.equal(own, expected)
        assert torch.equal(full.set_high_resolution(False)(**raw).logits, expected)
        assert torch.equal(full(**small).logits, expected)  # whoever shrinks them, model or processor
        assert torch.equal(full.set_high_resolution(True)(**raw).logits, own)


def test_a_host_without_resolution_is_an_error():
    base = tiny_llama()
    model = hia.get_hia_model(base, tiny_config(base), high_resolution=False, auto_fold=False)
    pixels = [torch.randint(0, 256, (40, 50, 1), dtype=torch.uint8)]
    image_map = torch.full((1, 11), -1)
    image_map[0, 1:4] = 0
    inputs = {
        "input_ids": torch.randint(6, 40, (1, 11)),
        "image_map": image_map,
        "instruction_index": torch.tensor([9]),
    }
    must = r" must be of images at the host's resolution with high_resolution=False, and LlamaForCausalLM"
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="high_res_pixels" + must + " has none, got 40 x 50; resize the images"):
            call(**inputs, high_res_pixels=pixels)
    with pytest.raises(ValueError, match="high_res_pixels" + must):
        model.encode_images(pixels)
    with pytest.raises(ValueError, match="features" + must + " has none, got 2 x 2"):
        model(**inputs, features=hia.ImageFeatures((torch.zeros(2, 2, 128),)))
    with pytest.raises(ValueError, match="sizes" + must):
        model.explain_plan([(40, 50)])


@pytest.mark.parametrize(("stated", "size"), [(336, (336, 336)), ([336, 448], (336, 448)), (None, None)])
def test_resolutions_a_vision_tower_may_state(low, stated, size):
    host = low._host[0]
    host.model.config.vision_config.image_size = stated
    assert host.image_size == size
