"""Every exact form of extract and inject is the direct's result, and the plan picks the cheapest."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import hia
from hia.layers import injection, plan
from hia.layers.adapter import HiAAdapter
from hia.layers.features import ImageFeatures
from hia.layers.layout import build_layout
from hia_kernels.testing import assert_close
from tests.hia.hosts import text_config, tiny_llava
from tests.hia.test_modules import randomised

PRESETS = {
    "paper": {"dim": 64, "num_heads": 4},
    "released": {"dim": 64, "num_heads": 2, "gate": "tanh"},
    "lite": {"dim": 32, "num_heads": 2},
}
PRESETS |= {f"{name}-unaware": {**changes, "instruction_aware": False} for name, changes in PRESETS.items()}
SHAPES = [(3, 5), (1, 1), (7, 4), (2, 2), (1, 9), (6, 6), (5, 3), (33, 33)]
EXACT = {
    torch.float64: torch.float64,
    torch.float32: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}
FORMS = [(extract, "direct") for extract in plan.EXTRACT_FORMS] + [("direct", "absorbed"), ("absorbed", "absorbed")]


def available(forms, preset, dtype):
    """Tell whether a preset has the forms, and whether the dtype's scores can take them."""
    extract, inject = forms
    folds = not extract.startswith("folded") or preset.startswith("released")
    return folds and not (inject == "absorbed" and dtype.itemsize < plan.LEAST_SCORES)


def each_form_and_dtype():
    """List every form in every dtype, each time with another preset of those that have the form."""
    cases = []
    pairs = itertools.product([torch.float32, torch.float16, torch.bfloat16], FORMS)
    for number, (dtype, forms) in enumerate(pairs):
        presets = [preset for preset in PRESETS if available(forms, preset, dtype)]
        if presets:
            preset = presets[number % len(presets)]
            cases.append(pytest.param(forms, preset, dtype, id="/".join((*forms, preset, str(dtype)[6:]))))
    return cases


# The released maths alone has every form; of the others each form meets one, and all of them some form.
EXACT_CASES = [(forms, preset) for forms in FORMS for preset in ("released", "released-unaware")]
EXACT_CASES += zip(
    [forms for forms in FORMS if available(forms, "paper", torch.float64)],
    itertools.cycle(["paper", "lite", "paper-unaware", "lite-unaware"]),
    strict=False,
)


def adapter_of(preset, dtype, **changes):
    config = getattr(hia.HiAConfig, preset.removesuffix("-unaware"))(
        text_config(), num_queries=6, encoder_width=4, layers=[2], **{**PRESETS[preset], **changes}
    )
    return randomised(HiAAdapter(config)).to(dtype).requires_grad_(True)


def question(images, dtype, channels=128):
    """Draw hidden states, feature maps and a layout: images of different sizes, shared among two samples."""
    generator = torch.Generator().manual_seed(images)
    drawn = [torch.rand(*shape, channels, generator=generator, dtype=torch.double) for shape in SHAPES[:images]]
    maps = tuple(image.to(dtype) for image in drawn)
    hidden = torch.randn(2, 30, 64, generator=generator, dtype=torch.double).to(dtype)
    image_map = torch.full((2, 30), -1)
    for image in range(images):
        image_map[image % 2, image // 2 * 5 : image // 2 * 5 + 2 + image % 3] = image
    if images == 1:  # a sample without images
        image_map[1] = -1
    layout = build_layout(image_map, torch.tensor([28, 29]), images).for_call(2, 30, torch.device("cpu"))
    return hidden, maps, layout


def run(adapter, forms, hidden, maps, layout, kept=None):
    layer = adapter.layer(2)
    layer.extractor.form, layer.injection.form = forms
    packed = ImageFeatures(maps).packed()
    if kept is not None:
        packed.caches.update(adapter.layer_caches(packed, kept))
    return layer(hidden.clone(), packed, layout)


def folded_of(adapter):
    """Fold the adapter's weights; return its layer's."""
    adapter.fold_weights()
    return adapter.layer(2).extractor.current()


def kept_by(forms):
    """Name the products that the features keep for a cached form."""
    return forms[0].removeprefix("cached_") if forms[0].startswith("cached_") else None


@pytest.mark.parametrize(
    ("forms", "preset"), EXACT_CASES, ids=["/".join((*forms, preset)) for forms, preset in EXACT_CASES]
)
@torch.no_grad()
def test_every_form_is_the_direct_ones_in_double(forms, preset):
    adapter, kept = adapter_of(preset, torch.float64), kept_by(forms)
    adapter.fold_weights()
    for images in (1, 3, len(SHAPES)):
        asked = question(images, torch.float64)
        expected = run(adapter, ("direct", "direct"), *asked)
        torch.testing.assert_close(run(adapter, forms, *asked, kept), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["paper", "lite", "paper-unaware"])
@pytest.mark.parametrize("form", ["folded", "folded_absorbed"])
def test_forms_that_fold_need_the_released_maths(form, preset):
    with pytest.raises(ValueError, match=f"plan must be a form that can run here .* got '{form}'; it folds"):
        run(adapter_of(preset, torch.float64), (form, "direct"), *question(1, torch.float64))


@pytest.mark.parametrize(("forms", "preset", "dtype"), each_form_and_dtype())
@torch.no_grad()
def test_every_form_keeps_the_tolerance(forms, preset, dtype):
    adapter, kept = adapter_of(preset, dtype), kept_by(forms)
    exact_adapter = adapter_of(preset, EXACT[dtype])
    exact_adapter.load_state_dict({name: value.to(EXACT[dtype]) for name, value in adapter.state_dict().items()})
    adapter.fold_weights()
    for images in (1, len(SHAPES)):
        hidden, maps, layout = question(images, dtype)
        exact_maps = tuple(image.to(EXACT[dtype]) for image in maps)
        exact = run(exact_adapter, ("direct", "direct"), hidden.to(EXACT[dtype]), exact_maps, layout)
        plain = run(adapter, ("direct", "direct"), hidden, maps, layout)
        got = run(adapter, forms, hidden, maps, layout, kept)
        assert_close(f"hidden, {images} images", got, exact, plain, dtype=dtype)


@pytest.mark.parametrize("form", ["ln_folded_kv", "ln_folded_absorbed"])
@torch.no_grad()
def test_more_columns_than_features(form):
    """Fold where the variance's root is triangular."""
    adapter, asked = adapter_of("paper", torch.float64, dim=192), question(3, torch.float64)
    folded = folded_of(adapter)
    assert folded.root.shape[0] == folded.root.shape[1] < 192
    expected = run(adapter, ("direct", "direct"), *asked)
    torch.testing.assert_close(run(adapter, (form, "direct"), *asked), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_weights_are_folded_in_fp32_and_rounded_once(preset):
    half, full = adapter_of(preset, torch.bfloat16), adapter_of(preset, torch.float32)
    full.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    got, expected = map(folded_of, (half, full))
    for name in ("fold_weight", "fold_bias", "root", "kv_weight", "kv_bias"):
        assert torch.equal(getattr(got, name), getattr(expected, name).to(torch.bfloat16)), name


@pytest.mark.parametrize(
    ("forms", "preset"),
    [
        (("folded", "direct"), "released"),
        (("folded_absorbed", "direct"), "released"),
        (("absorbed", "absorbed"), "released"),
        (("absorbed", "absorbed"), "paper"),
    ],
    ids=["folded", "folded_absorbed", "absorbed", "absorbed-paper"],
)
def test_gradients_are_the_direct_forms(forms, preset):
    adapter = adapter_of(preset, torch.float64)
    hidden, maps, layout = question(3, torch.float64)

    def gradients(chosen):
        inputs = [hidden.clone().requires_grad_(), *(image.clone().requires_grad_() for image in maps)]
        out = run(adapter, chosen, inputs[0], tuple(inputs[1:]), layout)
        weights = {name: p for name, p in adapter.named_parameters() if not name.startswith("encoder")}
        found = torch.autograd.grad(out.square().sum(), [*inputs, *weights.values()])
        return dict(zip(["hidden", *map(str, range(3)), *weights], found, strict=True))

    expected, got = gradients(("direct", "direct")), gradients(forms)
    for name, gradient in expected.items():
        # the key bias drops out of the softmax: its true gradient is zero, its computed one rounding
        slack = 1e-9 * (1 + gradient.abs().max().item())
        torch.testing.assert_close(got[name], gradient, rtol=1e-8, atol=slack, msg=name)


def injected(adapter, form, dtype, images=8):
    """Compute output and gradients of an injection, of a loss whose gradients are not small."""
    generator = torch.Generator().manual_seed(0)
    hidden, _, layout = question(images, dtype)
    injection = adapter.layer(2).injection
    injection.form = form
    extracted = torch.randn(images * 6, adapter.config.dim, generator=generator, dtype=torch.double).to(dtype)
    wrt = {"hidden": hidden.flatten(0, 1).requires_grad_(), "extracted": extracted.requires_grad_()}
    wrt |= dict(injection.named_parameters())
    out = injection(wrt["hidden"], layout, wrt["extracted"])
    dout = torch.randn(out.shape, generator=generator, dtype=torch.double).to(dtype)
    found = torch.autograd.grad(out, list(wrt.values()), dout)
    return {"out": out.detach(), **dict(zip(wrt, found, strict=True))}


@pytest.mark.parametrize(
    ("preset", "dtype"),
    [("paper", torch.float64), ("released", torch.float64), ("lite", torch.float64), ("released", torch.float32)],
    ids=str,
)
def test_the_absorbed_injections_gradients_are_the_direct_forms(preset, dtype, monkeypatch):
    """Allow fp32 to be as wrong as plain autograd's of the same form: the gate's is one sum that cancels."""
    adapter, exact_adapter = adapter_of(preset, dtype), adapter_of(preset, torch.float64)
    exact_adapter.load_state_dict({name: value.double() for name, value in adapter.state_dict().items()})
    got, exact = injected(adapter, "absorbed", dtype), injected(exact_adapter, "direct", torch.float64)
    monkeypatch.setattr(injection._AbsorbedRead, "apply", plain_read)
    plain = injected(adapter, "absorbed", dtype)
    for name, value in exact.items():
        if dtype == torch.float64:
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-10 * (1 + value.abs().max()), msg=name)
        elif name == "kv_proj.bias":  # the keys' half is zero: it drops out of the softmax
            half = value.shape[0] // 2
            assert_close(name, got[name][half:], value[half:], plain[name][half:], dtype=dtype, slack=4)
            assert got[name][:half].abs().max() < 1e-5 * value.abs().max()
        else:
            assert_close(name, got[name], value, plain[name], dtype=dtype, slack=4)


def test_the_absorbed_injection_keeps_no_attention_matrix(monkeypatch):
    heads_queries = 12
    adapter = adapter_of("released", torch.float32)
    counts = set(question(8, torch.float32)[2].row_counts)

    def matrices():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            injected(adapter, "absorbed", torch.float32)
        return [shape for shape in saved if shape[0] in counts and shape[1:].numel() == heads_queries]

    assert matrices() == []
    monkeypatch.setattr(injection._AbsorbedRead, "apply", plain_read)
    assert len(matrices()) >= 8  # what plain autograd keeps


def plain_read(tokens, keys, values, offsets, bias, heads, scale):
    return torch.addmm(bias, injection._weights(tokens, keys, offsets, heads, scale), values)


def test_the_absorbed_injection_under_autocast_rounds_no_scores():
    adapter = adapter_of("released", torch.float32)
    adapter.layer(2).injection.form = "absorbed"
    exact = injected(adapter, "direct", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = (injected(adapter, form, torch.float32) for form in ("absorbed", "direct"))
    for name in ("out", "hidden", "extracted", "q_proj.weight", "out_proj.weight"):
        assert got[name].dtype == torch.float32
        assert_close(name, got[name], exact[name], plain[name].float(), dtype=torch.bfloat16, slack=4)


def test_no_second_derivatives_of_the_absorbed_injection():
    adapter = adapter_of("paper", torch.float64)
    layer, (hidden, _, layout) = adapter.layer(2).injection, question(1, torch.float64)
    layer.form = "absorbed"
    rows = hidden.flatten(0, 1).requires_grad_()
    out = layer(rows, layout, torch.randn(6, 64).double())
    with pytest.raises(NotImplementedError, match="hia::inject: gradients of gradients are not implemented for the"):
        torch.autograd.grad(out.sum(), rows, create_graph=True)


def test_training_stores_neither_keys_nor_scores():
    adapter = adapter_of("released", torch.float32, dim=96)
    hidden, _, layout = question(1, torch.float32)
    tokens, bytes_of, shapes_of = 60 * 60, {}, {}
    maps = (torch.rand(60, 60, 128),)
    for form in ("direct", "folded_absorbed"):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.setdefault(x.data_ptr(), x), lambda x: x):
            run(adapter, (form, "direct"), hidden, maps, layout)
        shapes_of[form] = {tuple(x.shape) for x in saved.values() if tokens in x.shape}
        bytes_of[form] = sum(x.nbytes for x in saved.values() if tokens in x.shape)
    keys = (tokens, 2, 48)
    assert keys in shapes_of["direct"] and keys not in shapes_of["folded_absorbed"]
    assert not any(12 in shape for shape in shapes_of["folded_absorbed"])  # H * M rows of scores
    # features, their projection, its norm with two statistics a token
    assert bytes_of["folded_absorbed"] == tokens * (128 + 96 + 96 + 2) * 4 < bytes_of["direct"]


def test_fold_weights_changes_no_state_and_is_undone():
    model = hia.get_hia_model(tiny_llava(), hia.HiAConfig.paper(tiny_llava(), num_queries=5, encoder_width=4))
    keys, parameters = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    assert model.fold_weights() is model
    assert set(model.state_dict()) == keys and sum(p.numel() for p in model.parameters()) == parameters
    assert all(layer.extractor.current() is not None for layer in model.adapter.layers.values())
    assert model.unfold_weights() is model
    assert all(layer.extractor.current() is None for layer in model.adapter.layers.values())


def test_the_old_names_of_folding_warn():
    base = tiny_llava(layers=3)
    model = hia.get_hia_model(base, hia.HiAConfig.paper(base, num_queries=5, encoder_width=4, encoder="strided"))
    for owner in (model, model.adapter, model.adapter.encoder):
        with pytest.warns(FutureWarning, match=rf"{type(owner).__name__}\.prepare\(\) is called fold_weights\(\) now"):
            owner.prepare()
        assert model.adapter.encoder.current() is not None
        with pytest.warns(FutureWarning, match=r"\.unprepare\(\) is called unfold_weights\(\) now"):
            owner.unprepare()
        assert model.adapter.encoder.current() is None


def test_training_after_fold_weights_sees_no_stale_weights():
    adapter = adapter_of("released", torch.float64)
    adapter.fold_weights()
    asked = question(3, torch.float64)
    with torch.no_grad():
        before = run(adapter, ("auto", "auto"), *asked)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    run(adapter, ("auto", "auto"), *asked).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"parameters have changed since fold_weights\(\)"):
            after = run(adapter, ("auto", "auto"), *asked)
        expected = run(adapter, ("direct", "direct"), *asked)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, expected, rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match=r"got 'ln_folded_kv'; it needs fold_weights\(\)"):
            run(adapter, ("ln_folded_kv", "auto"), *asked)


@torch.no_grad()
def test_loading_and_casting_drop_folded_weights():
    for change in (lambda a: a.load_state_dict(a.state_dict()), lambda a: a.to(torch.float64), lambda a: a.half()):
        adapter = adapter_of("paper", torch.float32)
        adapter.fold_weights()
        change(adapter)
        with pytest.warns(UserWarning, match="changed since fold_weights"):
            assert adapter.layer(2).extractor.current() is None


def kept_model(keep, **changes):
    torch.manual_seed(0)
    base = tiny_llava()
    model = hia.get_hia_model(base, hia.HiAConfig.paper(base, num_queries=5, encoder_width=4, gate="none", **changes))
    with torch.no_grad():
        pixels = [torch.randint(0, 256, (*size, 1), dtype=torch.uint8) for size in ((64, 96), (96, 64))]
        return model, pixels, model.encode_images(pixels, keep=keep)


@pytest.mark.parametrize("keep", ["kv", "folded"])
def test_what_is_kept_is_counted_and_used_until_weights_change(keep):
    model, pixels, features = kept_model(keep)
    plain = model.encode_images(pixels, keep="features")
    config = model.hia_config
    tokens = sum(image.shape[0] * image.shape[1] for image in features)
    columns = {"kv": 2 * config.dim, "folded": config.dim}[keep]
    assert features.nbytes == plain.nbytes + len(config.layer_indices) * tokens * columns * 4
    swapped, both = features.select([1, 0]), hia.ImageFeatures.cat([features, features])
    assert [len(part.packed().caches) for part in (features, swapped, both)] == [len(config.layer_indices)] * 3
    extractor = model.adapter.layer(config.layer_indices[0]).extractor
    with torch.no_grad():
        assert extractor.sizes(model.adapter.packed(features), 1).cached == (keep,)
        assert extractor.sizes(features.packed(), 1).cached == (keep,)
    assert extractor.sizes(features.packed(), 1).cached == ()  # gradients are recorded
    with torch.no_grad():
        extractor.kv_proj.bias.add_(1)
        packed = model.adapter.packed(features)
        assert extractor.sizes(packed, 1).cached == () and len(packed.caches) == len(config.layer_indices) - 1


def test_what_is_kept_by_default_makes_a_question_cheaper():
    _, _, features = kept_model("auto")
    assert all(cache.kind == "kv" for caches in features.caches for cache in caches.values()) and features.caches


def test_keep_must_be_known_and_needs_no_grad():
    model, pixels, _ = kept_model("features")
    with pytest.raises(ValueError, match="keep must be 'auto' or 'features' or 'folded' or 'kv', got 'values'"):
        model.encode_images(pixels, keep="values")
    with pytest.raises(ValueError, match="keep must be 'auto' or 'features' while gradients are recorded, got 'kv'"):
        model.encode_images(pixels, keep="kv")


def thirteen_b(preset, side, images, **changes):
    host = type("Host", (), {"hidden_size": 5120, "num_hidden_layers": 40, "model_type": "llama"})()
    config = getattr(hia.HiAConfig, preset)(host)
    sizes = plan.sizes_of(config, [(side, side)] * images, 576, 1, 4)
    return dataclasses.replace(sizes, **changes) if changes else sizes


@pytest.mark.parametrize(
    ("preset", "side", "changes", "extract"),
    [
        ("released", 896, {"weights_folded": True}, "ln_folded_absorbed"),
        ("released", 896, {}, "absorbed"),
        ("released", 4096, {"training": True}, "folded_absorbed"),
        ("paper", 896, {"weights_folded": True}, "ln_folded_kv"),
        ("paper", 896, {}, "direct"),
        ("released", 896, {"weights_folded": True, "cached": ("kv",)}, "cached_kv"),
    ],
)
def test_the_cheapest_form_at_real_sizes(preset, side, changes, extract):
    assert plan.choose("extract", "auto", thirteen_b(preset, side, 2, **changes), "cpu") == extract


@pytest.mark.parametrize(("side", "most"), [(896, 0.70), (4096, 0.45)])
def test_flops_against_the_released_maths(side, most):
    """Count Table 3's HiA layers for two images: the released code asks its queries once an image."""
    ours, theirs = thirteen_b("paper", side, 2, weights_folded=True), thirteen_b("released", side, 2)
    own = plan.cheapest(plan.extract_forms(ours), plan.ceilings_of("cpu", 4)).flops
    own += min(form.flops for form in plan.inject_forms(ours))
    direct = {form.name: form.flops for form in plan.extract_forms(theirs)}["direct"]
    repeated = sum(step.products[0].flops for step in plan._queries(theirs))
    released = direct + repeated + plan.inject_forms(theirs)[0].flops
    assert own <= most * released


def test_flops_of_a_form_are_what_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    adapter = adapter_of("released", torch.float64)
    hidden, maps, layout = question(3, torch.float64)
    packed, layer = ImageFeatures(maps).packed(), adapter.layer(2)
    with torch.no_grad():
        adapter.fold_weights()
        packed.caches.update(adapter.layer_caches(packed, "folded"))
        for form in plan.extract_forms(layer.extractor.sizes(packed, 2)):
            layer.extractor.form = form.name
            fresh = ImageFeatures(maps).packed()
            fresh.caches.update(packed.caches)
            with FlopCounterMode(display=False) as counter:
                layer.extractor(hidden.flatten(0, 1), layout.instruction_rows, fresh, layout.image_to_sample)
            # fused attention's formula takes every image for as long as the longest
            lengths, rows = fresh.lengths, 2 * 6 * 64 * 2
            fused = any(step.name == "attend" for step in form.steps)
            longest = rows * (len(lengths) * max(lengths) - sum(lengths)) if fused else 0
            assert counter.get_total_flops() == form.flops + longest, form.name


def test_explained(capsys):
    base = tiny_llava()
    model = hia.get_hia_model(base, hia.HiAConfig.paper(base, num_queries=5, encoder_width=4))
    model.fold_weights().explain_plan([(896, 896), (512, 700)])
    printed = capsys.readouterr().out
    assert printed.count("<- least time") == 2
    assert "ln_folded_kv" in printed and "GFLOP" in printed and "MB moved" in printed
    with pytest.raises(ValueError, match=r"sizes must hold \(height, width\) of each image, at least one, got \[\]"):
        model.explain_plan([])


def test_a_plan_must_be_known():
    base = tiny_llava(layers=3)
    with pytest.raises(ValueError, match=r"plan must be 'auto' or '<extract>/<inject>' .* got 'fast'"):
        hia.get_hia_model(base, hia.HiAConfig.paper(base, encoder_width=4), plan="fast")
    assert all(parameter.requires_grad for parameter in base.parameters())  # nothing was attached
    assert plan.split_plan("absorbed") == ("absorbed", "absorbed")
    assert plan.split_plan("ln_folded_kv") == ("ln_folded_kv", "auto")
    assert plan.split_plan("auto/direct") == ("auto", "direct")
    for old, now in (("textbook/textbook", "direct/direct"), ("deep_kv/absorbed", "ln_folded_kv/absorbed")):
        with pytest.warns(FutureWarning, match=f"the plan '{old}' is called '{now}' now"):
            assert plan.split_plan(old) == tuple(now.split("/"))


FEATURES = {
    "rectified": lambda x: torch.relu(x),
    "far-from-zero": lambda x: torch.relu(x + 10),
    "heavy-tailed": lambda x: torch.exp(1.5 * x),
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("rectified", torch.bfloat16),
        ("far-from-zero", torch.float32),
        ("far-from-zero", torch.float16),
        ("far-from-zero", torch.bfloat16),
        ("heavy-tailed", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["ln_folded_kv", "ln_folded_absorbed"])
@torch.no_grad()
def test_ln_folded_forms_hold_for_features_that_are_not_centred(form, kind, dtype):
    hidden, _, layout = question(1, EXACT[dtype])
    values = torch.randn(20, 25, 128, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    maps = (FEATURES[kind](values).to(dtype),)
    adapter, exact_adapter = adapter_of("paper", dtype), adapter_of("paper", EXACT[dtype])
    exact_adapter.load_state_dict({name: value.to(EXACT[dtype]) for name, value in adapter.state_dict().items()})
    layer, exact_layer = adapter.layer(2).extractor, exact_adapter.layer(2).extractor

    def extract(extractor, form, dtype):
        extractor.form = form
        packed = ImageFeatures(tuple(image.to(dtype) for image in maps)).packed()
        rows = hidden.to(dtype).flatten(0, 1)
        return extractor(rows, layout.instruction_rows, packed, layout.image_to_sample)

    exact, plain = extract(exact_layer, "direct", EXACT[dtype]), extract(layer, "direct", dtype)
    adapter.fold_weights()
    assert_close("extracted", extract(layer, form, dtype), exact, plain, dtype=dtype)
