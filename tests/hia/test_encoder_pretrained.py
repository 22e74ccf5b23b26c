"""ResNet-50 weights in every layout people have."""

from __future__ import annotations

import pytest
import torch

from bench.providers.released import ReleasedResNet50
from hia.encoder.encoder import load_resnet50
from tests.hia.encoders import WINDOW, distance, encoder_of, pixels_of

CLASSIFIER = {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}


def torchvision_weights(seed=3, **changes):
    """Draw weights by the names of torchvision and timm, with a classifier and counters."""
    return encoder_of(seed, **changes).state_dict() | CLASSIFIER


def torchvision_keys():
    """List the keys of ``torchvision.models.resnet50().state_dict()``; timm's ``resnet50`` has the same."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["conv1.weight", *(f"bn1.{leaf}" for leaf in norm)]
    for layer, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            here = f"layer{layer}.{block}"
            for number in (1, 2, 3):
                keys += [f"{here}.conv{number}.weight", *(f"{here}.bn{number}.{leaf}" for leaf in norm)]
            if block == 0:
                keys += [f"{here}.downsample.0.weight", *(f"{here}.downsample.1.{leaf}" for leaf in norm)]
    return [*keys, "fc.weight", "fc.bias"]


def normalised(encoder, pixels):
    """Normalise to [1, 3, H, W] fp32."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (encoder.image_mean, encoder.image_std))
    return ((pixels.permute(2, 0, 1) / 255 - mean) / std)[None]


def stages_of(encoder, pixels):
    """Return [C, H, W] after the stem and after each of the four stages."""
    step = encoder._executor()
    x = encoder.stem(pixels[None], WINDOW[None], step)
    found, ends = [x], [3, 7, 13, 16]
    for number, block in enumerate(encoder.units(), start=1):
        x = block(x, step)
        found += [x] if number in ends else []
    return [stage[0].permute(2, 0, 1) for stage in found]


def stir(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=generator))
    return module.eval()


@pytest.mark.parametrize("size", [(75, 101), (64, 96)], ids=str)
@pytest.mark.parametrize("prefix", ["", "resnet."], ids=["bare", "classification"])
def test_hugging_face_at_every_stage(size, prefix):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[32, 64, 128, 256])
    assert config.downsample_in_bottleneck is False and list(config.depths) == [3, 4, 6, 3]
    torch.manual_seed(0)
    model = stir(transformers.ResNetModel(config))
    weights = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    if prefix:
        weights |= {"classifier.1.weight": torch.zeros(10, 256), "classifier.1.bias": torch.zeros(10)}
    encoder, pixels = encoder_of(), pixels_of(*size, channels=3)
    load_resnet50(encoder, weights)
    with torch.no_grad():
        expected = model(normalised(encoder, pixels), output_hidden_states=True).hidden_states
        for run in (encoder, encoder.fold_weights() and encoder):
            found = stages_of(run, pixels)
            assert len(found) == len(expected) == 5
            for stage, truth in zip(found, expected, strict=True):
                assert stage.shape == truth.shape[1:] and distance(stage, truth[0]) < 2e-6


def test_torchvision_and_timm():
    encoder, weights = encoder_of(), torchvision_weights()
    keys = torchvision_keys()
    assert len(keys) == 320 and list(weights) == keys
    load_resnet50(encoder, {name: tensor.double() for name, tensor in weights.items()})
    with torch.no_grad():
        pixels = pixels_of(64, 75)
        assert torch.equal(encoder(pixels, WINDOW), encoder_of(seed=3)(pixels, WINDOW))


@pytest.mark.parametrize("prefix", ["", "model.vision_tower.spm.stem."], ids=["bare", "whole-model"])
def test_released_code(prefix):
    torch.manual_seed(0)
    port = stir(ReleasedResNet50(width=8))
    weights = {f"{prefix}{name}": tensor for name, tensor in port.state_dict().items()}
    if prefix:
        weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(2, 2)
    encoder, pixels = encoder_of(encoder_bias=True), pixels_of(75, 101, channels=3)
    load_resnet50(encoder, weights)
    with torch.no_grad():
        expected = port(normalised(encoder, pixels))[0]
        assert distance(encoder(pixels, WINDOW).flatten(0, 1), expected) < 2e-6


def test_weights_without_biases_fit_an_encoder_with_them():
    biased, plain, pixels = encoder_of(encoder_bias=True), encoder_of(), pixels_of(64, 64)
    load_resnet50(biased, torchvision_weights())
    load_resnet50(plain, torchvision_weights())
    with torch.no_grad():
        assert distance(biased(pixels, WINDOW), plain(pixels, WINDOW)) < 2e-6


def test_loading_ends_folded_weights():
    encoder, pixels = encoder_of(), pixels_of(64, 64)
    encoder.fold_weights()
    load_resnet50(encoder, torchvision_weights())
    with torch.no_grad(), pytest.warns(UserWarning, match="parameters have changed since fold_weights"):
        assert torch.equal(encoder(pixels, WINDOW), encoder_of(seed=3)(pixels, WINDOW))


def test_one_error_lists_everything():
    weights = torchvision_weights()
    del weights["layer3.5.bn2.running_mean"]
    weights["layer5.0.conv1.weight"] = weights["conv1.bias"] = torch.zeros(1)
    weights["layer1.0.conv2.weight"] = torch.zeros(8, 8, 5, 5)
    encoder = encoder_of()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    message = (
        "^hia.load_resnet50: state_dict must fit the encoder, got missing layer3.5.bn2.running_mean; unexpected "
        r"conv1.bias; unexpected layer5.0.conv1.weight; layer1.0.conv2.weight of shape \[8, 8, 5, 5\] instead of "
        r"\[8, 8, 3, 3\]$"
    )
    with pytest.raises(ValueError, match=message):
        load_resnet50(encoder, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())


def test_what_is_no_resnet50():
    with pytest.raises(ValueError, match=r"state_dict must have torchvision's, .* got blocks.0.attn.qkv.weight \.\.\."):
        load_resnet50(encoder_of(), {"blocks.0.attn.qkv.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got no tensor \.\.\."):
        load_resnet50(encoder_of(), {})
    with pytest.raises(ValueError, match="encoder must be a 'resnet50', got StridedEncoder"):
        load_resnet50(encoder_of(encoder="strided"), torchvision_weights())
    with pytest.raises(ValueError, match="missing layer1.0.conv1.weight"):
        load_resnet50(encoder_of(), {"conv1.weight": torch.zeros(8, 3, 7, 7)})
