"""The ``released`` preset against the port of the released maths that the benchmarks use, same weights."""

from __future__ import annotations

import pytest
import torch

import hia
from bench.providers.released import MEAN, STD, ReleasedHiA
from tests.hia.hosts import tiny_config, tiny_llava


@pytest.fixture
def port():
    """Build the port of the tiny host, with four heads: eight of its 64 channels are narrower than the op allows."""
    torch.manual_seed(0)
    port = ReleasedHiA(64, 6, encoder_width=4)
    for layer in port.gate_Con.values():
        layer.hr_cross_attn = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        layer.injection_cross_attn = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    with torch.no_grad():
        for name, tensor in port.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.1 if "spm" in name else 0.3)
    return port.double().eval()


def test_released_preset_is_the_port(port):
    base = tiny_llava().double()
    pixels = [torch.randint(0, 256, (75, 101, 3), dtype=torch.uint8) for _ in range(2)]
    inputs = {
        "input_ids": torch.tensor([[1, 6, *[4] * 4, 9, *[4] * 4, 10, 11, 12]]),
        "pixel_values": torch.randn(2, 3, 28, 28, dtype=torch.double),
    }
    mean, std = (torch.tensor(value).view(3, 1, 1).double() for value in (MEAN, STD))
    normalised = torch.stack([(image.permute(2, 0, 1).double() / 255 - mean) / std for image in pixels])
    with torch.no_grad():
        host = base(**inputs).logits
        with port.attach(base, pixels=normalised, image_rows=[slice(2, 6), slice(7, 11)], instruction_index=13):
            expected = base(**inputs).logits

    model = hia.get_hia_model(base, tiny_config(base, "released", num_queries=256))
    assert model.hia_config.layer_indices == tuple(port.layer_indices)
    model.adapter.load_state_dict(hia.convert_released(port.state_dict()))
    with torch.no_grad():
        got = model(**inputs, high_res_pixels=pixels, instruction_index=torch.tensor([13])).logits
    assert (expected - host).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # the pixels' mean and std are fp32


def test_names_of_the_released_checkpoints(port):
    """Take names with the prefixes that checkpoints have, among the host's own tensors."""
    stored = {"model.layers.3.self_attn.q_proj.weight": torch.zeros(1)}
    for name, tensor in port.state_dict().items():
        parts = name.split(".")
        prefix = (
            f"model.layers.{parts[1]}.gate_Con." + ".".join(parts[2:]) if parts[0] == "gate_Con" else f"model.{name}"
        )
        stored[prefix] = tensor
    expected = hia.convert_released(port.state_dict())
    got = hia.convert_released(stored)
    assert set(got) == set(expected)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_stranger_in_the_adapter_is_an_error():
    with pytest.raises(ValueError, match="must be of the released adapter, got layers.13.gate_Con.conv_ffn.weight"):
        hia.convert_released({"model.layers.13.gate_Con.conv_ffn.weight": torch.zeros(1)})
