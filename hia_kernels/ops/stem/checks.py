"""Contracts of ``hia::stem``, its backward and ``hia::stem_packed``."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isqrt
from typing import Any

import torch

from ...core import varlen
from ...core.checks import FLOATS, PIXELS, Arg, Contract, check_choice, like, statistics

KERNELS = (3, 7)
POOLS = (1, 3)

_FP32 = (torch.float32,)
_STATISTICS = {
    "mean": Arg("3", _FP32),
    "std": Arg("3", _FP32),
    "weight": Arg("OC 3 K K", FLOATS),
    "scale": statistics("weight", "OC"),
    "shift": statistics("weight", "OC"),
}
_IMAGES = {"pixels": Arg("N IH IW CP", PIXELS), "window": Arg("N 2", _FP32)}
_INPUTS = {**_IMAGES, **_STATISTICS}


def reach(kernel: int, pool: int) -> int:
    """Return the pixels along an axis that one output looks at."""
    return kernel + 2 * (pool - 1)


def _half(size: int) -> int:
    return (size - 1) // 2 + 1  # of any odd kernel with stride 2 and padding K // 2


def output_size(size: int, pool: int) -> int:
    """Return the outputs along an axis of so many pixels."""
    return _half(_half(size)) if pool == 3 else _half(size)


class _Weights(Contract):
    """The contract of a stem's weights: no result is empty for want of channels."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().__call__(arguments)
        if sizes["OC"] < 1:
            raise ValueError(f"hia::{self.op}: weight must have at least one channel out, got none")
        return sizes


class _Stem(_Weights):
    """The contract of a stem: kernel, pool, and the sizes that follow from them."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        pool = arguments["pool"]
        check_choice(self.op, "pool", pool, POOLS)
        sizes = super().__call__(arguments)
        kernel = sizes["K"] if "K" in sizes else isqrt(sizes["taps"]) - 1
        check_choice(self.op, "weight's K", kernel, KERNELS)
        if "taps" in sizes and (sizes["taps"] != (kernel + 1) ** 2 or not arguments["taps"].is_contiguous()):
            taps = arguments["taps"]
            raise ValueError(
                f"hia::{self.op}: taps must be pack_stem's, contiguous with {(kernel + 1) ** 2} of K={kernel},"
                f" got shape {list(taps.shape)} and strides {list(taps.stride())}"
            )
        check_choice(self.op, "pixels' channels", sizes["CP"], (1, 3))
        height, width, least = sizes["IH"], sizes["IW"], reach(kernel, pool)
        if min(height, width) < least:
            raise ValueError(
                f"hia::{self.op}: pixels must be at least {least} x {least}, the stem's reach, got {height} x {width}; "
                "resize or pad the image"
            )
        expected = [output_size(height, pool), output_size(width, pool)]
        if "PH" in sizes and [sizes["PH"], sizes["PW"]] != expected:
            got = [sizes["PH"], sizes["PW"]]
            raise ValueError(f"hia::{self.op}: dout must have the output's size {expected}, got {got}")
        return sizes


check = _Stem("stem", **_INPUTS)
check_bwd = _Stem(
    "stem_bwd", **_INPUTS, dout=like("weight", "N PH PW OC"), out=like("weight", "N PH PW OC", optional=True)
)
check_pack = _Weights("stem_packed", **_STATISTICS)
check_packed = _Stem(
    "stem_packed",
    **_IMAGES,
    mean=_STATISTICS["mean"],
    std=_STATISTICS["std"],
    taps=Arg("5 taps OC", FLOATS),
    scale=statistics("taps", "OC"),
    shift=statistics("taps", "OC"),
)


def check_values(op: str, window: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, **rest: Any) -> None:
    """Check the window, and what pixels are normalised by."""
    if not varlen.check_values_now(window):
        return
    for image, (low, high) in enumerate(window.tolist()):
        if not 0 < abs(high - low) < inf:
            raise ValueError(
                f"hia::{op}: window must hold two different finite values per image, got ({low}, {high}) "
                f"for image {image}"
            )
    if not all(abs(value) < inf for value in mean.tolist()):
        raise ValueError(f"hia::{op}: mean must be finite, got {mean.tolist()}")
    if not all(0 < value < inf for value in std.tolist()):
        raise ValueError(f"hia::{op}: std must be finite and positive, got {std.tolist()}")
