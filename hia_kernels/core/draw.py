"""Seeded random tensors, from which every op's ``inputs.py`` draws its arguments.

Works under ``FakeTensorMode`` too: no drawn value is read back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALL = 2**20  # elements up to which a tensor is drawn on the CPU, whatever its device
MARGIN = 8  # elements of padding on either side of a strided tensor's row

# Rows of a packed tensor: a number drawn at random, or the runs (first, end) in order.
Rows = int | tuple[tuple[int, int], ...]


def row_count(rows: Rows) -> int:
    """Count the rows that are chosen."""
    return rows if isinstance(rows, int) else sum(stop - start for start, stop in rows)


def root_scale(terms: int) -> float:
    """Return the deviation of weights whose sums over so many terms are of about 1; 1 where there are none."""
    return max(terms, 1) ** -0.5


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scales, shifts and scores that go with tensors of ``dtype``: fp32, fp64 with fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Draw:
    """Random tensors of one seed, dtype and device.

    Up to :data:`SMALL` elements are drawn on the CPU in fp64 and rounded, so every dtype and device sees the same
    numbers. Larger tensors are drawn on the device itself, normal ones in their own dtype: doing so on the CPU would
    take longer than measuring.

    Args:
        dtype: of floating tensors.
        device: of all tensors.
        seed: of the random numbers.
        strided: whether :meth:`data` returns views of something wider.
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, strided: bool = False) -> None:
        self.dtype, self.device, self.strided = dtype, device, strided
        self.statistics = statistics_dtype(dtype)
        self._seed = seed
        self._on_cpu = torch.Generator().manual_seed(seed)
        self._on_device: torch.Generator | None = None

    def _large(self) -> torch.Generator:
        if self._on_device is None:
            self._on_device = torch.Generator(self.device).manual_seed(self._seed)
        return self._on_device

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw normal numbers of deviation ``scale``: contiguous, of the drawing's dtype unless one is given."""
        dtype = dtype or self.dtype
        if math.prod(shape) > SMALL:
            return torch.randn(shape, generator=self._large(), device=self.device, dtype=dtype).mul_(scale).add_(mean)
        values = torch.randn(shape, generator=self._on_cpu, dtype=torch.float64) * scale + mean
        return values.to(self.device, dtype)

    def data(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Draw what flows through an op, as :meth:`normal`; where strided tensors are asked for, its rows are longer
        than its last dim and begin after a storage offset, as a slice of a fused projection does."""
        if not self.strided:
            return self.normal(*shape, scale=scale, mean=mean, dtype=dtype)
        wide = self.normal(*shape[:-1], shape[-1] + 2 * MARGIN, scale=scale, mean=mean, dtype=dtype)
        return wide[..., MARGIN : MARGIN + shape[-1]]

    def uniform(self, *shape: int, top: float, dtype: torch.dtype) -> Tensor:
        """Draw numbers from 0 to ``top`` and convert them to ``dtype``: pixels."""
        if math.prod(shape) > SMALL:
            values = torch.rand(shape, generator=self._large(), device=self.device, dtype=torch.float32)
        else:
            values = torch.rand(shape, generator=self._on_cpu, dtype=torch.float64)
        return (values * top).to(dtype).to(self.device)

    def near_one(self, *shape: int) -> Tensor:
        """Draw a norm's scales: around 1, in fp32 (fp64 with fp64)."""
        return self.normal(*shape, scale=0.25, mean=1.0, dtype=self.statistics)

    def row_idx(self, rows: Rows, total: int, *, unique: bool) -> Tensor:
        """Draw or list row indices of a tensor of ``total`` rows.

        Args:
            rows: how many are drawn, or the runs that are listed.
            total: rows there are.
            unique: draw no row twice.

        Returns:
            [R] int64 in ``[0, total)``.
        """
        if not isinstance(rows, int):
            index = torch.cat([torch.arange(0), *(torch.arange(start, stop) for start, stop in rows)])
        elif unique:
            index = torch.randperm(total, generator=self._on_cpu)[:rows]
        else:
            index = torch.randint(max(total, 1), (rows,), generator=self._on_cpu)
        return index.to(self.device)
