"""Our port of the released maths: shapes, hooks, a hand computation, and its published cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench.measure.footprint import fake_mode, footprint
from bench.providers.released import ReleasedHiA, ReleasedInjection, ReleasedResNet50, build_released
from bench.table3 import formulas, hosts

TINY = hosts.HostSpec(
    "tiny",
    {
        **hosts.SMALL_LLM,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
    },
    {
        **hosts.SMALL_VIT,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
    },
)
ROWS = [slice(2, 6), slice(8, 12)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_released(hosts.build_llava(TINY, torch.float32, "eager"))


def host_inputs() -> dict[str, torch.Tensor]:
    ids = [1, 2, *[64] * 4, 3, 4, *[64] * 4, 5, 6]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.ones(2, 3, 28, 28)}


def adapter_inputs() -> dict[str, object]:
    return {"high_res_pixels": torch.randn(2, 3, 64, 96), "image_rows": ROWS, "instruction_index": 13}


def hook_count(model: torch.nn.Module) -> int:
    return sum(len(layer._forward_hooks) for layer in model.base.model.language_model.layers)


def test_layers_and_parameters_are_the_released_ones():
    with fake_mode():
        port = ReleasedHiA(5120, 40)
        assert port.layer_indices == [13, 26]
        counts = {name: hosts.parameter_count(module) for name, module in port.named_children()}
        per_layer = hosts.parameter_count(port.gate_Con["13"])
    assert per_layer == pytest.approx(263.6e6, rel=1e-3)
    assert counts["condition_linear"] == pytest.approx(10.5e6, rel=5e-3)
    assert counts["spm"] == pytest.approx(23.5e6, rel=5e-3)
    names = {
        "semantic_linear",
        "hr_linear",
        "query_norm",
        "feat_norm",
        "query_norm2",
        "feat_norm2",
        "hr_cross_attn",
        "injection_cross_attn",
        "ffn_norm",
        "hr_query_tokens",
    }
    layer = ReleasedInjection(16, num_queries=4)
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == names


def test_a_layers_flops_per_image_at_448_are_149_gf():
    dim, visual, features = 5120, 576, 196
    with fake_mode():
        layer = ReleasedInjection(dim).eval()
        inputs = {
            "visual": torch.zeros(1, visual, dim),
            "instruction": torch.zeros(1, 1, dim),
            "features": torch.zeros(1, features, dim),
        }
        counted = footprint(layer, inputs, cuda=False).flops
    assert counted == pytest.approx(149e9, rel=0.01)
    shape = formulas.AdapterShape(dim, shared_projection=True)
    assert counted == pytest.approx(formulas.injection_flops(shape, dim, features, 1, 1), rel=1e-6)


def test_encoder_halves_five_times_rounding_up():
    encoder = ReleasedResNet50(width=4).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(2, 3, 65, 97)).shape == (2, 3 * 4, 128)


def attention_by_hand(module, query, key, value):
    dim, heads = query.shape[-1], module.num_heads
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, w, b in zip(
            (query, key, value), module.in_proj_weight.split(dim), module.in_proj_bias.split(dim), strict=True
        )
    )
    weights = torch.softmax(q @ k.mT / (dim // heads) ** 0.5, -1)
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2))


def test_one_layer_by_hand():
    torch.manual_seed(1)
    layer = ReleasedInjection(32, num_heads=4, num_queries=5).eval().double()
    for norm in (layer.query_norm, layer.feat_norm, layer.query_norm2, layer.feat_norm2, layer.ffn_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    visual, instruction, features = (torch.randn(1, n, 32, dtype=torch.double) for n in (7, 1, 11))
    with torch.no_grad():
        queries = layer.query_norm(layer.hr_query_tokens + layer.semantic_linear(instruction))
        keys = layer.feat_norm(layer.hr_linear(features))
        extracted = layer.feat_norm2(attention_by_hand(layer.hr_cross_attn, queries, keys, keys))
        update = attention_by_hand(layer.injection_cross_attn, layer.query_norm2(visual), extracted, extracted)
        wanted = layer.ffn_norm(visual + update)
        torch.testing.assert_close(layer(visual, instruction, features), wanted)


def test_only_visual_rows_change_at_the_hooked_layer(model):
    seen = {}
    layer = model.base.model.language_model.layers[model.adapter.layer_indices[0]]

    def remember(name):
        return lambda _module, _args, output: seen.__setitem__(name, output.clone())

    with torch.no_grad():
        handle = layer.register_forward_hook(remember("plain"))
        model.base(**host_inputs())
        handle.remove()
        with model.adapter.attach(model.base, pixels=torch.randn(2, 3, 64, 96), image_rows=ROWS, instruction_index=13):
            handle = layer.register_forward_hook(remember("injected"))
            model.base(**host_inputs())
            handle.remove()
    changed = (seen["plain"] != seen["injected"]).any(-1)[0]
    wanted = torch.zeros(14, dtype=torch.bool)
    wanted[2:6] = wanted[8:12] = True
    assert torch.equal(changed, wanted)


def test_forward_runs_and_leaves_the_host_as_it_was(model):
    with torch.no_grad():
        before = model.base(**host_inputs()).logits
        injected = model(**host_inputs(), **adapter_inputs()).logits
        after = model.base(**host_inputs()).logits
    assert injected.shape == before.shape == (1, 14, 128)
    assert not torch.equal(injected, before)
    assert torch.equal(before, after)


def test_hooks_are_gone_after_an_exception(model):
    attached = model.adapter.attach(model.base, pixels=torch.randn(2, 3, 64, 64), image_rows=ROWS, instruction_index=13)
    with pytest.raises(KeyError, match="inside"), attached:
        assert hook_count(model) == 2
        raise KeyError("inside")
    assert hook_count(model) == 0


def test_a_row_range_per_image_is_required(model):
    with pytest.raises(ValueError, match=r"image_rows must have one range per image \(2\), got 1"):
        model(**host_inputs(), **{**adapter_inputs(), "image_rows": ROWS[:1]})
    assert hook_count(model) == 0
