"""Workarounds for Triton's interpreter with a newer NumPy than it supports."""

from __future__ import annotations

import numpy as np
import pytest

from hia_kernels.core import triton_support


@pytest.fixture(autouse=True)
def loop_bounds_are_ints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convert loop bounds: Triton 3.6 keeps a scalar as an array of one element, which NumPy 2.4 rejects as a bound."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


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
