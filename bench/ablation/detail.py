"""The lesion of a phantom in the 42 px view of a host, and what is left of it: ``python -m bench ablation-detail``.

Twice, without any language model: for a matched filter that knows everything but whether the lesion is there, and for a
small CNN that is trained to say so. The premise of the ablation is that radii of 1.5 to 3.25 are plain at 192 px and
lost at 42 px.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.records.environment import describe, device_name
from bench.records.files import results_folder, write_json
from hia.images.radiograph import Radiograph
from hia.phantom import BONES, PhantomConfig, PhantomDataset, draw_study
from hia.phantom.host import LARGE

FULL, VIEW = 192, 42  # px
RADII = (1.5, 2.5, 3.25, 5.0, 10.0, 20.0)
SMALL = PhantomConfig.radius
# The first steps on lesions that the view still shows, then ever smaller ones: a network that knows what to look for.
CURRICULUM = (((5.0, 10.0), 250), ((3.5, 6.0), 250), ((2.5, 4.0), 250), (SMALL, 500))
TRAININGS: tuple[tuple[str, int, tuple[tuple[tuple[float, float], int], ...]], ...] = (
    ("small lesions", FULL, ((SMALL, 300),)),
    ("small lesions", VIEW, ((SMALL, 300),)),
    ("small lesions, longer", VIEW, ((SMALL, 1000),)),
    ("small lesions, after larger ones", VIEW, CURRICULUM),
    ("large lesions", VIEW, ((LARGE, 300),)),
)
BATCH, TEST = 32, 600  # studies


def grey(radius: tuple[float, float], seed: Any, px: int, **given: Any) -> Tensor:
    """Draw one visit, resized: [px, px] in [0, 1]."""
    return _resized(draw_study(seed, PhantomConfig(radius=radius), **given).visits[0].radiograph, px)


def _resized(radiograph: Radiograph, px: int) -> Tensor:
    return (radiograph if px == FULL else radiograph.resized(px, px)).windowed()[..., 0]


def matched_filter(radius: float, px: int, studies: int, lesions: int) -> tuple[float, float]:
    """Measure the best that a linear filter can do which knows shape and place.

    Args:
        radius: of the lesion, in 192nds of the side.
        px: side that the study is resized to.
        studies: without a lesion, a bone, for the spread of the filter's answers.
        lesions: a bone.

    Returns:
        The median over lesions of the filter's answer to the lesion over the standard deviation of its answers to
        other studies of that bone without one; and of the largest difference a lesion makes, of full scale.
    """
    ratios, differences = [], []
    for bone in BONES:
        plain = torch.stack([grey((radius, radius), (1, seed), px, lesion=False, bone=bone) for seed in range(studies)])
        for seed in range(lesions):
            with_, without = (grey((radius, radius), seed, px, lesion=lesion, bone=bone) for lesion in (True, False))
            template = with_ - without
            ratios.append(float((template * template).sum() / (plain * template).sum((1, 2)).std()))
            differences.append(float(template.abs().max()))
    return statistics.median(ratios), statistics.median(differences)


def classifier() -> nn.Module:
    """Make the CNN: [n, 1, px, px] to [n], four 3 x 3 convolutions, mean and maximum over the image."""

    class MeanAndMaximum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)

    widths = (1, 12, 16, 24, 24)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        stride = 2 if number == 2 else 1
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, MeanAndMaximum(), nn.Linear(2 * widths[-1], 1), nn.Flatten(0))


def _draw(count: int, seed: tuple[int, ...], radius: tuple[float, float], px: int) -> tuple[Tensor, Tensor]:
    dataset = PhantomDataset(count, seed, PhantomConfig(radius=radius), tasks=("disease",))
    images, present = [], []
    for number in range(count):
        sample = dataset[number]
        images.append(_resized(sample.images[0], px))
        present.append(float(bool(sample.study.visits[0].lesions)))
    return torch.stack(images)[:, None], torch.tensor(present)


def train_classifier(
    px: int, stages: Sequence[tuple[tuple[float, float], int]], test: int = TEST, seed: int = 0
) -> list[float]:
    """Train the CNN from scratch on phantoms that it sees once.

    Args:
        px: side that the phantoms are resized to.
        stages: radii and steps, one after the other.
        test: held-out phantoms.
        seed: of weights and phantoms.

    Returns:
        After each stage, the share of held-out phantoms of its radii it is right about.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = classifier()
    optimizer, shares = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for stage, (radius, steps) in enumerate(stages):
        model.train()
        for step in range(steps):
            images, present = _draw(BATCH, (seed, 1, stage, step), radius, px)
            loss = F.binary_cross_entropy_with_logits(model(images), present)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, test, BATCH):
                images, present = _draw(min(BATCH, test - start), (seed, 2, stage, start), radius, px)
                right += int(((model(images) > 0) == present.bool()).sum())
        shares.append(right / test)
    return shares


def measure(say: Callable[[str], None], studies: int = 40, lesions: int = 10) -> dict[str, Any]:
    """Make both tables; ``say`` is told each row."""
    filters, trainings, began = [], [], time.monotonic()
    for radius in RADII:
        found = {px: matched_filter(radius, px, studies, lesions) for px in (FULL, VIEW)}
        filters.append({"radius": radius, **{f"{px}": found[px] for px in found}})
        cells = [f"{found[px][index]:.2g}" for index in (1, 0) for px in (FULL, VIEW)]
        say(
            f"radius {radius:<5g} largest difference at {FULL} / {VIEW} px {cells[0]} / {cells[1]}, matched filter "
            f"{cells[2]} / {cells[3]}"
        )
    for name, px, stages in TRAININGS:
        shares = train_classifier(px, stages)
        trainings.append({"name": name, "px": px, "stages": stages, "right": shares})
        steps = ", ".join(f"radii {low:g} to {high:g}, {steps} steps" for (low, high), steps in stages)
        say(
            f"CNN at {px} px, {name} ({steps}): right {', '.join(f'{share:.3f}' for share in shares)}; "
            f"{(time.monotonic() - began) / 60:.1f} min"
        )
    return {"matched_filter": filters, "classifier": trainings, "studies": studies, "lesions": lesions, "test": TEST}


def run(*, out: Path | None = None, record: bool = False) -> int:
    """Measure, print, write phantom_detail.json."""
    found = {"environment": describe("cpu")} | measure(lambda line: print(line, flush=True))
    path = results_folder(device_name("cpu"), out=out, record=record) / "phantom_detail.json"
    print(f"written: {os.path.relpath(write_json(path, found))}")
    return 0
