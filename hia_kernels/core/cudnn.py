"""cuDNN as the ops use it: deterministic, and fp32 in fp32, whatever PyTorch's global switches say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import onednn

_precision = torch._C._get_fp32_precision_getter  # what holds, inherited or not
_set_precision = torch._C._set_fp32_precision_setter


@contextmanager
def exact() -> Iterator[None]:
    """Make convolutions inside take deterministic algorithms that nothing chose by timing, and no TF32.

    PyTorch has two switches for TF32, ``cudnn.allow_tf32`` (on by default) and ``cudnn.conv.fp32_precision``, and
    refuses to read the first once they disagree: both are turned off together and come back as they were.
    """
    # not through torch.backends: its setters refuse where an application has frozen the global flags
    deterministic, benchmark = torch._C._get_cudnn_deterministic(), torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_deterministic(True)
    torch._C._set_cudnn_benchmark(False)
    switched = _switch_tf32_off()
    try:
        yield
    finally:
        _switch_tf32_on(switched)
        torch._C._set_cudnn_deterministic(deterministic)
        torch._C._set_cudnn_benchmark(benchmark)


def _switch_tf32_off() -> tuple[str, ...]:
    """Switch TF32 off; return the kinds of layers that were switched, two if the old switch was."""
    if _precision("cuda", "conv") != "tf32":
        return ()
    try:
        kinds = ("conv", "rnn") if torch._C._get_cudnn_allow_tf32() else ("conv",)
    except RuntimeError:  # the caller has set the new switch alone
        kinds = ("conv",)
    if len(kinds) == 2:
        torch._C._set_cudnn_allow_tf32(False)
    for kind in kinds:
        _set_precision("cuda", kind, "ieee")
    return kinds


def _switch_tf32_on(kinds: tuple[str, ...]) -> None:
    if len(kinds) == 2:
        torch._C._set_cudnn_allow_tf32(True)  # sets both kinds
    elif kinds:
        _set_precision("cuda", "conv", "none")
        if _precision("cuda", "conv") != "tf32":  # it was not inherited
            _set_precision("cuda", "conv", "tf32")


def convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, output_mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Compute dx and dweight of a convolution with padding ``K // 2``, without a bias.

    Args:
        dy: [N, OH, OW, OC].
        x: [N, IH, IW, C].
        weight: [OC, C, K, K].
        stride: in pixels.
        output_mask: which of the two are wanted; the others are None.
    """
    padding = [weight.shape[-1] // 2] * 2
    with exact():
        if x.device.type == "cpu":  # under Triton's interpreter
            return onednn.convolution_backward(dy, x, weight, stride, output_mask)
        dx, dweight = onednn.pytorchs_backward(dy, x, weight, stride, padding, output_mask)
    return dx.contiguous() if output_mask[0] else None, dweight.contiguous() if output_mask[1] else None
