"""Triton's interpreter with a NumPy that it does not know yet."""

from __future__ import annotations

import numpy as np
import pytest

from hia_kernels.core import triton_support


@pytest.fixture(autouse=True)
def loop_bounds_are_ints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 holds a scalar as an array of one element, which NumPy 2.4 no longer takes for a loop's bound."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture
def products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of an interpreted ``tl.dot`` adds its products in their order, wherever it is in the tile.

    For tests that compare bits of rows at different places of a tile: of NumPy's BLAS, which the interpreter calls,
    the bits depend on the place, and on which processor it finds. On a GPU this changes nothing.
    """
    if not triton_support.interpreted():
        return

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        total = np.zeros((a.shape[0], b.shape[1]), dtype)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(dtype) * b[k].astype(dtype)
        return total

    monkeypatch.setattr("triton.runtime.interpreter.np.matmul", matmul)
