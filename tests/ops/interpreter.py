"""Triton's interpreter with a NumPy that it does not know yet."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def loop_bounds_are_ints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 holds a scalar as an array of one element, which NumPy 2.4 no longer takes for a loop's bound."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
