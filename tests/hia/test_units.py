"""Weights that are elsewhere between calls: every way through the adapter gives the bits that it gives without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import hia
from hia.encoder.encoder import Encoder
from hia.layers.adapter import HiAAdapter, HiALayer
from hia.layers.extractor import Extractor
from hia.layers.injection import Injection
from hia.layers.shared import SharedProjection
from tests.hia.conftest import NONE, ONE, TWO, random_images
from tests.hia.hosts import stir, tiny_config, tiny_llava

UNITS = {
    "layers": (Encoder, SharedProjection, HiALayer),
    "parts": (Encoder, SharedProjection, Extractor, Injection),
}
KEEPS = ("auto", "features", "folded", "kv")


def model_of(preset: str, plan: str = "auto") -> hia.HiAModel:
    base = tiny_llava()
    return stir(hia.get_hia_model(base, tiny_config(base, preset, encoder="strided"), plan=plan, auto_fold=False))


def units_of(adapter: HiAAdapter, kind: str) -> list[nn.Module]:
    return [module for module in adapter.modules() if isinstance(module, UNITS[kind])]


@contextmanager
def offloaded(units: list[nn.Module]) -> Iterator[list[str]]:
    """Keep the units' parameters on the meta device between calls, as offloading does; list the calls."""
    owners = [[(m, name, p) for m in unit.modules() for name, p in m.named_parameters(recurse=False)] for unit in units]
    calls: list[str] = []
    handles = []

    def hook(unit: nn.Module, owned: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        away = [nn.Parameter(p.detach().to("meta"), p.requires_grad) for _, _, p in owned]

        def place(parameters: list[nn.Parameter]) -> None:
            for (module, name, _), parameter in zip(owned, parameters, strict=True):
                module._parameters[name] = parameter

        def load(_unit: nn.Module, _args: object) -> None:
            calls.append(type(unit).__name__)
            depth[id(unit)] = depth.get(id(unit), 0) + 1
            place([p for _, _, p in owned])

        def unload(_unit: nn.Module, _args: object, _out: object) -> None:
            depth[id(unit)] -= 1
            if not depth[id(unit)]:
                place(away)

        place(away)
        handles.append(unit.register_forward_pre_hook(load))
        handles.append(unit.register_forward_hook(unload, always_call=True))

    depth: dict[int, int] = {}
    for unit, owned in zip(units, owners, strict=True):
        hook(unit, owned)
    try:
        yield calls
        assert all(p.is_meta for unit in units for p in unit.parameters())
    finally:
        for handle in handles:
            handle.remove()
        for owned in owners:
            for module, name, parameter in owned:
                module._parameters[name] = parameter


def answered(processor: hia.HiAProcessor) -> hia.HiABatch:
    a, b, c = random_images()
    replies = ["yes.", "no.", "new lesion."]
    return processor([TWO, NONE, ONE], [[a, b], [], [c]], answers=replies, padding_side="right")


def results_of(model: hia.HiAModel, batch: hia.HiABatch) -> dict[str, Tensor | str]:
    """Compute everything that reads the adapter's weights without training them."""
    rest = {name: value for name, value in batch.items() if name not in ("high_res_pixels", "windows")}
    found: dict[str, Tensor | str] = {}
    with torch.no_grad():
        found["logits"] = model(**batch).logits
        found["generated"] = model.generate(**batch, max_new_tokens=3, do_sample=False)
        found["beams"] = model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
        for keep in KEEPS:
            features = model.encode_images(batch.high_res_pixels, batch.windows, keep=keep)
            kept = [cache.tokens for caches in features.caches for cache in caches.values()]
            assert len(kept) == (0 if keep == "features" else 6)  # two layers of three images
            assert not any(tokens.is_meta for tokens in kept), "weights were read outside a call"
            found[f"kept {keep}"] = model(**rest, features=features).logits
            extractors = [layer.extractor for layer in model.adapter.layers.values()]
            packed = model.adapter.packed(features)
            found[f"form {keep}"] = str([extractor.form_for(packed, 2) for extractor in extractors])
    return found


def trained(model: hia.HiAModel, batch: hia.HiABatch, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute loss and gradients of a step, and of one with gradient checkpointing."""
    found: dict[str, Tensor] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statistics that no data has touched
        model.train()
    for kind in ("", "checkpointed "):
        if kind:
            model.gradient_checkpointing_enable()
        loss = model(**batch).loss
        loss.backward()
        found[f"{kind}loss"] = loss.detach()
        for name, parameter in parameters.items():
            found[f"{kind}{name}"], parameter.grad = parameter.grad.clone(), None
    model.base_model.gradient_checkpointing_disable()
    model.eval()
    return found


def assert_same(got: dict[str, Tensor | str], expected: dict[str, Tensor | str]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        same = torch.equal(got[name], value) if isinstance(value, Tensor) else got[name] == value
        assert same, name


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize(
    ("preset", "plan"),
    [
        ("paper", "auto"),
        ("lite", "auto"),
        ("released", "auto"),
        ("released", "direct/direct"),
        ("released", "folded/absorbed"),
    ],
)
def test_offloaded_units_give_the_same_bits(preset, plan, kind, processor):
    model, batch = model_of(preset, "auto"), answered(processor)
    parameters = dict(model.adapter.named_parameters())

    def measured() -> dict[str, Tensor | str]:
        found = results_of(model, batch)
        model.set_plan(plan)
        found |= {"answer": model(**batch).logits.detach(), "health": str(model.adapter_health(batch).to_dict())}
        found |= trained(model, batch, parameters)
        model.set_plan("auto")
        return found

    expected = measured()
    units = units_of(model.adapter, kind)
    with offloaded(units) as calls:
        got = measured()
        model.explain_plan([(64, 64)])
    assert {type(unit).__name__ for unit in units} == set(calls)
    assert_same(got, expected)


def test_the_test_would_see_weights_read_from_outside(batch):
    model = model_of("paper")
    extractor = model.adapter.layer(2).extractor
    with offloaded([extractor]), torch.no_grad():
        packed = model.adapter.packed(model.encode_images(batch.high_res_pixels, keep="features"))
        assert extractor.cached_tokens(packed, "kv").is_meta  # not inside a call
        assert not extractor.inside(extractor.cached_tokens, packed, "kv").is_meta


def test_what_was_kept_is_dropped_with_its_weights(batch):
    model = model_of("paper")
    with torch.no_grad():
        features = model.encode_images(batch.high_res_pixels, batch.windows, keep="kv")
        with offloaded(units_of(model.adapter, "layers")):
            assert not model.adapter.packed(features).caches  # weights have moved


@pytest.mark.parametrize("module", ["encoder", "layer", "shared"])
def test_weights_that_move_are_not_folded(module):
    model = model_of("released")
    layer = model.adapter.layer(2)
    fold = {"encoder": model.adapter.encoder, "extractor": layer.extractor}.get(module, model.adapter).fold_weights
    moved = {
        "encoder": model.adapter.encoder,
        "extractor": layer,
        "feature_projection": model.adapter.feature_projection,
    }
    with offloaded([moved.get(module, model.adapter.encoder)]):
        message = r"fold_weights must have weights that stay in place between calls, got .* on the meta device"
        with pytest.raises(NotImplementedError, match=message):
            fold()


def test_accelerates_offloading(processor):
    """Offload with hooks that take the place of a module's forward, and give a leaf weights when it is called."""
    accelerate = pytest.importorskip("accelerate")
    for preset in ("paper", "released"):
        model, batch = model_of(preset), answered(processor)
        asked = {name: value for name, value in batch.items() if name != "labels"}
        expected, health = results_of(model, batch), model.adapter_health(asked)
        classes = [unit.__name__ for unit in (Extractor, Injection, SharedProjection)]
        classes.append(type(model.adapter.encoder).__name__)
        accelerate.cpu_offload(model.adapter, torch.device("cpu"), preload_module_classes=classes)
        assert all(parameter.is_meta for parameter in model.adapter.parameters())
        assert_same(results_of(model, batch), expected)
        assert model.adapter_health(asked) == health
        assert all(parameter.is_meta for parameter in model.adapter.parameters())


@pytest.fixture
def one_process() -> Iterator[dist.device_mesh.DeviceMesh]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo here")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shard_all(model: hia.HiAModel, shard: Callable[[nn.Module], object]) -> None:
    for unit in units_of(model.adapter, "layers"):
        shard(unit)


def shard_the_model_too(model: hia.HiAModel, shard: Callable[[nn.Module], object]) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    shard_all(model, shard)
    shard(model)
    for method in ("generate", "encode_images", "adapter_health"):
        register_fsdp_forward_method(model, method)


@pytest.mark.parametrize("sharding", [shard_all, shard_the_model_too])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_fsdp2(preset, sharding, one_process, processor):
    from torch.distributed.fsdp import fully_shard

    model, batch = model_of(preset), answered(processor)
    state = copy.deepcopy(model.adapter.state_dict())
    expected = results_of(model, batch)
    health = model.adapter_health(batch).to_dict()
    expected |= trained(model, batch, dict(model.adapter.named_parameters()))
    sharding(model, lambda module: fully_shard(module, mesh=one_process))
    sharded = dict(model.adapter.named_parameters())  # now: behind a call, whole ones may be left in their place
    assert set(sharded) == set(dict(HiAAdapter(model.hia_config).named_parameters()))
    got = results_of(model, batch)
    assert model.adapter_health(batch).to_dict() == health
    got |= {name: whole(value) for name, value in trained(model, batch, sharded).items()}
    assert_same(got, expected)
    with pytest.raises(NotImplementedError, match="got .* sharded; modules that are sharded or offloaded run without"):
        model.fold_weights()
    for name, value in model.adapter.state_dict().items():
        assert torch.equal(whole(value), state[name]), name
