"""Fixtures of tests in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest

from hia_kernels.core import triton_support


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every element of an interpreted ``tl.dot`` add its products in order, wherever it is in the tile.

    For tests that compare the bits of rows at different places of a tile: the bits of NumPy's BLAS, which the
    interpreter calls, depend on the place and on the processor. On a GPU this changes nothing.
    """
    if not triton_support.interpreted():
        return

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
        return total

    monkeypatch.setattr("triton.runtime.interpreter.np.matmul", matmul)
