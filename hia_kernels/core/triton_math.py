"""Device functions that the kernels of several ops share. Imports Triton, as only ``triton_*.py`` files may."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_support import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def dot(a, b, acc):
    """Compute acc + a @ b, accumulated in fp32; fp32 operands as they are, never TF32."""
    if INTERPRETED:  # its bf16 product is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
