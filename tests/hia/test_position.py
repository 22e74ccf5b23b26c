"""Positions in the features: any size, strips, batches, dtypes, cached features, and what old configs mean."""

from __future__ import annotations

import math

import pytest
import torch

import hia
from hia.encoder import memory
from hia.encoder.position import add_position, axis_codes
from hia.layers.extractor import Extractor
from tests.hia.conftest import ONE, random_images
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of
from tests.hia.hosts import stir, text_config, tiny_config, tiny_llava

CPU = torch.device("cpu")


def test_codes_are_the_formula():
    """Compare element by element with Python's own arithmetic."""
    codes = axis_codes(7, 10, CPU, torch.float64)
    for place in range(7):
        for wave in range(5):
            periods = (4.0 * 16) ** (wave / 4) / 4.0
            angle = 2 * math.pi * periods * (place + 0.5) / 7
            assert codes[place, wave].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert codes[place, 5 + wave].item() == pytest.approx(math.cos(angle), abs=1e-12)


@pytest.mark.parametrize("grad", [False, True], ids=["in-place", "grad"])
def test_rows_and_columns_have_half_the_channels_each(grad):
    with torch.set_grad_enabled(grad):
        codes = add_position(torch.zeros(1, 5, 3, 16))[0]
    assert torch.equal(codes[..., :8], axis_codes(5, 8, CPU, torch.float32)[:, None].expand(5, 3, 8))
    assert torch.equal(codes[..., 8:], axis_codes(3, 8, CPU, torch.float32).expand(5, 3, 8))


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (128, 128), (63, 5)], ids=str)
def test_no_two_places_share_a_code(size):
    codes = add_position(torch.zeros(1, *size, 128, dtype=torch.float64)).flatten(0, 2)
    gram = codes @ codes.T
    off = gram - torch.diag(gram.diagonal())
    assert gram.diagonal().allclose(torch.full_like(gram.diagonal(), 64.0))  # every place's is of one size
    assert off.max() < 64 * 0.999


def test_one_place_has_one_code_in_every_resolution():
    """Compare the middle of an image, and the middle of its upper left quarter."""
    small, large = (axis_codes(length, 32, CPU, torch.float64) for length in (3, 63))
    assert torch.allclose(small[1], large[31])
    small, large = (axis_codes(length, 32, CPU, torch.float64) for length in (2, 34))
    assert torch.allclose(small[0], large[8])


@pytest.mark.parametrize("encoder", ["resnet50", "strided"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_encoder_adds_them_last(encoder, grad):
    bare, placed = (encoder_of(encoder=encoder, position=kind) for kind in ("none", "sincos"))
    images = [pixels_of(75, 101), pixels_of(64, 64), pixels_of(75, 101, seed=3)]
    with torch.set_grad_enabled(grad):
        one = placed(images[0], WINDOW)
        many = placed.forward_many(images, WINDOW.expand(3, 2))
        expected = [add_position(bare(image, WINDOW)[None].clone())[0] for image in images]
    for found, truth in zip(many, expected, strict=True):
        assert distance(found, truth) < 1e-6
    assert distance(one, expected[0]) < 1e-6
    assert distance(one, bare(images[0], WINDOW)) > 0.1


@pytest.mark.parametrize("folded", [False, True])
def test_strips_have_the_whole_images_positions(folded):
    encoder, pixels = encoder_of(encoder_width=16, position="sincos"), pixels_of(700, 500)
    if folded:
        encoder.fold_weights()
    budget = memory.activation_bytes(encoder, 700, 500, 16)
    assert memory.strip_rows(encoder, 700, 500, budget) is not None
    with torch.no_grad():
        assert distance(encoder(pixels, WINDOW, budget), encoder(pixels, WINDOW)) < 2e-6
        assert (
            distance(encoder(pixels, WINDOW), encoder(pixels, WINDOW)) == 0
        )  # a second call adds nothing to the first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    features = torch.zeros(2, 4, 6, 32, dtype=dtype)
    placed = add_position(features)
    exact = add_position(torch.zeros(2, 4, 6, 32, dtype=torch.float64))
    assert placed.dtype == dtype
    assert (placed.double() - exact).abs().max() <= torch.finfo(dtype).eps


def test_gradients_pass_through_unchanged():
    features = torch.randn(1, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((add_position(features) * 2).sum(), features)
    assert torch.equal(grad, torch.full_like(grad, 2.0))


def test_codes_made_under_inference_mode_serve_training():
    with torch.inference_mode():
        add_position(torch.zeros(1, 11, 13, 8))
    features = torch.zeros(1, 11, 13, 8, requires_grad=True)
    add_position(features).square().sum().backward()
    assert features.grad is not None


def test_where_reaches_what_is_extracted():
    """Move features, which are a bag to attention: the same is extracted until their places are in them."""
    config = tiny_config(text_config(), position="none")
    torch.manual_seed(0)
    extractor = Extractor(config).double()
    bag = torch.randn(6, 6, config.encoder_channels, dtype=torch.float64)
    moved = bag.flatten(0, 1)[torch.randperm(36)].view_as(bag)
    hidden, rows, sample = torch.randn(3, config.hidden_size).double(), torch.tensor([2]), torch.tensor([0])

    def extracted(features):
        return extractor(hidden, rows, hia.ImageFeatures((features,)).packed(), sample)

    with torch.no_grad():
        assert distance(extracted(bag), extracted(moved)) < 1e-12
        placed, moved_placed = (add_position(features[None].clone())[0] for features in (bag, moved))
        assert distance(extracted(placed), extracted(moved_placed)) > 0.01


def test_presets_and_old_files():
    host = text_config()
    assert hia.HiAConfig.paper(host).position == "sincos" and hia.HiAConfig.lite(host).position == "sincos"
    released = hia.HiAConfig.released(host, num_heads=4)
    assert (released.position, released.init, released.query_std) == ("none", "pytorch", 1.0)
    old = hia.HiAConfig.paper(host).to_dict()
    for name in ("position", "init", "query_std", "query_residual"):
        del old[name]
    loaded = hia.HiAConfig.from_dict(old)
    assert (loaded.position, loaded.init, loaded.query_std, loaded.query_residual) == ("none", "pytorch", 0.02, False)
    assert hia.HiAConfig.from_dict(hia.HiAConfig.paper(host).to_dict()) == hia.HiAConfig.paper(host)
    for name in ("position", "init"):
        with pytest.raises(ValueError, match=f"^HiAConfig: {name} must be "):
            hia.HiAConfig.paper(host, **{name: "learnt"})


def test_an_adapter_saved_without_the_fields_computes_what_it_did(tmp_path, processor):
    import json

    image = random_images()[2]
    base = tiny_llava()
    model = stir(hia.get_hia_model(base, tiny_config(base, position="none", init="pytorch", query_std=0.02))).eval()
    inputs = processor(ONE, [image])
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text())
    for name in ("position", "init", "query_std"):
        del settings["config"][name]
    path.write_text(json.dumps(settings))
    again = hia.HiAModel.from_pretrained(model.unload(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)
