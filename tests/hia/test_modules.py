"""Encoder, extractor and injection against the paper's equations in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hia
from hia.encoder.encoder import build_encoder
from hia.layers.adapter import HiAAdapter
from hia.layers.extractor import Extractor
from hia.layers.features import ImageFeatures, PackedFeatures
from hia.layers.injection import Injection
from hia.layers.layout import build_layout
from tests.hia.hosts import text_config

DOUBLE = {"rtol": 1e-9, "atol": 1e-9}


def config_of(**changes) -> hia.HiAConfig:
    small = {"num_queries": 5, "encoder_width": 4, "dim": 32, "num_heads": 2, **changes}
    return hia.HiAConfig.paper(text_config(), **small)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.double) * 0.3)
        for name, buffer in module.named_buffers():
            if "running_var" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=torch.double) + 0.5)
            elif "running_mean" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.double))
    return module


def attention(q, k, v, heads):
    """Compute multi-head attention of [L, D] tensors as textbooks do."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def extract_by_hand(extractor: Extractor, h_n, z):
    queries = extractor.queries
    if extractor.condition is not None:
        queries = queries + extractor.condition(h_n)
    features = extractor.feature_norm(extractor.feature_projection(z))
    k, v = extractor.kv_proj(features).chunk(2, dim=-1)
    q = extractor.q_proj(extractor.query_norm(queries))
    extracted = extractor.out_proj(attention(q, k, v, extractor.num_heads))
    return extracted + queries if extractor.residual else extracted


def inject_by_hand(injection: Injection, visual, extracted):
    k, v = injection.kv_proj(injection.extracted_norm(extracted)).chunk(2, dim=-1)
    q = injection.q_proj(injection.visual_norm(visual))
    update = injection.out_proj(attention(q, k, v, injection.num_heads))
    if injection.gate is not None:
        update = torch.tanh(injection.gate) * update
    return visual + update if injection.post_norm is None else injection.post_norm(visual + update)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("changes", [{}, {"instruction_aware": False}], ids=["aware", "unaware"])
def test_extractor_is_the_papers_cross_attention(changes, residual):
    extractor = randomised(Extractor(config_of(query_residual=residual, **changes)))
    hidden = torch.randn(20, 64, dtype=torch.double)
    maps = [torch.randn(length, 128, dtype=torch.double) for length in (6, 1, 33)]
    packed = PackedFeatures(torch.cat(maps), torch.tensor([0, 6, 7, 40], dtype=torch.int32), 33, (6, 1, 33))
    image_to_sample = torch.tensor([0, 1, 0])
    out = extractor(hidden, torch.tensor([4, 19]), packed, image_to_sample)
    for image, sample in enumerate(image_to_sample.tolist()):
        expected = extract_by_hand(extractor, hidden[[4, 19][sample]], maps[image])
        torch.testing.assert_close(out[image * 5 : image * 5 + 5], expected, **DOUBLE)


@pytest.mark.parametrize(
    "changes",
    [{"gate": "zero_init"}, {"gate": "tanh"}, {"gate": "none", "norms": "pre_post"}, {"query_residual": True}],
    ids=["zero_init", "tanh", "released-norms", "residual"],
)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "in-place"])
def test_layer_is_the_papers_three_steps(changes, grad):
    config = config_of(layers=[2], **changes)
    adapter = randomised(HiAAdapter(config))
    layer = adapter.layer(2)
    hidden = torch.randn(2, 12, 64, dtype=torch.double)
    image_map = torch.full((2, 12), -1)
    image_map[0, 2:5], image_map[0, 7:9], image_map[1, 0:4] = 0, 2, 1
    maps = tuple(torch.randn(2, n, config.encoder_channels, dtype=torch.double) for n in (3, 1, 4))
    layout = build_layout(image_map, torch.tensor([10, 11]), 3).for_call(2, 12, torch.device("cpu"))

    expected = hidden.clone()
    for image, (sample, rows) in enumerate([(0, slice(2, 5)), (1, slice(0, 4)), (0, slice(7, 9))]):
        h_n = hidden[sample, [10, 11][sample]]
        z_bar = extract_by_hand(layer.extractor, h_n, maps[image].flatten(0, 1))
        expected[sample, rows] = inject_by_hand(layer.injection, hidden[sample, rows], z_bar)
    with torch.set_grad_enabled(grad):
        out = layer(hidden.clone(), ImageFeatures(maps).packed(), layout)
    torch.testing.assert_close(out, expected, **DOUBLE)
    untouched = image_map < 0
    assert torch.equal(out[untouched], hidden[untouched])


def plain_resnet(encoder, image):
    """Run the same parameters through nn.Conv2d and nn.BatchNorm2d, NCHW."""

    def block(module, x):
        y = F.relu(module.bn1(nn.Conv2d.forward(module.conv1, x)))
        y = F.relu(module.bn2(nn.Conv2d.forward(module.conv2, y)))
        y = module.bn3(nn.Conv2d.forward(module.conv3, y))
        if module.downsample is not None:
            x = module.downsample[1](nn.Conv2d.forward(module.downsample[0], x))
        return F.relu(x + y)

    x = F.max_pool2d(F.relu(encoder.bn1(nn.Conv2d.forward(encoder.conv1, image))), 3, 2, 1)
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for module in stage:
            x = block(module, x)
    return x


def normalised(encoder, pixels, low, high):
    x = ((pixels.double() - low) / (high - low)).clamp(0, 1).permute(2, 0, 1).expand(3, -1, -1)
    mean, std = (
        torch.tensor(v, dtype=torch.float32).double()[:, None, None] for v in (encoder.image_mean, encoder.image_std)
    )
    return ((x - mean) / std)[None]


@pytest.mark.parametrize(
    "changes", [{}, {"encoder_bias": True}, {"batch_norm": "batch"}], ids=["plain", "bias", "live"]
)
def test_resnet50_is_the_usual_one(changes):
    live = changes == {"batch_norm": "batch"}
    encoder = randomised(build_encoder(config_of(position="none", **({} if live else changes))))
    encoder.set_batch_norm("batch" if live else "running")
    encoder.train(live)
    pixels = torch.randint(0, 1024, (75, 101, 1)).to(torch.uint16)
    features = encoder(pixels, torch.tensor([100.0, 900.0]))
    assert features.shape == (3, 4, 128)
    expected = plain_resnet(encoder, normalised(encoder, pixels, 100, 900))
    # the live statistics' stem normalises the pixels in fp32
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if live else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(features, expected[0].permute(1, 2, 0), **tolerance)


def test_released_biases_are_on_every_convolution_but_the_stem():
    encoder = build_encoder(config_of(encoder_bias=True))
    with_bias = {
        name
        for name, module in encoder.named_modules()
        if getattr(module, "bias", None) is not None and isinstance(module, nn.Conv2d)
    }
    assert "conv1" not in with_bias
    assert len(with_bias) == 52  # ResNet-50: 3 * 16 + 4 downsamples


@pytest.mark.parametrize(("stride", "grid"), [(32, (3, 4)), (16, (5, 7))])
def test_strided_encoder(stride, grid):
    encoder = randomised(build_encoder(config_of(position="none", encoder="strided", encoder_stride=stride))).eval()
    pixels = torch.randint(0, 256, (75, 101, 3), dtype=torch.uint8)
    features = encoder(pixels, torch.tensor([0.0, 255.0]))
    x = F.relu(encoder.bn1(nn.Conv2d.forward(encoder.conv1, normalised(encoder, pixels, 0, 255))))
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        x = F.relu(norm(nn.Conv2d.forward(conv, x)))
    assert features.shape[:2] == grid
    torch.testing.assert_close(features, x[0].permute(1, 2, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [448, 560, 672, 784, 896])
def test_tokens_of_the_papers_resolutions(side):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        encoder = build_encoder(config_of(encoder_width=64)).eval()
        features = encoder(torch.empty(side, side, 1, dtype=torch.uint8), torch.tensor([0.0, 255.0]))
    assert features.shape == (-(-side // 32), -(-side // 32), 2048)


def test_batch_norm_statistics_stay_in_training_unless_asked():
    frozen, live = (build_encoder(config_of()).train() for _ in range(2))
    live.set_batch_norm("batch")  # in training already
    pixels = torch.randint(0, 256, (64, 64, 1), dtype=torch.uint8)
    before = [encoder.bn1.running_mean.clone() for encoder in (frozen, live)]
    for encoder in (frozen, live):
        encoder(pixels, torch.tensor([0.0, 255.0]))
    assert torch.equal(frozen.bn1.running_mean, before[0])
    assert not torch.equal(live.bn1.running_mean, before[1])
    assert frozen.bn1.weight.requires_grad


def test_meta_construction_and_reset():
    with torch.device("meta"):
        adapter = HiAAdapter(config_of())
    assert all(parameter.is_meta for parameter in adapter.parameters())
    adapter.to_empty(device="cpu")
    adapter.reset_parameters()
    assert all(torch.isfinite(parameter).all() for parameter in adapter.parameters())
    layer = adapter.layer(2)
    assert not layer.injection.out_proj.weight.any()
