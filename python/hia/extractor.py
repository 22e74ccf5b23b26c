"""Condition and extract: what the instruction asks for, read from the high-resolution features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels

from .config import HiAConfig


@dataclass(frozen=True)
class PackedFeatures:
    """Features of several images, one after the other.

    Attributes:
        tokens: [T, C], image i in rows cu_seqlens[i]:cu_seqlens[i + 1].
        cu_seqlens: [n + 1] int32.
        max_seqlen: tokens of the largest image.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class Extractor(nn.Module):
    """Z̄ = CrossAtten(Q + Linear(h_N), Linear(Z)): M learnable queries read one image's features (paper, section 3).

    The conditioned queries are one set per sample, whatever the number of its images.
    """

    def __init__(self, config: HiAConfig):
        super().__init__()
        dim = config.dim
        channels = config.hidden_size if config.shared_projection else config.encoder_channels
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query_std = config.query_std
        self.queries = nn.Parameter(torch.empty(config.num_queries, dim))
        self.condition = nn.Linear(config.hidden_size, dim) if config.instruction_aware else None
        self.feature_projection = nn.Linear(channels, dim)
        self.query_norm = nn.LayerNorm(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise what ``to_empty`` left undefined (children reset themselves)."""
        nn.init.normal_(self.queries, std=self.query_std)

    def condition_queries(self, hidden: Tensor, instruction_rows: Tensor) -> Tensor:
        """Eq. 2. hidden [T, D1], instruction_rows [B] -> [B, M, D]; without awareness the queries, B times."""
        if self.condition is None:
            return self.queries.expand(instruction_rows.shape[0], -1, -1)
        return hia_kernels.condition_queries(
            hidden, instruction_rows, self.condition.weight, self.condition.bias, self.queries
        )

    def forward(
        self, hidden: Tensor, instruction_rows: Tensor, features: PackedFeatures, image_to_sample: Tensor
    ) -> Tensor:
        """Extract from every image what its sample's instruction asks for.

        Args:
            hidden: [T, D1] hidden states of the packed tokens.
            instruction_rows: [B] int64, row of each sample's last instruction token.
            features: of n images.
            image_to_sample: [n] int64 in ``[0, B)``.

        Returns:
            [n * M, D].
        """
        conditioned = self.condition_queries(hidden, instruction_rows)  # [B, M, D]
        batch, num_queries, dim = conditioned.shape
        q = norm_project(conditioned.reshape(-1, dim), self.query_norm, self.q_proj)  # [B * M, D]
        q = q.view(batch, num_queries, self.num_heads, self.head_dim)[image_to_sample].flatten(0, 1)  # [n * M, H, d]

        projected = F.linear(features.tokens, self.feature_projection.weight, self.feature_projection.bias)
        kv = norm_project(projected, self.feature_norm, self.kv_proj)  # [T, 2 * D]
        k, v = kv.view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        images = image_to_sample.shape[0]
        out = hia_kernels.cross_attention(
            q, k, v, even_cu_seqlens(images, num_queries, q), features.cu_seqlens, num_queries, features.max_seqlen
        )
        return self.out_proj(out.flatten(1))


def norm_project(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, row_idx: Tensor | None = None) -> Tensor:
    """Linear(LayerNorm(x[row_idx])) of two modules' parameters."""
    return hia_kernels.norm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, row_idx, norm.eps)


def even_cu_seqlens(sequences: int, length: int, like: Tensor) -> Tensor:
    """[sequences + 1] int32: sequences of one length, made on the device of ``like``."""
    return torch.arange(0, (sequences + 1) * length, length, dtype=torch.int32, device=like.device)
