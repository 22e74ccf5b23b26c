"""Device and dtype follow the host: half precision, autocast, device_map, meta construction, torch.compile."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import hia
from hia_kernels.testing import rel_rms
from tests.hia.conftest import ONE, host_inputs, random_images
from tests.hia.hosts import llava_config, stir, tiny_config, tiny_llava


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_host(batch, dtype):
    exact_model = stir(hia.get_hia_model(tiny_llava(), tiny_config(tiny_llava())))
    base = tiny_llava().to(dtype)
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    assert {p.dtype for p in model.adapter.parameters()} == {dtype}
    inputs = batch.to("cpu", dtype)
    with torch.no_grad():
        exact = exact_model(**batch).logits
        got = model(**inputs).logits
        host = rel_rms(base(**host_inputs(inputs)).logits, exact_model.base_model(**host_inputs(batch)).logits)
    assert got.dtype == dtype
    assert rel_rms(got[batch.attention_mask.bool()], exact[batch.attention_mask.bool()]) < 4 * host + 0.05
    model.generate(**inputs, max_new_tokens=3)


def test_autocast_training_step(model, processor):
    inputs = processor(ONE, [random_images()[0]], answers="yes.")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**inputs).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.adapter.parameters())


def test_meta_construction_then_real(batch):
    with torch.device("meta"):
        base = LlavaForConditionalGeneration(llava_config())
        model = hia.get_hia_model(base, tiny_config(base))
    assert all(p.is_meta for p in model.adapter.parameters())
    on_host = hia.get_hia_model(LlavaForConditionalGeneration(llava_config()).to("meta"), tiny_config(base))
    assert all(p.is_meta for p in on_host.adapter.parameters())


def test_adapter_moves_with_the_model(model):
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("offload", [False, True], ids=["cpu", "disk"])
def test_device_map(batch, offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    plain = tiny_llava()
    expected_model = stir(hia.get_hia_model(plain, tiny_config(plain)))
    with torch.no_grad():
        expected = expected_model(**batch).logits
    base = tiny_llava()
    names = ["model.vision_tower", "model.multi_modal_projector", "lm_head", "model.language_model.embed_tokens"]
    names += ["model.language_model.norm", "model.language_model.rotary_emb"]
    device_map = dict.fromkeys(names, "cpu")
    for layer in range(6):
        device_map[f"model.language_model.layers.{layer}"] = "disk" if offload and layer in (1, 2) else "cpu"
    base = accelerate.dispatch_model(base, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    assert {p.device.type for p in model.adapter.parameters()} == {"cpu"}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


@pytest.fixture
def small_to_compile():
    """Make a model of few layers and few convolutions: tracing takes most of the time."""
    base = tiny_llava(layers=3)
    return stir(hia.get_hia_model(base, tiny_config(base, encoder="strided", layers=[1])))


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_model(small_to_compile, batch):
    model, plain = small_to_compile, host_inputs(batch)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        for inputs in (batch, plain, batch):
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_training_step(small_to_compile, processor):
    inputs = processor(ONE, [random_images()[0]], answers="yes.")
    model = small_to_compile.train()
    model(**inputs).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.adapter.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(**inputs).loss.backward()
    for name, parameter in model.adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
