"""Encoded images: computed once, asked many questions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hia_kernels.core.varlen import cu_seqlens_from_lengths

from ..versions import WeightVersion
from .plan import EXTRA_COLUMNS
from .shared import SharedProjection


@dataclass(frozen=True)
class LayerCache:
    """Results of a layer that depend on images alone, kept for later questions.

    Attributes:
        kind: "folded": projected and normed features; "kv": keys and values.
        tokens: [T, D] or [T, 2 * D].
        version: of the parameters it was made with.
    """

    kind: str
    tokens: Tensor
    version: WeightVersion

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LayerCache:
        """Copy to another device or dtype."""
        return replace(self, tokens=self.tokens.to(device=device, dtype=dtype))


@dataclass(frozen=True)
class PackedFeatures:
    """Features of several images, one after the other.

    Attributes:
        tokens: [T, C] as the encoder gives them, image i in rows cu_seqlens[i]:cu_seqlens[i + 1].
        cu_seqlens: [n + 1] int32.
        max_seqlen: tokens of the largest image.
        lengths: tokens of each image.
        caches: by decoder layer, what was kept of these images.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]
    caches: dict[int, LayerCache] = field(default_factory=dict)
    _memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> PackedFeatures:
        """Copy to another device; return itself if it is there already."""
        if self.tokens.device == device:
            return self
        caches = {layer: cache.to(device) for layer, cache in self.caches.items()}
        # what was made before the layers goes along: one that is run again by checkpointing must not make it anew
        memo = {name: made.to(device) for name, made in self._memo.items()}
        tokens, cu_seqlens = self.tokens.to(device), self.cu_seqlens.to(device)
        return PackedFeatures(tokens, cu_seqlens, self.max_seqlen, self.lengths, caches, memo)

    def shared(self, projection: SharedProjection) -> Tensor:
        """Return [T, D1]: the released maths' projection, computed once for all layers that share it."""
        if "shared" not in self._memo:
            self._memo["shared"] = projection(self.tokens)
        return self._memo["shared"]

    def widened(self) -> Tensor:
        """Return [T, C + 16]: a column of ones behind the features, then zeros."""
        if "widened" not in self._memo:
            pad = self.tokens.new_zeros(self.tokens.shape[0], EXTRA_COLUMNS)
            pad[:, 0] = 1
            self._memo["widened"] = torch.cat([self.tokens, pad], dim=1)
        return self._memo["widened"]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, as :meth:`hia.HiAModel.encode_images` returns them. They depend on the image alone.

    Attributes:
        maps: one [H', W', C] per image.
        caches: by image and decoder layer, what ``encode_images(keep=...)`` kept for later questions; empty, or one
            dict an image. They are used as long as no gradient is recorded and the weights stay as they were.
    """

    maps: tuple[Tensor, ...]
    caches: tuple[dict[int, LayerCache], ...] = ()

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.maps)

    @property
    def nbytes(self) -> int:
        """Count the bytes that the features and what was kept with them occupy."""
        kept = sum(cache.tokens.nbytes for caches in self.caches for cache in caches.values())
        return kept + sum(features.nbytes for features in self.maps)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ImageFeatures:
        """Copy to another device or dtype."""
        maps = tuple(features.to(device=device, dtype=dtype) for features in self.maps)
        caches = ({layer: cache.to(device, dtype) for layer, cache in caches.items()} for caches in self.caches)
        return ImageFeatures(maps, tuple(caches))

    def select(self, images: Iterable[int]) -> ImageFeatures:
        """Take some of the images, in the order asked for; one may be named twice."""
        images = list(images)
        caches = tuple(self.caches[image] for image in images) if self.caches else ()
        return ImageFeatures(tuple(self.maps[image] for image in images), caches)

    @staticmethod
    def cat(parts: Iterable[ImageFeatures]) -> ImageFeatures:
        """Join several sets of images."""
        parts = list(parts)
        kept = [part.caches or ({},) * len(part) for part in parts]
        caches = tuple(cache for caches in kept for cache in caches) if any(part.caches for part in parts) else ()
        return ImageFeatures(tuple(features for part in parts for features in part.maps), caches)

    def packed(self, versions: Mapping[int, WeightVersion] | None = None) -> PackedFeatures:
        """Join all images' tokens in one tensor, and what was kept in those layers that all images have.

        Args:
            versions: by decoder layer, those that its parameters have now: what was kept with others is left out.
                None takes all that was kept.
        """
        lengths = tuple(features.shape[0] * features.shape[1] for features in self.maps)
        tokens = _joined([features.flatten(0, 1) for features in self.maps])
        cu_seqlens = cu_seqlens_from_lengths(lengths, tokens.device)
        return PackedFeatures(tokens, cu_seqlens, max(lengths), lengths, self._packed_caches(versions))

    def _packed_caches(self, versions: Mapping[int, WeightVersion] | None) -> dict[int, LayerCache]:
        found = {}
        for layer, first in self.caches[0].items() if self.caches else ():
            if versions is not None and versions.get(layer) != first.version:
                continue
            own = [caches[layer] for caches in self.caches if layer in caches]
            if len(own) == len(self.caches) and all(
                (cache.kind, cache.version) == (first.kind, first.version) for cache in own
            ):
                found[layer] = LayerCache(first.kind, _joined([cache.tokens for cache in own]), first.version)
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
