"""Encoded images: computed once, asked many questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hia_kernels.core.varlen import cu_seqlens_from_lengths

from .extractor import PackedFeatures, Side
from .folded import Stamp


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, as :meth:`hia.HiAModel.encode_images` returns them. They depend on the image alone.

    Attributes:
        maps: one [H', W', C] per image.
        sides: by image and decoder layer, what ``encode_images(keep=...)`` kept for later questions; empty, or one
            dict an image. They are used as long as no gradient is recorded and the weights stay as they were.
    """

    maps: tuple[Tensor, ...]
    sides: tuple[dict[int, Side], ...] = ()

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    @property
    def nbytes(self) -> int:
        """Bytes that the features and what was kept with them occupy."""
        kept = sum(side.tokens.nbytes for sides in self.sides for side in sides.values())
        return kept + sum(features.nbytes for features in self.maps)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageFeatures:
        """On another device, or in another dtype."""

        def moved(sides: dict[int, Side]) -> dict[int, Side]:
            return {
                layer: Side(side.kind, side.tokens.to(device=device, dtype=dtype), side.stamp)
                for layer, side in sides.items()
            }

        maps = tuple(features.to(device=device, dtype=dtype) for features in self.maps)
        return ImageFeatures(maps, tuple(moved(sides) for sides in self.sides))

    def select(self, images: Iterable[int]) -> ImageFeatures:
        """Some of the images, in the order asked for; one may be named twice."""
        images = list(images)
        sides = tuple(self.sides[image] for image in images) if self.sides else ()
        return ImageFeatures(tuple(self.maps[image] for image in images), sides)

    @staticmethod
    def cat(parts: Iterable[ImageFeatures]) -> ImageFeatures:
        """Several sets of images as one."""
        parts = list(parts)
        kept = [part.sides or ({},) * len(part) for part in parts]
        sides = tuple(side for sides in kept for side in sides) if any(part.sides for part in parts) else ()
        return ImageFeatures(tuple(features for part in parts for features in part.maps), sides)

    def packed(self, stamps: Mapping[int, Stamp] | None = None) -> PackedFeatures:
        """All images' tokens in one tensor, and of what was kept the layers that all images have.

        Args:
            stamps: by decoder layer, the versions its parameters have now: what was kept with others is left out. A
                compiled layer can't tell. None: an extractor passes over it by itself.
        """
        lengths = tuple(features.shape[0] * features.shape[1] for features in self.maps)
        tokens = _joined([features.flatten(0, 1) for features in self.maps])
        cu_seqlens = cu_seqlens_from_lengths(lengths, tokens.device)
        return PackedFeatures(tokens, cu_seqlens, max(lengths), lengths, self._packed_sides(stamps))

    def _packed_sides(self, stamps: Mapping[int, Stamp] | None) -> dict[int, Side]:
        found = {}
        for layer, first in self.sides[0].items() if self.sides else ():
            if stamps is not None and stamps.get(layer) != first.stamp:
                continue
            own = [sides.get(layer) for sides in self.sides]
            alike = [side for side in own if side is not None and (side.kind, side.stamp) == (first.kind, first.stamp)]
            if len(alike) == len(own):
                found[layer] = Side(first.kind, _joined([side.tokens for side in alike]), first.stamp)
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
