"""cuDNN's convolution, then norm, residual and activation in one pass over its result.

Not PyTorch's ``cudnn_convolution_relu`` and ``cudnn_convolution_add_relu``: docs/conv_norm_act.md says why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import triton_support, tuning
from ...core.fresh import channels_last

OP = "conv_norm_act"
MAX_ELEMENTS = 2**31 - 1  # of a tensor that cuDNN counts in 32 bits
_epilogue = triton_support.lazy("hia_kernels.ops.conv_norm_act.triton_fwd", "epilogue")


def unavailable_reasons() -> list[str]:
    """Return why this machine has no cuDNN, or not what goes with it."""
    found = triton_support.unavailable_reasons()  # the last pass and the backward are Triton's
    if torch.version.hip or not torch.backends.cudnn.is_available():
        found.append("this build of torch has no cuDNN")
    elif not torch.backends.cudnn.enabled:
        found.append("torch.backends.cudnn.enabled is off")
    return found


def unsupported_reasons(function: str, x: Tensor, weight: Tensor, stride: int, **rest: Any) -> list[str]:
    """Return why these inputs can't run."""
    found = triton_support.device_reasons(x)
    if found:
        return found
    n, ih, iw, c = x.shape
    out = n * ((ih - 1) // stride + 1) * ((iw - 1) // stride + 1) * weight.shape[0]
    for name, elements in (("x", x.numel()), ("the result", out)):
        if elements > MAX_ELEMENTS:
            found.append(f"{name} must have at most {MAX_ELEMENTS} elements, got {elements}")
    if c == 0:
        found.append("x must have channels, got 0")
    return found


def backend_key(x: Tensor, weight: Tensor, stride: int) -> str:
    """Return what a measurement of backends holds for: sizes of one image, so that no neighbour changes its bits."""
    pixels = ((x.shape[1] - 1) // stride + 1) * ((x.shape[2] - 1) // stride + 1)
    sizes = f"px{tuning.bucket(pixels)}-c{weight.shape[1]}-oc{weight.shape[0]}"
    return f"k{weight.shape[2]}s{stride}-{sizes}-{str(x.dtype).removeprefix('torch.')}"


def slower_reasons(function: str, x: Tensor, weight: Tensor, stride: int, **rest: Any) -> list[str]:
    """Return why ``auto`` takes the next row: unless it was measured to be slower at this shape, on this device."""
    key = backend_key(x, weight, stride)
    best = tuning.measured_backend(OP, key, x.device)
    return [] if best == "cudnn" else [f"{best} was faster at {key}" if best else f"nothing was measured at {key}"]


def conv_norm_act_fwd(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, stride: int, activation: str
) -> Tensor:
    """Return [N, OH, OW, OC], dtype of ``x``; y is rounded to it, as in the reference."""
    n, ih, iw, _ = x.shape
    if n == 0 or weight.shape[0] == 0:
        return x.new_empty(n, (ih - 1) // stride + 1, (iw - 1) // stride + 1, weight.shape[0])
    padding = [weight.shape[2] // 2] * 2
    # contiguous channels make it PyTorch's channels-last memory format, seen as [N, C, IH, IW]
    x, weight = x.contiguous(), weight.contiguous(memory_format=torch.channels_last)
    y = torch.cudnn_convolution(
        x.permute(0, 3, 1, 2),
        weight,
        padding,
        [stride, stride],
        [1, 1],
        1,
        benchmark=False,
        deterministic=True,
        allow_tf32=False,
    )
    return _epilogue(channels_last(y), scale, shift, residual, activation)
