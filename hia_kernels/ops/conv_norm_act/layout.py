"""Layouts: how the rows of the table want weights that are packed for many calls."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

PACK = "conv_norm_act_pack"  # the function of a row by which it packs a weight: its Layout
PACKED = ("conv_norm_act_packed", "conv_norm_act_packed_", "conv_norm_act_packed_out")  # those that take packed weights


class Layout(ABC):
    """A way to pack weights, for one row of the table: an object of it is that row's function :data:`PACK`.

    Attributes:
        name: told apart from other layouts by it.
        by_size: whether images of different sizes take differently packed weights.
        writes_out: whether ``conv_norm_act_packed_out`` writes where it is told to, instead of copying there.
    """

    name: str
    by_size: bool
    writes_out: bool

    @abstractmethod
    def __call__(self, weight: Tensor, scale: Tensor, stride: int, size: tuple[int, int], pad_rows: bool) -> Tensor:
        """Fold the scale into a weight and lay it out.

        Args:
            weight:   [OC, C, K, K].
            scale:    [OC].
            stride:   of the convolution.
            size:     of the images.
            pad_rows: whether there are rows of zeros above and below them.
        """

    @abstractmethod
    def nbytes(self, weight: Tensor, stride: int) -> int:
        """Return the bytes of a packed weight [OC, C, K, K]."""

    def describe(self, packed: Tensor) -> bytes:
        """Return what is equal for interchangeable results of one weight; empty if that can't be told."""
        return self.name.encode()
