"""Versions of weights: what was made from weights is theirs as long as their version is the same."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

WeightVersion = tuple[tuple[int, int, str, str], ...]


def weight_version_of(tensors: Iterable[Tensor]) -> WeightVersion:
    """Name the present state of some tensors: it changes when one of them is written to, replaced, cast or moved.

    A write through ``parameter.data`` is the exception: PyTorch doesn't count those.
    """
    return tuple(
        (0 if isinstance(x, FakeTensor) or x.is_meta else x.data_ptr(), x._version, str(x.dtype), str(x.device))
        for x in tensors
    )
