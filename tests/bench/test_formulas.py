"""The formula against what FlopCounterMode counts on the real 13B modules."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bench.table3 import formulas, hosts, methods, predict
from bench.table3.rows import FORMULA_TOLERANCE
from bench.workloads import CASES, images
from hia.encoder import memory
from hia.layers import plan


@pytest.fixture(scope="module")
def predictor():
    return predict.Predictor()


def task_of(method: str, resolution: int, count: int = 2) -> predict.Task:
    return predict.Task(method, resolution, ("eager",), hosts.LLAVA_13B, torch.bfloat16, count, 60, cuda=True)


@pytest.mark.parametrize("method", methods.METHODS)
def test_formula_is_within_2_percent_of_the_count_on_the_13b_host(predictor, method):
    found = predictor(task_of(method, 560))
    formula = formulas.prefill_flops(method, hosts.LLAVA_13B, 560, 2, 60)
    assert formula == pytest.approx(found.flops, rel=FORMULA_TOLERANCE)


def test_ours_is_folded_and_what_that_makes_is_counted_as_memory(predictor):
    found = predictor(task_of("hia", 560)).footprints["eager"]
    model = predictor._model
    folded = sum(layer.extractor.current().nbytes for layer in model.adapter.layers.values())
    plain = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert folded > 10**8
    assert found.weight_bytes - plain >= folded


# at 4096 px the encoder's strips compute the rows beside their cuts twice, which the formula leaves out
@pytest.mark.parametrize(("resolution", "rel"), [(896, 1e-4), (4096, 1e-2)])
def test_our_form_of_the_layers_is_counted_exactly(predictor, resolution, rel):
    counted = predictor(task_of("hia", resolution)).flops
    outside = formulas.outside_flops("hia", hosts.LLAVA_13B, resolution, 2, 60)
    layers = formulas.layers_flops("hia", hosts.LLAVA_13B, resolution, 2)
    assert layers == pytest.approx(counted - outside, rel=rel)


def test_4096_px_goes_through_in_strips_that_take_what_the_prefill_takes(predictor, monkeypatch):
    budgets, asked = [], memory.AutoBudget.of
    monkeypatch.setattr(memory.AutoBudget, "of", lambda *args: budgets.append(asked(*args)) or budgets[-1])
    found = predictor(task_of("hia", 4096)).footprints["eager"]
    prefill = (2 * 40 * 5120 + 2 * 5120 + 3 * 13824) * 2 * (60 + 2 * 576)  # KV cache and an MLP's maps, bf16
    assert budgets == [prefill] * 2
    assert found.weight_bytes + prefill < found.peak_bytes < 32e9
    assert predictor(task_of("hia", 2016)) and budgets[2:] == [None] * 2


@pytest.mark.parametrize("form", [name for name in plan.EXTRACT_FORMS if not name.startswith("cached")])
def test_every_form_costs_what_the_plan_says(form):
    case = CASES["13b-released-896-2img"]
    sizes = plan.sizes_of(case.config, case.sizes, case.visual_tokens, 1, 4)
    sizes = dataclasses.replace(sizes, weights_folded=True)
    wanted = {one.name: one.flops for one in plan.extract_forms(sizes)}[form]
    for inject in plan.inject_forms(sizes):
        shape = formulas.AdapterShape(5120, injections=1, shared_projection=True, forms=(form, inject.name))
        found = formulas.adapter_flops(shape, 5120, 896, 2, 1)
        shared = 0 if form in ("direct", "absorbed") else 2 * 2 * 784 * 2048 * 5120  # adapter_flops adds it to all
        assert found - shared == wanted + inject.flops


def test_the_check_would_notice_a_missing_term():
    whole = formulas.prefill_flops("hia", hosts.LLAVA_13B, 896, 2, 60)
    text = {**hosts.LLAVA_13B.text, "num_hidden_layers": 39}
    fewer = formulas.prefill_flops("hia", hosts.HostSpec("39 layers", text), 896, 2, 60)
    assert 1 - fewer / whole > FORMULA_TOLERANCE


def test_resnet50_has_its_published_4_1_gmac_at_224():
    # 4.089 G multiply-adds without the 2.05 M of the classifier (timm's results tables: 4.11 with it)
    assert formulas.resnet50_flops(224) / 2 == pytest.approx(4.09e9, rel=0.005)


@pytest.mark.parametrize(("resolution", "tokens"), [(448, 196), (560, 324), (784, 625), (896, 784)])
def test_feature_count_rounds_up(resolution, tokens):
    assert formulas.feature_count(resolution) == tokens


def test_sequence_lengths_by_hand():
    assert methods.sequence_length("hia", 896, 2, 60) == 60 + 2 * 576
    assert methods.sequence_length("baseline", 672, 2, 60) == 4668  # beyond LLaMA-2's 4,096
    assert methods.tokens_per_image("anyres", 896) == 576 + 48 * 49
    assert methods.anyres_grid(4096) == (2, 2)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (hosts.LLAMA2_13B, "llama-2-13b.config.json"),
        (hosts.CLIP_VIT_L_14_336, "clip-vit-large-patch14-336.vision_config.json"),
    ],
)
def test_the_written_down_configs_are_the_published_ones(ours, name):
    path = images.data_folder() / "configs" / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: the numbers in bench/table3/hosts.py are not compared with it")
    published = json.loads(path.read_text())
    assert {key: published[key] for key in ours} == ours


def test_positions_are_interpolated_bicubically_and_always_from_the_trained_grid():
    model = hosts.build_llava(
        hosts.HostSpec(
            "tiny",
            {
                **hosts.SMALL_LLM,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 64,
            },
            {
                **hosts.SMALL_VIT,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        ),
        torch.float32,
        "eager",
    )
    embeddings = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).embeddings
    trained = embeddings.position_embedding.weight.detach().clone()
    hosts.interpolate_positions(model, 896)
    assert embeddings.position_embedding.weight.shape == (1 + 64 * 64, 32)
    hosts.interpolate_positions(model, 448)
    grid = trained[1:].T.reshape(1, 32, 24, 24)
    wanted = torch.nn.functional.interpolate(grid, size=(32, 32), mode="bicubic", align_corners=False)
    got = embeddings.position_embedding.weight
    assert torch.equal(got[0], trained[0])
    torch.testing.assert_close(got[1:].T.reshape(1, 32, 32, 32), wanted)
    hosts.interpolate_positions(model, 336)
    assert torch.equal(embeddings.position_embedding.weight, trained)
    with pytest.raises(ValueError, match="resolution must be at least 14, got 13"):
        hosts.interpolate_positions(model, 13)
