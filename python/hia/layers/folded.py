"""Weights folded once for inference: exact up to rounding, beside the parameters, never in a state_dict.

The parameters stay as they are; what is made here remembers which versions of them it was made from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hia_kernels

from ..versions import WeightVersion
from .plan import EXTRA_COLUMNS


@dataclass(frozen=True, eq=False)
class FoldedExtractor:
    """The folded weights of one layer's extractor; E = C + 16: the features, a column of ones, zeros.

    They are equal to themselves alone.

    Attributes:
        version: of the parameters that they were made from.
        fold_weight: [D, C], both projections of the released maths as one; that projection itself without them.
        fold_bias: [D].
        root: [min(D, E), E] with ``|root z|^2`` the variance of the projected token that LayerNorm divides by.
        kv_weight: [2 * D, E], from normed features straight to keys and values.
        kv_bias: [2 * D].
    """

    version: WeightVersion
    fold_weight: Tensor
    fold_bias: Tensor
    root: Tensor
    kv_weight: Tensor
    kv_bias: Tensor

    @property
    def nbytes(self) -> int:
        """Count the bytes they occupy."""
        tensors = (self.fold_weight, self.fold_bias, self.root, self.kv_weight, self.kv_bias)
        return sum(tensor.nbytes for tensor in tensors)


@torch.no_grad()
def fold_extractor(
    projection: nn.Linear,
    norm: nn.LayerNorm,
    kv_proj: nn.Linear,
    version: WeightVersion,
    shared: nn.Linear | None = None,
) -> FoldedExtractor:
    """Fold in fp32 (fp64 for fp64 parameters) and round once (docs/plans.md, "LayerNorm folded away").

    Args:
        projection: C -> D, or D1 -> D behind ``shared``.
        norm: of the projected features.
        kv_proj: D -> 2 D.
        version: of all their parameters.
        shared: C -> D1 of the released maths.
    """
    dtype, device = projection.weight.dtype, projection.weight.device
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = projection.weight.to(exact), projection.bias.to(exact)
    if shared is not None:
        shared_weight, shared_bias = (p.to(device, exact) for p in (shared.weight, shared.bias))
        weight, bias = hia_kernels.linear(weight, shared_weight.mT), torch.addmv(bias, weight, shared_bias)
    channels = weight.shape[1]
    columns = torch.zeros(weight.shape[0], channels + EXTRA_COLUMNS, dtype=exact, device=device)  # [D, E]
    columns[:, :channels] = weight
    columns[:, channels] = bias
    centred = columns - columns.mean(0)  # LayerNorm's centring is linear, so it is part of the weight
    kv_weight = kv_proj.weight.to(exact)
    return FoldedExtractor(
        version=version,
        fold_weight=weight.to(dtype),
        fold_bias=bias.to(dtype),
        root=_root(centred * weight.shape[0] ** -0.5).to(dtype),
        kv_weight=hia_kernels.linear(kv_weight * norm.weight.to(exact), centred.mT).to(dtype),
        kv_bias=torch.addmv(kv_proj.bias.to(exact), kv_weight, norm.bias.to(exact)).to(dtype),
    )


def folding_bytes(projection: nn.Linear, kv_proj: nn.Linear, channels: int) -> int:
    """Count the bytes that :func:`fold_extractor` takes at its peak, its result included.

    Args:
        projection: as there.
        kv_proj: as there.
        channels: C.
    """
    dtype, dim = projection.weight.dtype, projection.weight.shape[0]
    exact, wide = 8 if dtype == torch.float64 else 4, channels + EXTRA_COLUMNS
    inputs = projection.weight.numel() + 2 * kv_proj.weight.numel() + projection.weight.shape[1] * channels
    between = 4 * dim * wide  # columns, centred, and twice as input of the QR decomposition
    result = dim * channels + min(dim, wide) * wide + 2 * dim * wide
    return exact * (inputs + between + result) + dtype.itemsize * result


def _root(matrix: Tensor) -> Tensor:
    """Find R with R^T R = matrix^T matrix, of at most as many rows as columns, so that |R z| is cheap."""
    if matrix.shape[0] <= matrix.shape[1]:
        return matrix
    return torch.linalg.qr(matrix, mode="r").R
