"""Attaching, running and detaching the adapter on a frozen host."""

from __future__ import annotations

import copy

import pytest
import torch

import hia
from hia.layers import layout
from hia.layers.features import ImageFeatures, PackedFeatures
from hia.runtime.context import pad_left
from hia.runtime.hooks import split_layer_output
from tests.hia.conftest import NONE, ONE, TWO, host_inputs, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llama, tiny_llava, tiny_processor


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("preset", ["paper", "lite"])
@pytest.mark.parametrize("gate", ["zero_init", "tanh"])
def test_attaching_leaves_logits_bit_identical(base, batch, preset, gate):
    expected = logits_of(base, host_inputs(batch))
    model = hia.get_hia_model(base, tiny_config(base, preset, gate=gate))
    assert torch.equal(logits_of(model, batch), expected)
    assert torch.equal(model(**batch).logits, expected)  # with gradients: not in place


def test_released_preset_disturbs_the_host(base, batch):
    expected = logits_of(base, host_inputs(batch))
    model = hia.get_hia_model(base, tiny_config(base, "released"))
    got = logits_of(model, batch)
    assert not torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])  # the sample without images


def test_trained_adapter_changes_only_samples_with_images(base, model, batch):
    expected = logits_of(base, host_inputs(batch))
    got = logits_of(model, batch)
    assert torch.equal(got[1], expected[1])
    assert (got[0] - expected[0]).abs().max() > 0.1
    assert (got[2] - expected[2]).abs().max() > 0.1


def test_only_visual_rows_of_the_chosen_layers_output_change(base, model, batch):
    with torch.no_grad():
        plain = base(**host_inputs(batch), output_hidden_states=True).hidden_states
        got = model(**batch, output_hidden_states=True).hidden_states
    first = model.hia_config.layer_indices[0]
    visual = batch.image_map >= 0
    for layer in range(first + 1):
        assert torch.equal(got[layer], plain[layer])
    after = first + 1  # hidden_states[l + 1] is the output of layer l, injected
    assert torch.equal(got[after][~visual], plain[after][~visual])
    assert ((got[after] - plain[after])[visual].abs().amax(-1) > 0).all()


def test_forward_with_and_without_gradients_agrees(model, batch):
    torch.testing.assert_close(model(**batch).logits, logits_of(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_samples_alone(model, processor, side):
    a, b, c = random_images()
    together = processor([TWO, NONE, ONE], [[a, b], [], [c]], padding_side=side)
    got = logits_of(model, together)
    for row, (text, images) in enumerate([(TWO, [a, b]), (NONE, []), (ONE, [c])]):
        alone = processor(text, images)
        mask = together.attention_mask[row].bool()
        torch.testing.assert_close(got[row][mask], logits_of(model, alone)[0], rtol=1e-4, atol=1e-4)


def test_eight_images_of_different_sizes_in_a_sample(model, processor):
    images = [torch.randint(0, 256, (20 + 7 * i, 90 - 6 * i), dtype=torch.uint8).numpy() for i in range(8)]
    inputs = processor("USER: " + "<image> " * 8 + "what changed? ASSISTANT:", images)
    assert inputs.image_map.max() == 7
    base_logits = logits_of(model.base_model, host_inputs(inputs))
    assert (logits_of(model, inputs) - base_logits).abs().max() > 0.1


def test_each_image_speaks_to_its_own_tokens_only(model, processor, batch):
    """Change the second image: the first image's rows stay at the first chosen layer."""
    other = hia.HiABatch(batch)
    other["high_res_pixels"] = list(batch.high_res_pixels)
    other["high_res_pixels"][1] = batch.high_res_pixels[1].flip(1)
    after = model.hia_config.layer_indices[0] + 1
    with torch.no_grad():
        one = model(**batch, output_hidden_states=True).hidden_states[after]
        two = model(**other, output_hidden_states=True).hidden_states[after]
    assert torch.equal(one[batch.image_map != 1], two[batch.image_map != 1])
    assert not torch.equal(one[batch.image_map == 1], two[batch.image_map == 1])


def test_instruction_reaches_the_visual_rows_only_if_aware(base, processor):
    a, _, _ = random_images()
    ask = [processor(f"USER: <image>\n{q} ASSISTANT:", a) for q in ("what changed?", "is there a fracture?")]
    visual = [inputs.image_map[0] >= 0 for inputs in ask]
    seen = {}
    for aware in (True, False):
        model = stir(hia.get_hia_model(copy.deepcopy(base), tiny_config(base, instruction_aware=aware)))
        after = model.hia_config.layer_indices[0] + 1
        with torch.no_grad():
            states = [model(**inputs, output_hidden_states=True).hidden_states[after] for inputs in ask]
        seen[aware] = [state[0][mask] for state, mask in zip(states, visual, strict=True)]
    assert (seen[True][0] - seen[True][1]).abs().max() > 1e-2
    torch.testing.assert_close(seen[False][0], seen[False][1], rtol=1e-4, atol=1e-5)


def test_llama_with_an_explicit_map():
    base = tiny_llama()
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    input_ids = torch.randint(6, 40, (2, 11))
    image_map = torch.full((2, 11), -1)
    image_map[0, 1:4], image_map[1, 2:7] = 1, 0  # images need not have equally many tokens, nor come in order
    pixels = [torch.randint(0, 256, (40 + i, 50, 1), dtype=torch.uint8) for i in range(2)]
    extra = {"high_res_pixels": pixels, "image_map": image_map, "instruction_index": torch.tensor([9, 10])}
    plain = logits_of(base, {"input_ids": input_ids})
    assert (logits_of(model, {"input_ids": input_ids, **extra}) - plain).abs().amax((1, 2)).min() > 1e-3
    embeds = {"inputs_embeds": base.get_input_embeddings()(input_ids)}
    torch.testing.assert_close(
        logits_of(model, {**embeds, **extra}), logits_of(model, {"input_ids": input_ids, **extra})
    )
    del extra["image_map"]
    with pytest.raises(ValueError, match="image_map must be given for this host, got None"):
        model(input_ids=input_ids, **extra)


def test_map_is_read_off_a_llava_prompt(model, batch):
    expected = logits_of(model, batch)
    without = {name: value for name, value in batch.items() if name != "image_map"}
    assert torch.equal(logits_of(model, without), expected)


def test_feature_cache_equals_encoding_again(model, batch):
    features = model.encode_images(batch.high_res_pixels, batch.windows)
    assert len(features) == 3
    assert features.nbytes == sum(m.numel() * 4 for m in features)
    cached = {k: v for k, v in batch.items() if k not in ("high_res_pixels", "windows")}
    assert torch.equal(logits_of(model, {**cached, "features": features}), logits_of(model, batch))
    again = hia.ImageFeatures.cat([features.select([0]), features.select([1, 2])])
    assert torch.equal(logits_of(model, {**cached, "features": again}), logits_of(model, batch))


@pytest.mark.parametrize(("plan", "calls"), [("folded_absorbed/direct", 0), ("folded/direct", 0), ("direct/direct", 1)])
def test_the_shared_projection_is_made_only_where_a_form_reads_it(base, processor, monkeypatch, plan, calls):
    model = stir(hia.get_hia_model(base, tiny_config(base, "released"), plan=plan))
    made, shared = [], PackedFeatures.shared

    def counted(features, linear):
        if "shared" not in features._memo:
            made.append(features)
        return shared(features, linear)

    monkeypatch.setattr(PackedFeatures, "shared", counted)
    a, _, _ = random_images()
    inputs = processor(ONE, a)
    model(**inputs)
    assert len(made) == calls
    logits_of(model, inputs)
    assert len(made) == 2 * calls


def test_what_was_made_of_features_moves_with_them():
    packed = ImageFeatures((torch.rand(2, 3, 4),)).packed()
    projected = packed.shared(torch.nn.Linear(4, 5))
    assert packed.to(torch.device("meta")).shared(torch.nn.Linear(4, 5)).shape == projected.shape
    assert packed.to(torch.device("meta"))._memo["shared"].grad_fn is not None  # moved, not made again


def test_an_image_does_not_depend_on_its_neighbours(model, batch):
    together = model.encode_images(batch.high_res_pixels, batch.windows)
    for number, pixels in enumerate(batch.high_res_pixels):
        alone = model.encode_images([pixels], batch.windows[number : number + 1])
        assert torch.equal(alone.maps[0], together.maps[number])


def test_disable_adapter_is_the_host(base, model, batch):
    expected = logits_of(base, host_inputs(batch))
    with model.disable_adapter():
        assert torch.equal(logits_of(model, batch), expected)
    assert not torch.equal(logits_of(model, batch), expected)


def hooks_of(model):
    """Count hooks; transformers installs some of its own on the first forward."""
    return [(name, list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()]


def test_unload_restores_the_host(batch):
    base = tiny_llava()
    keys, trainable = set(base.state_dict()), [p.requires_grad for p in base.parameters()]
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = logits_of(base, host_inputs(batch))
    hooks = hooks_of(base)
    model = stir(hia.get_hia_model(base, tiny_config(base)))
    assert hooks_of(base) != hooks
    assert set(base.state_dict()) == keys
    assert not any(p.requires_grad for p in base.parameters())
    logits_of(model, batch)
    assert model.unload() is base
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert hooks_of(base) == hooks
    assert torch.equal(logits_of(base, host_inputs(batch)), expected)
    assert torch.equal(logits_of(model, batch), expected)  # the wrapper is then the host


def test_an_exception_inside_forward_leaves_nothing_behind(base, model, batch):
    expected, injected = logits_of(base, host_inputs(batch)), logits_of(model, batch)

    def fail(*_args):
        raise MemoryError("stand-in for an out-of-memory error")

    handle = model._host[0].layers[4].register_forward_hook(fail)  # between the two chosen layers
    for call in (model, model.generate):
        with pytest.raises(MemoryError):
            call(**batch)
    handle.remove()
    assert torch.equal(logits_of(base, host_inputs(batch)), expected)
    assert torch.equal(logits_of(model, batch), injected)
    model.unload()
    assert torch.equal(logits_of(base, host_inputs(batch)), expected)


def test_only_the_adapter_is_trainable(model, capsys):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"adapter.{name}" for name, _ in model.adapter.named_parameters()}
    count, total = model.get_nb_trainable_parameters()
    assert count == sum(p.numel() for p in model.adapter.parameters())
    model.print_trainable_parameters()
    assert f"trainable params: {count:,d} || all params: {total:,d}" in capsys.readouterr().out


def test_unknown_attributes_are_the_hosts(base, model):
    assert model.config is base.config
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


@pytest.mark.parametrize("kind", ["tensor", "tuple", "ModelOutput"])
def test_layer_outputs_of_every_transformers_version(kind):
    from transformers.modeling_outputs import BaseModelOutput

    hidden, other = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    output = {"tensor": hidden, "tuple": (hidden, "cache"), "ModelOutput": BaseModelOutput(last_hidden_state=hidden)}[
        kind
    ]
    found, rejoin = split_layer_output(output)
    assert found is hidden
    joined = rejoin(other)
    assert (joined if kind == "tensor" else joined[0]) is other
    if kind == "tuple":
        assert joined[1] == "cache"
    with pytest.raises(TypeError, match="must return a tensor, a tuple or a ModelOutput, got NoneType"):
        split_layer_output(None)


def test_hooks_take_a_tuple_from_a_layer(model, batch):
    """Give a tuple back to a layer that returns one, as before transformers 4.54."""
    expected = logits_of(model, batch)
    natural, joined = [], []
    layer = model._host[0].layers[model.hia_config.layer_indices[0]]
    forward = layer.forward

    def as_tuple(*args, **kwargs):
        natural.append(forward(*args, **kwargs))
        return natural[0] if isinstance(natural[0], tuple) else (natural[0],)

    def as_before(_layer, _args, output):
        joined.append(type(output))
        return output if isinstance(natural[0], tuple) else output[0]

    layer.forward = as_tuple
    handle = layer.register_forward_hook(as_before)  # runs after the adapter's
    try:
        assert torch.equal(logits_of(model, batch), expected)
    finally:
        handle.remove()
        del layer.forward
    assert joined == [tuple]


def changed(batch, **values):
    return {name: value for name, value in {**batch, **values}.items() if value is not None}


def test_bad_input_names_the_argument(model, batch):
    pixels = batch.high_res_pixels
    short_map = batch.image_map.clone()
    short_map[short_map == 2] = -1
    shared_map = batch.image_map.clone()
    shared_map[1, 0] = 0
    on_padding = torch.where(batch.attention_mask[2] == 0)[0][0]
    cases = [
        ({"instruction_index": None}, ValueError, "instruction_index must be given with images, got None"),
        ({"instruction_index": torch.tensor([0, 0, int(on_padding)])}, ValueError, "of sample 2, which is padding"),
        (
            {"instruction_index": torch.tensor([0, 0, 99])},
            ValueError,
            r"instruction_index must be in \[0, \d+\), got 99",
        ),
        ({"instruction_index": torch.tensor([0, 0])}, ValueError, r"instruction_index must have shape \[B\] with B=3"),
        (
            {"instruction_index": torch.zeros(3)},
            TypeError,
            "instruction_index must be an int64 tensor, got torch.float32",
        ),
        ({"high_res_pixels": pixels[:2]}, ValueError, r"image_map must hold -1 or an image's number in \[0, 2\)"),
        ({"high_res_pixels": [*pixels, pixels[0]], "windows": None}, ValueError, r"got none for images \[3\]"),
        (
            {"image_map": short_map},
            ValueError,
            r"image_map must give every image visual tokens, got none for images \[2\]",
        ),
        ({"image_map": shared_map}, ValueError, r"image_map must keep an image within one sample, got images \[0\]"),
        ({"image_map": batch.image_map[:, 1:]}, ValueError, "image_map must have the shape of input_ids"),
        ({"windows": batch.windows[:2]}, ValueError, r"windows must have shape \[3, 2\], got \[2, 2\]"),
        (
            {"high_res_pixels": [p.squeeze(-1) for p in pixels]},
            ValueError,
            r"high_res_pixels\[0\] must have shape \[H, W, 1\]",
        ),
        (
            {"high_res_pixels": [pixels[0][:9], *pixels[1:]]},
            ValueError,
            r"high_res_pixels\[0\] must be at least 11 x 11",
        ),
        ({"high_res_pixels": [pixels[0].int(), *pixels[1:]]}, TypeError, "must be uint8, uint16 or float, got int32"),
        (
            {"high_res_pixels": None, "windows": None},
            ValueError,
            "high_res_pixels or features must come with image_map",
        ),
        ({"features": model.encode_images(pixels)}, ValueError, "must not be given with features, got both"),
    ]
    for changes, kind, message in cases:
        with pytest.raises(kind, match=message):
            model(**changed(batch, **changes))


class Watched(torch.Tensor):
    """Remembers what is asked of it; stands for a tensor whose every value costs a wait for the device."""

    asked: list[str]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        watched = next(x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Watched))
        if function.__name__ != "__get__":  # a shape is free
            watched.asked.append(function.__name__)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
            return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result


def watched(tensor):
    found = tensor.clone().as_subclass(Watched)
    found.asked = []
    return found


def test_the_mask_comes_down_once(batch):
    mask = watched(batch.attention_mask)
    layout.build_layout(batch.image_map, batch.instruction_index, 3, mask)
    assert mask.asked == ["cpu"]
    right = torch.ones(2, 4, dtype=torch.int64)
    right[0, 3] = 0
    mask = watched(right)
    here = pad_left({"attention_mask": mask, "input_ids": torch.zeros(2, 4, dtype=torch.int64)})
    assert here.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert mask.asked.count("cpu") == 1 and not {"__bool__", "item", "tolist"} & set(mask.asked)


def test_a_layout_goes_up_in_one_copy(batch, monkeypatch):
    call = layout.build_layout(batch.image_map, batch.instruction_index, 3).for_call(6, 40, torch.device("cpu"))
    copies = []
    monkeypatch.setattr(layout, "to_device", lambda tensor, device: copies.append(device) or tensor)
    moved = call.to(torch.device("meta"))  # no copy made: the values can be compared
    assert copies == [torch.device("meta")]
    for name, value in vars(call).items():
        got = getattr(moved, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(got, value) and got.dtype == value.dtype, name
        else:
            assert got == value, name


def test_zero_or_nan_windows_are_refused(model, batch):
    windows = batch.windows.clone()
    windows[0, 1] = windows[0, 0]
    with pytest.raises(ValueError, match=r"windows\[0\] must hold two different finite values"):
        model(**changed(batch, windows=windows))


def test_hosts_the_runtime_does_not_know(base):
    with pytest.raises(
        TypeError, match=r"base must be one of LlavaForConditionalGeneration, LlamaForCausalLM .* got Linear"
    ):
        hia.get_hia_model(torch.nn.Linear(2, 2), tiny_config(base))
    with pytest.raises(TypeError, match="base must be one of"):
        hia.get_hia_model(base.model, tiny_config(base))


def test_config_for_another_host(base):
    with pytest.raises(
        ValueError, match=r"config must be made for this host .num_hidden_layers=6., got num_hidden_layers=7"
    ):
        hia.get_hia_model(base, tiny_config(tiny_llava(layers=7)))
    with pytest.raises(TypeError, match="base must not have an adapter yet"):
        model = hia.get_hia_model(base, tiny_config(base))
        hia.get_hia_model(model, tiny_config(base))


def test_processor_without_images(base):
    with pytest.raises(TypeError, match="base_processor must have tokenizer, got "):
        hia.HiAProcessor(tiny_processor().tokenizer)
