"""The composites: several steps of the adapter, on images and on layers."""

from __future__ import annotations

import torch

from hia.layers.layout import CallLayout, build_layout
from hia_kernels.core.draw import Draw

from .cases import IMAGES, LAYERS, TRAINED_IMAGES, ImageCase, LayerCase, halved
from .registry import CompositeEntry, Inputs


def layout_of(case: LayerCase, device: str) -> CallLayout:
    """Lay out each sample: its images' tokens behind a first text token, the instruction's last token last."""
    image_map = torch.full((case.batch, case.seq_len), -1)
    images = iter(range(case.images))
    for (start, _), sample in zip(case.visual_runs, case.samples, strict=True):
        for position, image in enumerate(next(images) for _ in sample):
            first = start + position * case.visual_tokens
            image_map.view(-1)[first : first + case.visual_tokens] = image
    instruction = torch.tensor([row % case.seq_len for row, _ in case.instruction_runs])
    layout = build_layout(image_map, instruction, case.images)
    return layout.for_call(case.batch, case.seq_len, torch.device(device))


def _images(case: ImageCase | LayerCase, draw: Draw) -> Inputs:
    top = float(torch.iinfo(case.pixel_dtype).max)
    images = [draw.uniform(*size, 1, top=top, dtype=case.pixel_dtype) for size in case.sizes]
    return {"images": images, "windows": torch.tensor([[0.0, top]] * len(images), device=draw.device)}


def _hidden(case: LayerCase, draw: Draw) -> Inputs:
    return {"hidden": draw.normal(case.batch, case.seq_len, case.hidden_size), "layout": layout_of(case, draw.device)}


def _maps(case: LayerCase, draw: Draw) -> Inputs:
    """Draw features as the encoder gives them: behind a ReLU."""
    grids = [halved(size, 5) for size in case.sizes]
    return {"maps": tuple(draw.normal(*grid, case.channels).relu_() for grid in grids)}


def _features_and_hidden(case: LayerCase, draw: Draw) -> Inputs:
    return _maps(case, draw) | _hidden(case, draw)


def _hidden_and_extracted(case: LayerCase, draw: Draw) -> Inputs:
    return _hidden(case, draw) | {"extracted": draw.normal(case.images * case.num_queries, case.config.dim)}


def _images_and_hidden(case: LayerCase, draw: Draw) -> Inputs:
    return _images(case, draw) | _hidden(case, draw)


def _in_batched_set(case: ImageCase, _role: str, name: str) -> bool:
    return name in case.sets or (name == "gpu" and "batch" in case.sets)


def _in_training_set(case: ImageCase, _role: str, name: str) -> bool:
    return name in case.sets or (name == "cpu" and "train" in case.sets)


def _in_encoded_set(case: LayerCase, _role: str, name: str) -> bool:
    return ("encoded" if name == "cpu" else name) in case.sets


def _in_trained_set(case: LayerCase, role: str, name: str) -> bool:
    return _in_encoded_set(case, role, name) and (name != "cpu" or case.preset == "released")


LAYER = ("extract", "inject")
COMPOSITES = (
    CompositeEntry(name="encode", cases=IMAGES, draw_inputs=_images, encodes=True, in_set=_in_batched_set),
    CompositeEntry(name="extract", cases=LAYERS, draw_inputs=_features_and_hidden, parts=("extract",)),
    CompositeEntry(name="inject", cases=LAYERS, draw_inputs=_hidden_and_extracted, parts=("inject",)),
    CompositeEntry(
        name="adapter_layer",
        cases=LAYERS,
        draw_inputs=_images_and_hidden,
        parts=LAYER,
        encodes=True,
        in_set=_in_encoded_set,
    ),
    CompositeEntry(name="second_question", cases=LAYERS, draw_inputs=_features_and_hidden, parts=LAYER),
    CompositeEntry(
        name="adapter_train_step",
        cases=LAYERS,
        draw_inputs=_images_and_hidden,
        parts=LAYER,
        encodes=True,
        trains=True,
        in_set=_in_trained_set,
    ),
    CompositeEntry(
        name="encode_train_step",
        cases=TRAINED_IMAGES,
        draw_inputs=_images,
        encodes=True,
        trains=True,
        in_set=_in_training_set,
    ),
)
