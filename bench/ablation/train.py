"""One run of the ablation: one row, one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import hia
from hia.config import RUN_OPTIONS
from hia.encoder.encoder import build_encoder
from hia.layers.adapter import HiAAdapter
from hia.layers.extractor import CONDITION_GAIN, unit_variance_
from hia.phantom import EXTRA_TASKS, PhantomConfig, PhantomDataset
from hia.phantom.batches import PhantomBatches
from hia.phantom.host import LARGE, build_tiny_host, hia_processor, save_whole, tiny_host

from .pretrain import pretrain
from .protocol import Protocol, Row

TRAIN, TEST, MASKS = 1, 2, 3  # parts of the phantoms' seeds: no two share a study
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Material:
    """Make what runs share, and keep it in a folder.

    Attributes:
        protocol: of the runs.
        cache: the folder.
    """

    protocol: Protocol
    cache: Path

    def host(self, tell: Tell) -> Any:
        """Load the frozen host; train it if it is not there."""
        return tiny_host(self.protocol.host, self.cache, tell)

    def untrained(self) -> Any:
        """Build the host without its weights: for what depends on its sizes alone."""
        return build_tiny_host(self.protocol.host)

    def batches(self, part: int, count: int, seed: int, tell: Tell) -> PhantomBatches:
        """Load phantoms with small lesions; draw them if they are not there."""
        protocol = self.protocol
        name = protocol.fingerprint("size", "radius", "tasks")
        place = self.cache / f"phantoms-{name}-{part}-{seed}-{count}"
        if not place.is_dir():
            tell(f"drawing {count} phantoms")
            config = PhantomConfig(size=protocol.size, bits=8, radius=protocol.radius)
            dataset = PhantomDataset(count, (seed, part), config, protocol.tasks, wording=None if part == TRAIN else 0)
            drawn = PhantomBatches(dataset, hia_processor(self.untrained()))
            save_whole(place, lambda folder: torch.save(drawn, folder / "batches.pt"))
        return _load(place / "batches.pt", weights_only=False)

    def host_scores(self) -> dict[str, dict[str, float]]:
        """Score the bare host on held-out phantoms with large lesions, which it was taught, and with small ones."""
        protocol, host = self.protocol, self.host(lambda _: None)
        tasks = (*protocol.tasks, *EXTRA_TASKS)
        scores = {}
        for name, radius in (("large lesions", LARGE), ("small lesions", protocol.radius)):
            config = PhantomConfig(size=protocol.size, bits=8, radius=radius)
            dataset = PhantomDataset(60 * len(tasks), (0, TEST), config, tasks)
            batches = PhantomBatches(dataset, hia_processor(host), keep_pixels=False)
            scores[name] = batches.score(host, high_res=False)
        return scores

    def encoder_state(self, low_resolution: bool, tell: Tell) -> dict[str, torch.Tensor]:
        """Load the pre-trained encoder; train it if it is not there."""
        protocol = self.protocol
        own = ("size", "radius", "tasks", "train_samples", "config", "encoder_steps", "encoder_batch", "encoder_lr")
        place = self.cache / f"encoder-{protocol.fingerprint(*own)}-{'low' if low_resolution else 'high'}"
        if not place.is_dir():
            batches = self.batches(MASKS, protocol.train_samples, 0, tell)
            tell(f"pre-training the encoder at {'low' if low_resolution else 'high'} resolution")
            host = self.untrained()
            config = hia.HiAConfig.paper(host, **protocol.config)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                encoder = build_encoder(config)
            images = batches.pixels
            if low_resolution:
                side = host.config.vision_config.image_size
                images = [hia.Radiograph(pixels, (0.0, 255.0)).resized(side, side).pixels for pixels in images]
            loss = pretrain(
                encoder,
                images,
                batches.windows,
                batches.masks,
                steps=protocol.encoder_steps,
                batch=protocol.encoder_batch,
                lr=protocol.encoder_lr,
                seed=0,
            )
            tell(f"pre-trained the encoder: loss {loss:.4f}")
            save_whole(place, lambda folder: torch.save(encoder.state_dict(), folder / "encoder.pt"))
        return _load(place / "encoder.pt", weights_only=True)


def _load(place: Path, weights_only: bool) -> Any:
    """Read what a folder of the cache holds, which this command wrote."""
    try:
        return torch.load(place, weights_only=weights_only)
    except Exception as error:
        # a damaged pickle fails in whatever way it likes
        folder = place.parent
        raise ValueError(f"{place} must be whole, got: {error!r}; delete {folder} to have it made anew") from error


def start_parts(adapter: HiAAdapter, parts: tuple[str, ...]) -> None:
    """Start every layer as PyTorch does, save in the parts that are named."""
    for layer in adapter.layers.values():
        extractor, injection = layer.extractor, layer.injection
        linears = (
            extractor.feature_projection,
            extractor.q_proj,
            extractor.kv_proj,
            extractor.out_proj,
            injection.q_proj,
            injection.kv_proj,
        )
        for linear in linears:
            unit_variance_(linear) if "linears" in parts else linear.reset_parameters()
        if extractor.condition is not None:
            unit_variance_(extractor.condition) if "linears" in parts else extractor.condition.reset_parameters()
            with torch.no_grad():
                extractor.condition.weight.mul_(CONDITION_GAIN if "condition" in parts else 1)
                extractor.condition.bias.mul_(CONDITION_GAIN if "condition" in parts else 1)
        nn.init.normal_(extractor.queries, std=1.0 if "queries" in parts else 0.02)


def build(material: Material, row: Row, seed: int, tell: Tell) -> hia.HiAModel:
    """Attach the row's adapter, with the pre-trained encoder, to the frozen host."""
    host = material.host(tell)
    torch.manual_seed(seed)
    settings = {**material.protocol.config, **row.changes}
    options = {name: settings.pop(name) for name in RUN_OPTIONS if name in settings}
    model = hia.get_hia_model(host, hia.HiAConfig.paper(host, **settings), **options)
    if row.parts is not None:
        start_parts(model.adapter, row.parts)
    model.adapter.encoder.load_state_dict(material.encoder_state(row.low_resolution, tell))
    return model


def run(material: Material, row: Row, seed: int, tell: Tell) -> dict[str, Any]:
    """Train one row with one seed and score it.

    Args:
        material: host, phantoms, encoder.
        row: what differs from the full model.
        seed: of the adapter, the order and the phantoms it is trained on.
        tell: is told how far it is.

    Returns:
        JSON-ready: scores of the held-out questions by task, the learning curve, numbers of
        :meth:`hia.HiAModel.adapter_health` before and after, seconds.
    """
    protocol, steps = material.protocol, material.protocol.steps
    train = material.batches(TRAIN, protocol.train_samples, seed, tell)
    tasks = len(protocol.tasks)
    test = material.batches(TEST, protocol.test_samples * tasks, 0, tell)
    curve_test = list(range(protocol.curve_samples * tasks))
    model = build(material, row, seed, tell)
    probe = test.batch(range(min(4 * tasks, len(test))))
    before = model.adapter_health(probe).to_dict()
    model.train()
    groups = model.parameter_groups(
        protocol.lr, encoder_lr_scale=protocol.encoder_lr_scale, weight_decay=protocol.weight_decay
    )
    optimizer = torch.optim.AdamW(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    order, curve, losses, start = train.shuffled(protocol.batch_size, seed), [], [], time.monotonic()
    spent = 0.0  # in training steps alone
    for step in range(steps):
        factor = min(1, (step + 1) / protocol.warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        began = time.monotonic()
        loss = model(**train.batch(next(order))).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.adapter.parameters(), protocol.clip)
        optimizer.step()
        losses.append(loss.item())
        spent += time.monotonic() - began
        if (step + 1) % protocol.evaluate_every == 0 and step + 1 < steps:
            recent = losses[-protocol.evaluate_every :]
            scores = scored(model, test, curve_test)
            curve.append({"step": step + 1, "loss": sum(recent) / len(recent), "scores": scores})
            tell(f"step {step + 1} of {steps}, {_line(curve[-1])}")
    recent = losses[-protocol.evaluate_every :]
    final = {"step": steps, "loss": sum(recent) / len(recent), "scores": scored(model, test, list(range(len(test))))}
    tell(f"done, {_line(final)}")
    return {
        "row": row.name,
        "seed": seed,
        "protocol": protocol.fingerprint(row=row),
        "steps": steps,
        "scores": final["scores"],
        "curve": [*curve, final],
        "health": {"before": before, "after": model.eval().adapter_health(probe).to_dict()},
        "seconds": time.monotonic() - start,
        "seconds_a_step": spent / steps,
    }


def scored(model: hia.HiAModel, test: PhantomBatches, samples: list[int]) -> dict[str, float]:
    """Score some held-out questions in evaluation; back in training afterwards."""
    model.eval()
    try:
        return test.score(model, samples=samples)
    finally:
        model.train()


def _line(point: dict[str, Any]) -> str:
    return f"loss {point['loss']:.3f}, " + ", ".join(f"{task} {score:.2f}" for task, score in point["scores"].items())
