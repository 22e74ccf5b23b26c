"""The four ways of reading a large image that Table 3 compares: how each is built and what it is given.

The same code makes models and inputs under fake tensors, on the CPU and on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.image_processing_utils import select_best_resolution

from hia_kernels import use_backend

from ..measure.footprint import real_tensor
from ..providers import released
from . import hosts
from .hosts import BASE_RESOLUTION, PATCH, HostSpec, visual_tokens

LABELS = {
    "baseline": "baseline: CLIP fed the larger image, position embeddings interpolated",
    "anyres": "anyres: LLaVA-NeXT, up to 5 tiles of 336 (transformers' LlavaNext modules)",
    "released": "released: our port of the released HiA maths on LLaVA at 336",
    "hia": "hia: HiAConfig.paper on LLaVA at 336",
}
METHODS = tuple(LABELS)
# open_clip's OPENAI_DATASET_MEAN and _STD
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        images: [R, R, 1 or 3] uint8 tensors of one size.
        text: token ids; the images are spread among them.
    """

    images: Sequence[Tensor]
    text: Sequence[int]


@dataclass(frozen=True)
class Prompt:
    """A sample's token ids with placeholders.

    Attributes:
        ids: of the whole sequence.
        image_rows: the rows of each image's placeholders.
    """

    ids: list[int]
    image_rows: list[slice]


def build_model(method: str, spec: HostSpec, dtype: torch.dtype, attention: str) -> nn.Module:
    """A method's model with random weights, in eval mode on the default device; ours with folded weights."""
    return _folded(method, _built(method, spec, dtype, attention))


def _folded(method: str, model: nn.Module) -> nn.Module:
    return model.fold_weights() if method == "hia" else model


def _built(method: str, spec: HostSpec, dtype: torch.dtype, attention: str) -> nn.Module:
    if method == "anyres":
        return hosts.build_llava_next(spec, dtype, attention)
    base = hosts.build_llava(spec, dtype, attention)
    if method == "released":
        return released.build_released(base)
    if method == "hia":
        import hia

        return hia.get_hia_model(base, hia.HiAConfig.paper(base)).eval()
    return base


def build_fake_model(method: str, spec: HostSpec, dtype: torch.dtype, attention: str) -> nn.Module:
    """:func:`build_model` without memory, for use inside ``fake_mode``.

    Built on the meta device and then turned fake: modules of fake tensors refuse ``.to(dtype)``.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        model = _built(method, spec, dtype, attention)
    with use_backend("reference"):  # or the encoder's fake weights would be laid out for oneDNN
        return _folded(method, model.to_empty(device="cpu"))


def host_of(method: str, model: nn.Module) -> nn.Module:
    """The transformers model inside."""
    inside = {"released": "base", "hia": "base_model"}.get(method)
    return model if inside is None else getattr(model, inside)


def tokens_per_image(method: str, resolution: int) -> int:
    """Visual tokens of a square image in the LLM's sequence."""
    if method == "baseline":
        return visual_tokens(resolution)
    if method == "anyres":
        # the tiles' grid without its padding, a newline token behind each of its rows, and the whole image
        side = min(anyres_grid(resolution)) * BASE_RESOLUTION // PATCH
        return visual_tokens(BASE_RESOLUTION) + side * (side + 1)
    return visual_tokens(BASE_RESOLUTION)


def anyres_grid(resolution: int) -> tuple[int, int]:
    """Tiles down and across that LLaVA-NeXT gives a square image."""
    height, width = select_best_resolution((resolution, resolution), hosts.GRID_PINPOINTS)
    return height // BASE_RESOLUTION, width // BASE_RESOLUTION


def sequence_length(method: str, resolution: int, images: int, text_tokens: int) -> int:
    """Tokens the LLM reads."""
    return text_tokens + images * tokens_per_image(method, resolution)


def make_prompt(text: Sequence[int], images: int, per_image: int, image_token: int) -> Prompt:
    """Spread the images among the text; the last token is the instruction's."""
    ids: list[int] = []
    rows: list[slice] = []
    start = 0
    for image in range(images):
        stop = (image + 1) * len(text) // (images + 1)
        ids += text[start:stop]
        rows.append(slice(len(ids), len(ids) + per_image))
        ids += [image_token] * per_image
        start = stop
    return Prompt(ids + list(text[start:]), rows)


def make_inputs(
    method: str, model: nn.Module, spec: HostSpec, sample: Sample, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The keyword arguments of a prefill as ``generate`` does it: with cache, logits of the last token.

    The baseline's model is changed to the images' resolution.
    """
    resolution, images = sample.images[0].shape[0], len(sample.images)
    prompt = make_prompt(sample.text, images, tokens_per_image(method, resolution), spec.image_token)
    dtype = next(model.parameters()).dtype
    inputs: dict[str, Any] = {
        "input_ids": real_tensor([prompt.ids], torch.int64).to(device),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    pixels = [image.to(device) for image in sample.images]
    if method == "baseline":
        hosts.interpolate_positions(model, resolution)
        return {**inputs, "pixel_values": clip_pixels(pixels, resolution, dtype)}
    if method == "anyres":
        return {**inputs, **_anyres_pixels(pixels, resolution, dtype)}
    inputs["pixel_values"] = clip_pixels(pixels, BASE_RESOLUTION, dtype)
    if method == "released":
        high_res = normalised(pixels, resolution, released.MEAN, released.STD).to(dtype)
        where = {"image_rows": prompt.image_rows, "instruction_index": len(prompt.ids) - 1}
        return {**inputs, "high_res_pixels": high_res, **where}
    image_map = [-1] * len(prompt.ids)
    for image, rows in enumerate(prompt.image_rows):
        image_map[rows] = [image] * (rows.stop - rows.start)
    return {
        **inputs,
        "high_res_pixels": pixels,
        "windows": real_tensor([[0.0, 255.0]] * images, torch.float32),
        "image_map": real_tensor([image_map], torch.int64),
        "instruction_index": real_tensor([len(prompt.ids) - 1], torch.int64),
    }


def normalised(images: Sequence[Tensor], size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[H, W, 1 or 3] uint8 images of one size -> [n, 3, size, size] float32; grey is repeated."""
    x = torch.stack(list(images)).permute(0, 3, 1, 2).float() / 255
    if x.shape[-1] != size:
        x = F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    shape = (1, 3, 1, 1)
    return (x - torch.tensor(mean, device=x.device).view(shape)) / torch.tensor(std, device=x.device).view(shape)


def clip_pixels(images: Sequence[Tensor], size: int, dtype: torch.dtype) -> Tensor:
    """[n, 3, size, size], normalised for CLIP."""
    return normalised(images, size, CLIP_MEAN, CLIP_STD).to(dtype)


def _anyres_pixels(images: Sequence[Tensor], resolution: int, dtype: torch.dtype) -> dict[str, Any]:
    """LLaVA-NeXT's pixel_values [n, 1 + tiles, 3, 336, 336] and image_sizes."""
    down, across = anyres_grid(resolution)
    tile, side = BASE_RESOLUTION, min(down, across) * BASE_RESOLUTION
    grid = clip_pixels(images, side, dtype)
    pad_down, pad_across = (down * tile - side) // 2, (across * tile - side) // 2
    grid = F.pad(grid, (pad_across, pad_across, pad_down, pad_down))
    tiles = grid.unflatten(2, (down, tile)).unflatten(4, (across, tile)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    whole = clip_pixels(images, tile, dtype)[:, None]
    return {"pixel_values": torch.cat([whole, tiles], 1), "image_sizes": [(resolution, resolution)] * len(images)}
