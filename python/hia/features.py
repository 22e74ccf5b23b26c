"""Encoded images: computed once, asked many questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hia_kernels.core.varlen import cu_seqlens_from_lengths

from .extractor import PackedFeatures


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, as :meth:`hia.HiAModel.encode_images` returns them. They depend on the image alone.

    Attributes:
        maps: one [H', W', C] per image.
    """

    maps: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    @property
    def nbytes(self) -> int:
        """Bytes the features occupy."""
        return sum(features.nbytes for features in self.maps)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageFeatures:
        """On another device, or in another dtype."""
        return ImageFeatures(tuple(features.to(device=device, dtype=dtype) for features in self.maps))

    def select(self, images: Iterable[int]) -> ImageFeatures:
        """Some of the images, in the order asked for; one may be named twice."""
        return ImageFeatures(tuple(self.maps[image] for image in images))

    @staticmethod
    def cat(parts: Iterable[ImageFeatures]) -> ImageFeatures:
        """Several sets of images as one."""
        return ImageFeatures(tuple(features for part in parts for features in part.maps))

    def packed(self) -> PackedFeatures:
        """All images' tokens in one tensor."""
        lengths = [features.shape[0] * features.shape[1] for features in self.maps]
        tokens = torch.cat([features.flatten(0, 1) for features in self.maps])
        return PackedFeatures(tokens, cu_seqlens_from_lengths(lengths, tokens.device), max(lengths))
