"""The start of training: projections, batch-norm statistics, the frozen host's mode, groups of parameters."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hia
from hia.encoder import calibration
from hia.encoder.calibration import is_pristine, norms_of
from hia.layers.adapter import HiAAdapter
from tests.hia.conftest import TWO, random_images
from tests.hia.encoders import distance, encoder_of, pixels_of
from tests.hia.hosts import text_config, tiny_config, tiny_llava


def linears_of(adapter):
    return {name: m for name, m in adapter.layers.named_modules() if isinstance(m, nn.Linear)}


def test_projections_start_at_unit_variance():
    torch.manual_seed(0)
    config = tiny_config(text_config(hidden_size=256), dim=128, num_heads=4, encoder_width=16, num_queries=64)
    adapter = HiAAdapter(config)
    for name, linear in linears_of(adapter).items():
        assert not linear.bias.any(), name
        gain = linear.weight.std().item() * linear.in_features**0.5
        expected = 0 if name.endswith("injection.out_proj") else 0.1 if name.endswith("condition") else 1
        assert gain == pytest.approx(expected, rel=0.05), name
    for layer in adapter.layers.values():
        assert layer.extractor.queries.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_pytorchs_start_is_nn_linears(preset):
    torch.manual_seed(0)
    adapter = HiAAdapter(tiny_config(text_config(), preset, init="pytorch", gate="none"))
    for linear in linears_of(adapter).values():
        bound = linear.in_features**-0.5
        assert linear.weight.abs().max() <= bound and linear.bias.any()
        assert linear.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_reset_starts_as_construction_does():
    with torch.device("meta"):
        adapter = HiAAdapter(tiny_config(text_config(), encoder="strided"))
    adapter.to_empty(device="cpu")
    adapter.reset_parameters()
    for name, linear in linears_of(adapter).items():
        assert not linear.bias.any() and bool(linear.weight.any()) != name.endswith("injection.out_proj")


def test_a_new_encoder_is_pristine_and_a_loaded_one_is_not():
    encoder = encoder_of()
    assert not is_pristine(encoder)
    config = tiny_config(text_config(), encoder="strided")
    assert is_pristine(HiAAdapter(config).encoder)


def modules_of(encoder, pixels, windows):
    """Run the encoder's modules as they are, to [n, C, H, W]."""
    mean, std = torch.tensor(encoder.image_mean), torch.tensor(encoder.image_std)
    low, high = windows[:, :, None, None, None].unbind(1)
    x = ((((pixels.float() - low) / (high - low)).clamp(0, 1) - mean) / std).permute(0, 3, 1, 2)
    x = F.relu(encoder.bn1(nn.Conv2d.forward(encoder.conv1, x)))
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        x = F.relu(norm(nn.Conv2d.forward(conv, x)))
    return x


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
def test_calibration_measures_all_pixels(batch_norm):
    """Compare with PyTorch's own norms, which keep the same moments of one batch with momentum 1."""
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided", position="none"), batch_norm=batch_norm)
    images = [pixels_of(96, 75, seed=seed) for seed in range(4)]
    windows = torch.tensor([[0.0, 255.0], [255.0, 0.0], [10.0, 200.0], [0.0, 300.0]])
    encoder = model.adapter.encoder
    modes = [module.training for module in model.modules()]
    assert model.calibrate_encoder(images, windows) is model
    assert [module.training for module in model.modules()] == modes and not is_pristine(encoder)
    found = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms_of(encoder)]
    for norm in norms_of(encoder):
        norm.train().momentum = 1.0
    with torch.no_grad():
        modules_of(encoder, torch.stack(images), windows)
    for norm, (mean, variance) in zip(norms_of(encoder), found, strict=True):
        assert distance(mean, norm.running_mean) < 1e-5 and distance(variance, norm.running_var) < 1e-5
    assert all(norm.momentum == 1.0 for norm in norms_of(encoder))


def test_calibration_joins_images_of_different_sizes():
    """Compare the stem's moments, which can be told, since its input is the pixels alone: all count alike."""
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    encoder, images = model.adapter.encoder, [pixels_of(64, 64), pixels_of(40, 200, seed=1), pixels_of(33, 35, seed=2)]
    model.calibrate_encoder(images)
    mean, std = torch.tensor(encoder.image_mean), torch.tensor(encoder.image_std)
    outputs = [
        encoder.conv1.apply_to_stem(((image.float() / 255 - mean) / std)[None])
        .flatten(1)
        .view(encoder.bn1.num_features, -1)
        for image in images
    ]
    joined = torch.cat(outputs, dim=1)
    assert distance(encoder.bn1.running_mean, joined.mean(1)) < 1e-5
    assert distance(encoder.bn1.running_var, joined.var(1)) < 1e-5
    before = encoder.bn1.running_var.clone()
    model.calibrate_encoder(images)
    assert torch.equal(encoder.bn1.running_var, before)  # measured anew, not averaged into


def test_calibration_takes_radiographs_with_their_windows():
    """Calibrate on an inverted 16-bit image (MONOCHROME1): its window is half of what the encoder sees."""
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    norm = model.adapter.encoder.bn1
    images = [
        hia.Radiograph(pixels_of(64, 64, seed=seed).to(torch.int32).mul(4).to(torch.uint16), (900.0, 38.0))
        for seed in range(3)
    ]
    model.calibrate_encoder(images)
    found = norm.running_mean.clone(), norm.running_var.clone()
    pixels, windows = [image.pixels for image in images], torch.tensor([image.window for image in images])
    model.calibrate_encoder(pixels, windows)
    assert torch.equal(norm.running_mean, found[0]) and torch.equal(norm.running_var, found[1])
    model.calibrate_encoder(pixels)
    assert distance(norm.running_mean, found[0]) > 0.1  # the window matters
    for wrong, given in ((images, windows), ([images[0], pixels[1]], None)):
        with pytest.raises(ValueError, match="images must be radiographs alone, whose windows are taken, or tensors"):
            model.calibrate_encoder(wrong, given)
    with pytest.raises(TypeError, match=r"^hia: windows must be a tensor of shape \[3, 2\], got list"):
        model.calibrate_encoder(pixels, windows.tolist())


def test_statistics_beyond_the_dtype_are_refused():
    """Refuse what fp16 norms can't hold, variances above 65504; squares are summed in fp64."""
    base = tiny_llava()
    model = hia.get_hia_model(base.half(), tiny_config(base, encoder="strided"))
    encoder = model.adapter.encoder
    with torch.no_grad():
        encoder.conv1.weight.mul_(3000)
    with pytest.raises(ValueError, match="got statistics beyond torch.float16 before encoder.bn1; use fp32 or bf16"):
        model.calibrate_encoder([pixels_of(64, 64)])
    assert is_pristine(encoder)


def test_calibrated_features_have_unit_scale():
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided", position="none"))
    images = [pixels_of(96, 96, seed=seed) // 16 for seed in range(4)]  # dark images
    with torch.no_grad():
        before = torch.stack(list(model.encode_images(images).maps))
        after = torch.stack(list(model.calibrate_encoder(images).encode_images(images).maps))
    assert after.std() > 0.3 and abs(before.std() - 0.58) > abs(after.std() - 0.58)


def test_calibration_takes_a_large_set_in_parts(monkeypatch):
    """Check that no part is larger than asked for or left with one image, and that all hold every image once.

    The stem's statistics, which no norm comes before, are the same however the images are parted.
    """
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    encoder = model.adapter.encoder
    images = [pixels_of(64, 64, seed=seed) for seed in range(7)] + [pixels_of(40, 64, seed=9)]
    whole = calibration.chunks_of(encoder, images)
    assert whole == [list(range(7)), [7]]
    model.calibrate_encoder(images)
    expected = encoder.bn1.running_mean.clone(), encoder.bn1.running_var.clone()
    monkeypatch.setattr(calibration, "CHUNK_PIXELS", 3 * 64 * 64)
    assert calibration.chunks_of(encoder, images) == [[0, 1], [2, 3], [4, 5, 6], [7]]
    model.calibrate_encoder(images)
    assert distance(encoder.bn1.running_mean, expected[0]) < 1e-5
    assert distance(encoder.bn1.running_var, expected[1]) < 1e-5


def test_one_feature_has_no_variance():
    """Refuse a 32 x 32 image, one feature behind a stride of 32; two such images are two."""
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    with pytest.raises(
        ValueError, match="must give more than one feature together, got one of 32 x 32 pixels, a feature per 32"
    ):
        model.calibrate_encoder([pixels_of(64, 64), pixels_of(32, 32)])
    assert is_pristine(model.adapter.encoder)
    model.calibrate_encoder([pixels_of(32, 32), pixels_of(32, 32, seed=1)])
    assert all(torch.isfinite(norm.running_var).all() for norm in norms_of(model.adapter.encoder))


def test_an_error_in_calibration_leaves_everything():
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    state = {name: tensor.clone() for name, tensor in model.adapter.state_dict().items()}
    with pytest.raises(ValueError, match="^hia.calibrate_encoder: images must hold at least one image, got none$"):
        model.calibrate_encoder([])
    with pytest.raises(ValueError, match=r"^hia: images\[1\] must have shape"):
        model.calibrate_encoder([pixels_of(64, 64), torch.zeros(3, 64, 64)])
    with torch.no_grad():
        model.adapter.encoder.convs[1].weight.fill_(float("inf"))
    state["encoder.convs.1.weight"].fill_(float("inf"))
    with pytest.raises(ValueError, match="must give finite activations to calibrate"):
        model.calibrate_encoder([pixels_of(64, 64)])
    for name, tensor in model.adapter.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not any(norm._forward_pre_hooks for norm in norms_of(model.adapter.encoder))


def test_training_with_untouched_statistics_warns():
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base, encoder="strided"))
    with pytest.warns(
        UserWarning, match=r"^hia: the encoder's batch-norm statistics are a new encoder's .*calibrate_encoder"
    ):
        model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()
        model.calibrate_encoder([pixels_of(64, 64)]).train()
        live = tiny_llava()
        hia.get_hia_model(live, tiny_config(live, encoder="strided"), batch_norm="batch").train()
        fixed = tiny_llava()
        frozen = hia.get_hia_model(fixed, tiny_config(fixed, encoder="strided"))
        frozen.adapter.encoder.requires_grad_(False)
        frozen.train()


def with_dropout(layers=6):
    return tiny_llava(layers, attention_dropout=0.5)


@pytest.fixture
def late(processor):
    """Train on a host with dropout whose checkpointing is enabled later; count what its last layer's attention runs."""
    a, b, _ = random_images()
    base = with_dropout()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics that no data has touched
        model = hia.get_hia_model(base, tiny_config(base)).train()
    calls = []
    model._host[0].layers[-1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    return model, processor(TWO, [a, b], answers="yes."), calls


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_a_frozen_host_has_no_dropout_in_training(processor):
    a, b, _ = random_images()
    batch = processor(TWO, [a, b], answers="yes.")
    base = with_dropout().train()
    with torch.no_grad():
        host = {
            name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")
        }
        assert not torch.equal(base(**host).logits, base(**host).logits)  # it has some
        model = hia.get_hia_model(base, tiny_config(base)).train()
        assert model.training and model.adapter.training
        assert torch.equal(model(**batch).logits, model(**batch).logits)
        model.gradient_checkpointing_enable()
        assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
@pytest.mark.parametrize("order", ["enabled first", "trained first"])
def test_checkpointing_still_recomputes(order, processor):
    a, b, _ = random_images()
    batch = processor(TWO, [a, b], answers="yes.")
    base = with_dropout()
    model = hia.get_hia_model(base, tiny_config(base))
    if order == "enabled first":
        model.gradient_checkpointing_enable()
        model.train()
    else:
        model.train()
        model.gradient_checkpointing_enable()
    calls = []
    last = model._host[0].layers[-1]
    last.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    model(**batch).loss.backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    model.eval()
    assert not any(module.training for module in model.modules())


def test_checkpointing_enabled_on_the_host_after_train(late):
    """Enable it as a trainer does that holds the base model: transformers asks for a mode that train() took away."""
    model, batch, calls = late
    model.base_model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    assert len(calls) == 2
    assert not any(m.training for m in model._host[0].layers[-1].self_attn.modules())  # its dropout stays off


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_checkpointing_takes_what_transformers_trainer_passes():
    """Take every_n_layers and offload, which transformers 5.17 passes to whatever model it has."""
    base = with_dropout()
    model = hia.get_hia_model(base, tiny_config(base)).train()
    taken = []
    base.gradient_checkpointing_enable = lambda **kwargs: taken.append(kwargs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None, every_n_layers=2, offload=False)
    assert taken == [{"gradient_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 2, "offload": False}]


def test_reentrant_checkpointing_of_one_layer_is_refused(late):
    model, batch, _ = late
    model._host[0].model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in [*model._host[0].layers][:3]:
        layer.gradient_checkpointing = False
    model._host[0].text_model.gradient_checkpointing = False
    with pytest.raises(ValueError, match="gradient checkpointing must not be re-entrant"):
        model(**batch)


def test_late_checkpointing_leaves_the_adapters_modes(late):
    model, batch, _ = late
    model.adapter.encoder.eval()  # as somebody does who freezes it
    model.base_model.gradient_checkpointing_enable()
    model(**batch)
    assert not any(module.training for module in model.adapter.encoder.modules())


def test_unload_leaves_the_host_frozen_for_lora_that_came_later():
    peft = pytest.importorskip("peft")
    base = tiny_llava()
    model = hia.get_hia_model(base, tiny_config(base))
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    model.unload()
    assert {name for name, p in tuned.named_parameters() if p.requires_grad} == trained
    assert trained and all("lora_" in name for name in trained)
    before = tiny_llava()
    lora = peft.get_peft_model(before, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before.lm_head.requires_grad_(True)
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    hia.get_hia_model(lora, tiny_config(before)).unload()
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == trained


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_a_frozen_lora_has_no_dropout():
    peft = pytest.importorskip("peft")
    base = tiny_llava()
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], inference_mode=True)
    model = hia.get_hia_model(peft.get_peft_model(base, config), tiny_config(base)).train()
    assert not any(module.training for module in model.base_model.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_unload_gives_the_hosts_modes_back(training):
    base = tiny_llava().train(training)
    base.model.vision_tower.train(not training)
    before = [module.training for module in base.modules()]
    model = hia.get_hia_model(base, tiny_config(base)).train(not training)
    assert [module.training for module in base.modules()] != before
    model.unload()
    assert [module.training for module in base.modules()] == before


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoHa"])
def test_pefts_dropout_is_on_in_training(method, processor):
    """Tell dropout by what it does, as each method asks another flag: two forward passes differ, and none in eval."""
    peft = pytest.importorskip("peft")
    a, b, _ = random_images()
    batch = processor(TWO, [a, b], answers="yes.")
    base = with_dropout()
    targets = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|v_proj)"}
    if method == "LoHa":
        config = peft.LoHaConfig(module_dropout=0.5, init_weights=False, **targets)
    else:
        config = peft.LoraConfig(lora_dropout=0.5, use_dora=method == "DoRA", init_lora_weights=False, **targets)
    tuned = peft.get_peft_model(base, config)
    model = hia.get_hia_model(tuned, tiny_config(base)).train()
    with torch.no_grad():
        passes = [model(**batch).logits for _ in range(3)]
        assert not all(torch.equal(passes[0], other) for other in passes[1:])
        model.eval()
        assert torch.equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.filterwarnings("ignore:hia. the encoder's batch-norm")
def test_what_is_trained_in_the_host_follows():
    peft = pytest.importorskip("peft")
    base = tiny_llava()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"]))
    model = hia.get_hia_model(lora, tiny_config(base)).train()
    dropouts = [
        m for name, m in model.base_model.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)
    ]
    assert dropouts and all(dropout.training for dropout in dropouts)
    attention = model._host[0].layers[0].self_attn
    assert not attention.training and not attention.q_proj.base_layer.training
    model.eval()
    assert not any(dropout.training for dropout in dropouts)
    plain = tiny_llava()
    model = hia.get_hia_model(plain, tiny_config(plain))
    model._host[0].layers[2].requires_grad_(True)
    model.train()
    assert all(module.training for module in model._host[0].layers[2].modules())
    assert not any(module.training for module in model._host[0].layers[1].modules())


def test_parameter_groups_hold_every_trained_parameter_once():
    peft = pytest.importorskip("peft")
    base = tiny_llava()
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model = hia.get_hia_model(lora, tiny_config(base, gate="tanh"))
    groups = {group["name"]: group for group in model.parameter_groups(1e-3, weight_decay=0.05)}
    assert set(groups) == {"encoder", "encoder_no_decay", "adapter", "adapter_no_decay", "host"}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(listed) == sorted(trained)
    for name, group in groups.items():
        assert group["lr"] == pytest.approx(1e-4 if "encoder" in name else 1e-3)
        assert group["weight_decay"] == (0.0 if "no_decay" in name else 0.05)
    undecayed = {id(p) for p in groups["adapter_no_decay"]["params"]}
    for name, parameter in model.adapter.layers.named_parameters():
        kept = name.endswith(("bias", "queries", "gate")) or "norm" in name
        assert (id(parameter) in undecayed) is kept, name
    torch.optim.AdamW(model.parameter_groups(1e-3))
    model.adapter.encoder.requires_grad_(False)
    assert not any("encoder" in group["name"] for group in model.parameter_groups(1e-3))
    assert model.parameter_groups(np.float32(1e-3))[0]["lr"] == pytest.approx(1e-3)
    for name, value in (("lr", True), ("lr", -1.0), ("encoder_lr_scale", float("nan")), ("weight_decay", "much")):
        with pytest.raises(ValueError, match=f"^hia: {name} must be a finite number that is not negative, got"):
            model.parameter_groups(**{"lr": 1e-3, name: value})
