"""Reshaping of results without making them views, which autograd forbids to be written to behind a custom op."""

from __future__ import annotations

from torch import Tensor


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """Return the memory of ``x`` as a tensor of its own, and copy nothing.

    For what a library has just made and nobody else holds. The caller must drop ``x``: autograd does not know that the
    two share memory.

    Args:
        x: contiguous.
        shape: of as many elements.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape)


def channels_last(y: Tensor) -> Tensor:
    """Return [N, C, H, W] as [N, H, W, C], contiguous, as :func:`reshaped`; copied where it does not lie like that."""
    y = y.permute(0, 2, 3, 1).contiguous()
    return reshaped(y, *y.shape)
