"""Encoding in strips: exact at any size and strip, within its budget, refused where it can't be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia
from bench.measure.memory import peak_bytes
from hia.encoder import encoder as encoder_module
from hia.encoder import memory, strips, workspace
from hia.encoder.encoder import build_encoder
from tests.hia.conftest import TWO, random_images
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of
from tests.hia.hosts import TOKENS_PER_IMAGE, stir, text_config, tiny_config

EXACT = 1e-5  # what a strip may add in fp32; oneDNN adds nothing at most sizes


def in_strips(encoder, pixels, rows):
    return strips.encode_strips(encoder, pixels[None], WINDOW[None], encoder._executor(), rows)[0]


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("size", [(149, 101), (256, 64), (97, 211), (33, 11), (161, 40)], ids=str)
def test_strips_are_the_whole(size, folded):
    encoder, pixels = encoder_of(), pixels_of(*size)
    if folded:
        encoder.fold_weights()
    with torch.no_grad():
        whole = encoder(pixels, WINDOW)
        for rows in (1, 3, 8, 16, 1000):
            assert distance(in_strips(encoder, pixels, rows), whole) < EXACT


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_size_any_strip(data):
    kind = data.draw(st.sampled_from([{}, {"encoder": "strided"}, {"encoder": "strided", "encoder_stride": 16}]))
    encoder = encoder_of(encoder_width=4, **kind)
    size = data.draw(st.tuples(st.integers(11, 200), st.integers(11, 90)))
    pixels = pixels_of(*size, channels=data.draw(st.sampled_from([1, 3])))
    if data.draw(st.booleans()):
        encoder.fold_weights()
    with torch.no_grad():
        strips = in_strips(encoder, pixels, data.draw(st.integers(1, 30)))
        assert distance(strips, encoder(pixels, WINDOW)) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes(dtype):
    encoder, pixels = encoder_of().to(dtype), pixels_of(149, 75)
    with torch.no_grad():
        bound = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
        assert distance(in_strips(encoder, pixels, 8), encoder(pixels, WINDOW)) < bound


@pytest.mark.parametrize("changes", [{}, {"encoder": "strided"}], ids=["resnet50", "strided"])
@pytest.mark.parametrize("folded", [False, True])
def test_stays_within_its_budget(changes, folded):
    encoder, pixels = encoder_of(encoder_width=16, **changes), pixels_of(1237, 1101)
    if folded:
        encoder.fold_weights()
    with torch.no_grad():
        whole = encoder(pixels, WINDOW)
        assert peak_bytes(lambda: encoder(pixels, WINDOW), "cpu") <= memory.activation_bytes(encoder, 1237, 1101)
        unit = 32 // encoder.stem_stride
        for budget in (memory.activation_bytes(encoder, 1237, 1101, rows) for rows in (unit, 5 * unit)):
            assert memory.strip_rows(encoder, 1237, 1101, budget) is not None
            # the first call also packs weights for its strips' sizes, which aren't activations
            assert distance(encoder(pixels, WINDOW, budget), whole) < EXACT
            assert peak_bytes(lambda budget=budget: encoder(pixels, WINDOW, budget), "cpu") <= budget


@pytest.mark.parametrize("side", [4096, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gigabyte_is_enough_for_large_images(side, dtype):
    """Ask the estimate, which the test above holds against measured peaks."""
    with torch.device("meta"):
        encoder = encoder_of_width_64().to(dtype)
    rows = memory.strip_rows(encoder, side, side, 2**30)
    assert rows is not None and memory.activation_bytes(encoder, side, side, rows) <= 2**30


def encoder_of_width_64():
    return build_encoder(hia.HiAConfig.paper(text_config(), num_queries=5, dim=32, num_heads=2)).eval()


def test_large_maps_go_through_in_strips_unasked(monkeypatch):
    """Expect the same features in less memory of packed weights, by kernels that need nothing beside the maps."""
    encoder, pixels = encoder_of(encoder_width=16), pixels_of(600, 701)
    assert memory.head(encoder, 600, 701) == (0, 0)
    encoder.fold_weights()
    monkeypatch.setattr(workspace, "LARGEST", 0)  # what is kept between images is not in a call's peak
    with torch.no_grad():
        whole, before = encoder(pixels, WINDOW), peak_bytes(lambda: encoder(pixels, WINDOW), "cpu")
        monkeypatch.setattr(memory, "LARGE_MAP", 2**20)
        monkeypatch.setattr(memory, "LARGE_STRIP", 2**19)
        assert memory.head(encoder, 600, 701) == (4, 12)
        assert distance(encoder(pixels, WINDOW), whole) < EXACT
        after = peak_bytes(lambda: encoder(pixels, WINDOW), "cpu")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # the peak is then oneDNN's, 12.8 MB either way
        assert after <= before
    else:
        assert after < 0.8 * before
    assert memory.head(encoder_of(encoder="strided"), 600, 701)[0] == 1


def test_a_budget_for_the_whole_image_changes_nothing():
    encoder, pixels = encoder_of(), pixels_of(90, 75)
    plenty = memory.activation_bytes(encoder, 90, 75)
    assert memory.strip_rows(encoder, 90, 75, plenty) is None
    assert torch.equal(encoder(pixels, WINDOW, plenty), encoder(pixels, WINDOW))


def test_many_within_a_budget():
    encoder = encoder_of(encoder_width=16)
    images = [pixels_of(700, 500), pixels_of(64, 64), pixels_of(700, 500, seed=1)]
    budget = memory.activation_bytes(encoder, 700, 500, 16)
    assert budget < memory.activation_bytes(encoder, 700, 500)
    windows = WINDOW.expand(3, 2)
    with torch.no_grad():
        maps = encoder.forward_many(images, windows, max_activation_bytes=budget)
        for found, image in zip(maps, images, strict=True):
            assert distance(found, encoder(image, WINDOW)) < EXACT
    on_meta = encoder.to("meta")
    twice = 2 * memory.activation_bytes(on_meta, 700, 500)
    same = [image.to("meta") for image in images[::2]] * 3
    assert [len(group) for group in on_meta._groups(same, twice)] == [2, 2, 2]


def test_errors_name_the_argument():
    encoder, pixels = encoder_of(encoder_width=16), pixels_of(700, 500)
    message = "^hia: max_activation_bytes must hold one strip of a 700 x 500 image, [0-9]+ bytes, got 1000$"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        encoder(pixels, WINDOW, 1000)
    for budget in (0, -5, 1.5, True, "1 GiB", "AUTO"):
        with pytest.raises(ValueError, match="^hia: max_activation_bytes must be 'auto', a positive int or None, got"):
            encoder(pixels, WINDOW, budget)
    budget = memory.activation_bytes(encoder, 700, 500, 16)
    with pytest.raises(ValueError, match="^hia: max_activation_bytes must hold the whole image where gradients are"):
        encoder(pixels, WINDOW, budget)
    live = encoder_of(batch_norm="batch", encoder_width=16).train()
    with torch.no_grad(), pytest.raises(ValueError, match="must hold the whole image where batch-norm takes live"):
        live(pixels, WINDOW, budget)
    encoder.requires_grad_(False)
    assert distance(encoder(pixels, WINDOW, budget), encoder(pixels, WINDOW)) < EXACT


def test_auto_cuts_what_is_larger_than_what_follows(monkeypatch):
    """Shrink what is encoded at once in any case, since images above 2^22 pixels are large."""
    encoder, pixels, window = encoder_of(encoder_width=16), pixels_of(700, 500), WINDOW
    monkeypatch.setattr(encoder_module, "GROUP_PIXELS", 128 * 128)
    cut, encode_strips = [], strips.encode_strips
    monkeypatch.setattr(strips, "encode_strips", lambda *args, **kw: cut.append(args[4]) or encode_strips(*args, **kw))
    whole_bytes = memory.activation_bytes(encoder, 700, 500)
    with torch.no_grad():
        whole = encoder(pixels, window)
        for least, expected in ((0, True), (whole_bytes - 1, True), (whole_bytes, False)):
            cut.clear()
            assert distance(encoder(pixels, window, memory.AutoBudget(least)), whole) < EXACT
            assert bool(cut) == expected
        many = encoder.forward_many([pixels_of(64, 64), pixels], window.expand(2, 2), "auto")
        assert len(cut) == 1 and distance(many[1], whole) < EXACT
        budget = memory.AutoBudget().of(encoder, pixels[None], 128 * 128)
    floor = max(memory.activation_bytes(encoder, 128, 128), memory.least_bytes(encoder, 700, 500))
    assert budget == floor < whole_bytes
    assert cut[0] == memory.strip_rows(encoder, 700, 500, budget)


def test_auto_leaves_the_whole_where_strips_do_not_serve():
    encoder, pixels = encoder_of(encoder_width=16), pixels_of(700, 500)[None]
    budget = memory.AutoBudget()
    with torch.no_grad():
        assert budget.of(encoder, pixels, 128 * 128) is not None
        assert budget.of(encoder, pixels, 700 * 500) is None  # as large as graphs and stacks are
        assert budget.of(encoder, torch.cat([pixels, pixels]), 128 * 128) is None
        assert budget.of(encoder_of(batch_norm="batch").train(), pixels, 128 * 128) is None
    assert budget.of(encoder, pixels, 128 * 128) is None  # gradients
    out = encoder(pixels[0], WINDOW, "auto")
    assert out.requires_grad
    assert budget.of(encoder.requires_grad_(False), pixels, 128 * 128) is not None


def test_auto_takes_half_of_a_gpus_free_memory(monkeypatch):
    encoder, pixels = encoder_of(encoder_width=16), pixels_of(700, 500)[None]
    whole = memory.activation_bytes(encoder, 700, 500)
    with torch.no_grad():
        on_cpu = memory.AutoBudget().of(encoder, pixels, 128 * 128)
        for free, expected in ((2 * whole, None), (2 * whole - 2, whole - 1), (0, on_cpu), (None, on_cpu)):
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
            assert memory.AutoBudget().of(encoder, pixels, 128 * 128) == expected


@pytest.mark.parametrize("way", ["forward", "generate", "encode_images"])
def test_a_model_cuts_large_images_by_the_hosts_prefill(way, monkeypatch, base, processor):
    model = stir(hia.get_hia_model(base, tiny_config(base), auto_fold=False))
    asked = processor([TWO], [random_images()[:2]])
    asked["high_res_pixels"] = [pixels_of(700, 500), pixels_of(64, 64)]
    seen, forward_many = [], model.adapter.encoder.forward_many

    def watched(images, windows, budget):
        seen.append(budget)
        return forward_many(images, windows, budget)

    monkeypatch.setattr(model.adapter.encoder, "forward_many", watched)
    monkeypatch.setattr(encoder_module, "GROUP_PIXELS", 64 * 64)
    images = {name: asked[name] for name in ("high_res_pixels", "windows")}
    run = {"encode_images": lambda **more: model.encode_images(**images, **more).maps[0]}
    run |= {"forward": lambda **more: model(**asked, **more).logits}
    run |= {"generate": lambda **more: model.generate(**asked, max_new_tokens=4, **more)}
    with torch.no_grad():
        found, whole = run[way](), run[way](max_activation_bytes=None)
        given = run[way](max_activation_bytes=memory.activation_bytes(model.adapter.encoder, 700, 500, 8))
    tokens = asked["input_ids"].numel() if way != "encode_images" else 2 * TOKENS_PER_IMAGE
    cache, layer = 2 * 6 * 64, 2 * 64 + 3 * 96
    assert seen[0] == memory.AutoBudget(tokens * 4 * (cache + layer)) and seen[1] is None and isinstance(seen[2], int)
    for one in (found, given):
        torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), pytest.raises(ValueError, match="^hia: max_activation_bytes must be 'auto', a positive int"):
        run[way](max_activation_bytes="some")


def test_a_prefill_without_cache_takes_less(base):
    host = hia.get_hia_model(base, tiny_config(base))._host[0]
    assert host.prefill_bytes(10, 2, cached=False) == 10 * 2 * (2 * 64 + 3 * 96) < host.prefill_bytes(10, 2)
    assert host.image_tokens == TOKENS_PER_IMAGE
