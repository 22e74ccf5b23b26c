"""The device's limits, measured in the same run as what it is compared with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..records.devices import torch_dtype
from .timing import CudaClock, cpu_clock

COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2 * 2**30}
SQUARE = {"cpu": 1536, "cuda": 8192}
QUICK_COPY_BYTES, QUICK_SQUARE = 16 * 2**20, 256
REPEATS = 7


@dataclass(frozen=True)
class Limits:
    """The best of a few repetitions each.

    Attributes:
        bandwidth: bytes a second of a large copy, read and written bytes added.
        rates: FLOPs a second by dtype, of a large square matrix product; on the CPU of a 3 x 3 convolution if that is
            faster, since the two come from different libraries there.
    """

    bandwidth: float
    rates: dict[str, float] = field(default_factory=dict)

    def roofline_ms(self, flops: int, moved: int, dtype: str) -> float:
        """Return max(bytes / bandwidth, FLOPs / rate), milliseconds."""
        return 1e3 * max(moved / self.bandwidth, flops / self.rates[dtype])

    def to_dict(self) -> dict[str, Any]:
        """Return them for a record's environment: GB/s and GFLOP/s."""
        return {
            "bandwidth_gb_per_s": round(self.bandwidth / 1e9, 2),
            "gemm_gflop_per_s": {name: round(rate / 1e9, 1) for name, rate in self.rates.items()},
        }


def measure(device: str, dtypes: Iterable[str], *, quick: bool = False) -> Limits:
    """Measure the device's limits.

    Args:
        device: "cpu" or "cuda".
        dtypes: "fp32", "bf16", "fp16".
        quick: small sizes, for smoke tests; what fits in a cache is no limit of the memory.
    """
    clock = CudaClock() if device == "cuda" else cpu_clock
    size = QUICK_COPY_BYTES if quick else COPY_BYTES[device]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(clock(lambda: target.copy_(source), 1) for _ in range(REPEATS))
    rates = {
        name: _rate(device, torch_dtype(name), QUICK_SQUARE if quick else SQUARE[device], clock) for name in dtypes
    }
    return Limits(2 * size / (best / 1e3), rates)


def _rate(device: str, dtype: torch.dtype, side: int, clock: Any) -> float:
    """Measure FLOPs a second, with random values: on GPUs zeros draw less power and run faster."""
    if device == "cpu" and dtype != torch.float32:
        side = min(side, 512)  # without instructions for it, a large product takes minutes
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best = min(clock(lambda: torch.mm(a, b, out=out), 1) for _ in range(REPEATS))
    rate = 2 * side**3 / (best / 1e3)
    return max(rate, _convolution_rate(side // 6, dtype, clock)) if device == "cpu" else rate


def _convolution_rate(channels: int, dtype: torch.dtype, clock: Any) -> float:
    """Measure FLOPs a second of a 3 x 3 convolution as ResNet-50 has them, channels last."""
    image = torch.randn(1, channels, 56, 56).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        torch.conv2d(image, kernel, padding=1)
        best = min(clock(lambda: torch.conv2d(image, kernel, padding=1), 1) for _ in range(REPEATS))
    return 2 * 9 * channels**2 * 56 * 56 / (best / 1e3)
