"""Named real cases that ops and composites share: images, and layers of the adapter that meet them.

``13b-896-2img-b4`` is LLaMA-13B's adapter on four samples of two 896-pixel images; ``released`` in a name means
the maths of the authors' released code (8 heads of 640 or 512), ``lite`` the narrow adapter on the 13B host,
``small`` the host that the CPU runs in seconds, ``tiny`` a shape for smoke tests. ``px896`` is the encoder alone,
whose shapes no host changes. Ragged mixes have the sizes of real radiographs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from hia.config import HiAConfig

Size = tuple[int, int]  # height, width, pixels
InSet = Callable[[Any, str, str], bool]  # case, role, name of the set

# LLaMA-2: hidden size, decoder layers
HOSTS: dict[str, tuple[int, int]] = {"13b": (5120, 40), "7b": (4096, 32), "small": (768, 6), "tiny": (64, 6)}
RESOLUTIONS = (448, 896, 1792, 4096)
VISUAL_TOKENS = 576  # an image's tokens in the host: CLIP ViT-L/14 at 336 pixels
TEXT_TOKENS = 60
NUM_QUERIES = 256

# chest, pelvis, knee, hand and foot radiographs as published; two are DICOM, of 15 and 10 bits
CHEST, PELVIS, KNEE, HAND = (2000, 2000), (2084, 2675), (1913, 1067), (2082, 1466)
FOOT, ANKLE, DICOM_RG1, DICOM_RG3 = (1322, 2638), (1087, 1037), (1955, 1841), (1760, 1760)

# what a GPU run without names measures first, and the only shapes it compiles for
FIRST = ("13b-896-2img", "13b-released-896-2img", "px896")


def halved(size: Size, times: int) -> Size:
    """Halve a side several times, rounding up."""
    return -(-size[0] // 2**times), -(-size[1] // 2**times)


@dataclass(frozen=True)
class ImageCase:
    """Images for the encoder alone.

    Attributes:
        name: of the case.
        sizes: (height, width) of each image, pixels.
        width: channels of the encoder's stem; ResNet-50 ends in 32 times that.
        bits: of a pixel, 8 or 16.
        encoder: "resnet50" or "strided".
        sets: those of :func:`bench.workloads.in_set`; "batch" is the GPU's for "encode" alone: a training step would
            keep the activations of all these pixels. "train" is the CPU's for the encoder's training step alone.
    """

    name: str
    sizes: tuple[Size, ...]
    width: int = 64
    bits: int = 8
    encoder: str = "resnet50"
    sets: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Return C of the features."""
        return (32 if self.encoder == "resnet50" else 16) * self.width

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Return the dtype of the images."""
        return torch.uint8 if self.bits == 8 else torch.uint16


@dataclass(frozen=True)
class LayerCase:
    """A batch of prompts with images, and the adapter's layer that they meet.

    Attributes:
        name: of the case.
        host: a key of :data:`HOSTS`.
        preset: of :class:`hia.HiAConfig`: "paper", "released" or "lite".
        samples: for each sample of the batch its images' (height, width), pixels.
        num_queries: M.
        visual_tokens: rows an image has in the host's sequence.
        text_tokens: rows beside the images'.
        width: channels of the encoder's stem.
        encoder: "resnet50" or "strided".
        position: of the features, where it isn't the preset's.
        dim: the adapter's width where it isn't the preset's.
        sets: as in :class:`ImageCase`; "absorbed" is the GPU's for the attention with absorbed projections, "encoded"
            the CPU's for a layer with its encoder, which takes seconds at 448 pixels and minutes to check and time.
    """

    name: str
    host: str
    preset: str
    samples: tuple[tuple[Size, ...], ...]
    num_queries: int = NUM_QUERIES
    visual_tokens: int = VISUAL_TOKENS
    text_tokens: int = TEXT_TOKENS
    width: int = 64
    encoder: str = "resnet50"
    position: str | None = None
    dim: int | None = None
    sets: tuple[str, ...] = ()

    @cached_property
    def config(self) -> HiAConfig:
        """Return the adapter's config, with one layer."""
        hidden_size, layers = HOSTS[self.host]
        host = SimpleNamespace(hidden_size=hidden_size, num_hidden_layers=layers, model_type="llama")
        given = {"encoder": self.encoder, "position": self.position, "dim": self.dim}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.preset == "released" and hidden_size % 128:
            changes["num_heads"] = 4  # eight heads would be narrower than the op takes
        build = getattr(HiAConfig, self.preset)
        return build(host, layers="half", num_queries=self.num_queries, encoder_width=self.width, **changes)

    @property
    def hidden_size(self) -> int:
        """Return D1."""
        return HOSTS[self.host][0]

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Return the sizes of all images, sample by sample."""
        return tuple(size for images in self.samples for size in images)

    @property
    def channels(self) -> int:
        """Return C of the features."""
        return self.config.encoder_channels

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Return the dtype of the images: what most of them are saved in."""
        return torch.uint8

    @property
    def batch(self) -> int:
        """Return B, samples."""
        return len(self.samples)

    @property
    def images(self) -> int:
        """Return n, images."""
        return len(self.sizes)

    @property
    def seq_len(self) -> int:
        """Return S, tokens of the longest prompt; the others are padded to it."""
        return max(len(images) for images in self.samples) * self.visual_tokens + self.text_tokens

    @property
    def feature_lengths(self) -> list[int]:
        """Return the features of each image: N."""
        return [rows * columns for rows, columns in (halved(size, 5) for size in self.sizes)]

    @property
    def is_even(self) -> bool:
        """Tell whether all images have one size."""
        return len(set(self.sizes)) == 1

    @property
    def tokens(self) -> int:
        """Return the rows of the batch's hidden states, padding included."""
        return self.batch * self.seq_len

    @property
    def visual_runs(self) -> tuple[tuple[int, int], ...]:
        """Find the images' tokens among those rows: of each sample in one run behind a first text token."""
        starts = (sample * self.seq_len + 1 for sample in range(self.batch))
        counts = (len(images) * self.visual_tokens for images in self.samples)
        return tuple((start, start + count) for start, count in zip(starts, counts, strict=True))

    @property
    def instruction_runs(self) -> tuple[tuple[int, int], ...]:
        """Find each sample's last instruction token among those rows: behind the images and all text."""
        ends = (start + self.text_tokens - 2 for _, start in self.visual_runs)
        return tuple((row, row + 1) for row in ends)

    def attention_lengths(self, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return query and key lengths of each image for ``role`` "extract" or "inject"."""
        queries, visual = (self.num_queries,) * self.images, (self.visual_tokens,) * self.images
        return (queries, tuple(self.feature_lengths)) if role == "extract" else (visual, queries)


def _image_cases() -> list[ImageCase]:
    squares = [ImageCase(f"px{side}", ((side, side),), sets=("gpu",)) for side in RESOLUTIONS]
    return [
        *squares,
        ImageCase("px2048", ((2048, 2048),)),
        ImageCase("px2048-16bit", ((2048, 2048),), bits=16),
        ImageCase("px2048-b8", ((2048, 2048),) * 8, sets=("batch",)),
        ImageCase("px4096-b8", ((4096, 4096),) * 8, sets=("batch",)),
        ImageCase("px224", ((224, 224),), sets=("cpu",)),
        ImageCase("px-chest", (CHEST,)),
        ImageCase("px-ragged", (CHEST, PELVIS, KNEE, HAND), sets=("gpu",)),
        ImageCase("px-dicom", (DICOM_RG1, DICOM_RG3)),
        ImageCase("px-tiny", ((70, 101),), width=8, sets=("quick", "dispatch")),
        *(ImageCase(f"train-w{width}", ((192, 192),) * 20, width=width, sets=("train",)) for width in (4, 8, 16, 32)),
        ImageCase("train-w64", ((192, 192),) * 20),
    ]


def _strided_cases() -> list[ImageCase]:
    """List the cases of the training step alone."""
    sizes, sets = ((192, 192),) * 20, {64: ()}
    return [
        ImageCase("strided-tiny", ((70, 101),) * 2, width=4, encoder="strided", sets=("quick",)),
        *(
            ImageCase(f"train-strided-w{width}", sizes, width, encoder="strided", sets=sets.get(width, ("train",)))
            for width in (4, 8, 16, 32, 64)
        ),
    ]


def _square(host: str, side: int, images: int, batch: int, preset: str = "paper", *sets: str) -> LayerCase:
    kind = {"paper": host, "released": f"{host}-released", "lite": "lite"}[preset]
    name = f"{kind}-{side}" + ("-2img" if images == 2 else "") + (f"-b{batch}" if batch > 1 else "")
    return LayerCase(name, host, preset, (((side, side),) * images,) * batch, sets=sets)


def _layer_cases() -> list[LayerCase]:
    gpu = {
        ("13b", 896, 2, 1),
        ("13b", 448, 2, 1),
        ("13b", 1792, 2, 1),
        ("13b", 4096, 1, 1),
        ("13b", 896, 2, 4),
        ("7b", 896, 2, 1),
    }
    shapes = [
        (host, side, images, batch)
        for host in ("13b", "7b")
        for side in RESOLUTIONS
        for images in (1, 2)
        for batch in (1, 4)
    ]
    cases = [_square(*shape, "paper", *(("gpu",) if shape in gpu else ())) for shape in shapes]
    for side in RESOLUTIONS:
        for images in (1, 2):
            chosen = ("gpu",) if (side, images) == (896, 2) else ()
            alone = ("absorbed",) if images == 1 and side in (896, 4096) else ()
            cases.append(_square("13b", side, images, 1, "released", *chosen, *alone))
            cases.append(_square("7b", side, images, 1, "released", *chosen))
            cases.append(_square("13b", side, images, 1, "lite", *chosen, *alone))
    # 12544 features, for the attention alone
    cases += [_square("13b", 3584, 1, 1), *(_square(host, 3584, 1, 1, "released") for host in ("13b", "7b"))]
    ragged = ((CHEST, CHEST), (KNEE,), (HAND, PELVIS), (ANKLE,))
    cases += [
        LayerCase("13b-ragged-b4", "13b", "paper", ragged, sets=("gpu",)),
        LayerCase("7b-ragged-b4", "7b", "paper", ragged),
        LayerCase("13b-ragged-2img", "13b", "paper", ((FOOT, HAND),)),
        LayerCase("lite-ragged-b4", "13b", "lite", ragged),
    ]
    return cases + _small_cases()


def _small_cases() -> list[LayerCase]:
    tiny = {"host": "tiny", "num_queries": 8, "visual_tokens": 4, "text_tokens": 6, "width": 4}
    pair = (((448, 448), (448, 448)),)
    return [
        LayerCase("small-224", "small", "paper", (((224, 224),),), sets=("encoded",)),
        LayerCase("small-released-224", "small", "released", (((224, 224),),), sets=("encoded",)),
        LayerCase("small-448-2img", "small", "paper", pair, sets=("cpu",)),
        LayerCase("small-released-448-2img", "small", "released", pair, sets=("cpu",)),
        LayerCase("small-896-2img", "small", "paper", (((896, 896), (896, 896)),)),
        LayerCase("small-ragged-b2", "small", "paper", (((478, 366), (521, 668)), ((478, 266),)), sets=("cpu",)),
        LayerCase("tiny", preset="paper", samples=(((64, 64), (64, 64)),), sets=("quick", "dispatch"), **tiny),
        LayerCase("tiny-ragged", preset="paper", samples=(((64, 100), (70, 64)), ((33, 64),)), sets=("quick",), **tiny),
        LayerCase("tiny-released", preset="released", samples=(((64, 64), (64, 64)),), sets=("quick",), **tiny),
    ]


IMAGES: tuple[ImageCase, ...] = tuple(_image_cases())
SINGLE_IMAGES = tuple(case for case in IMAGES if len(case.sizes) == 1)  # the encoder runs one image at a time
LAYERS: tuple[LayerCase, ...] = tuple(_layer_cases())
# with the many narrow heads of the paper's preset absorbing a projection costs more than it saves
ABSORBING = tuple(case for case in LAYERS if case.preset != "paper" or case.host == "tiny")
TRAINED_IMAGES = (*IMAGES, *_strided_cases())
CASES: dict[str, ImageCase | LayerCase] = {case.name: case for case in (*TRAINED_IMAGES, *LAYERS)}


def in_plain_set(case: LayerCase, _role: str, name: str) -> bool:
    """Tell whether an op's run without ``--case`` has it: to most ops, ragged cases and the released preset are other
    numbers of rows, nothing more."""
    return name in case.sets and case.is_even and case.preset != "released"


def in_absorbing_set(case: LayerCase, _role: str, name: str) -> bool:
    """Tell the same of an op of the attention with absorbed projections, whose "gpu" set is "absorbed"."""
    return ("absorbed" if name == "gpu" else name) in case.sets


def limited_on_cpu(in_set: InSet, *roles: str) -> InSet:
    """Return ``in_set`` with those roles alone on the CPU, which has no time for all."""
    return lambda case, role, name: in_set(case, role, name) and (name != "cpu" or role in roles)
