"""Repair of Triton's interpreter (``TRITON_INTERPRET=1``), which Triton 3.6 ships broken for NumPy 2.4."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

FIXED_IN = (3, 7)


@cache
def repair() -> None:
    """Let the interpreter read its scalars as indices, whatever NumPy there is; for this process, once.

    Triton before 3.7 keeps a scalar as an array of one element and converts it by ``int(array)``, which is a TypeError
    from NumPy 2.4 on: every kernel with a loop of a bound that is no constant fails ("only 0-dimensional arrays can be
    converted to Python scalars"; https://github.com/triton-lang/triton/issues/9171, mended by pull request 9172).
    """
    triton = importlib.import_module("triton")
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= FIXED_IN:
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
