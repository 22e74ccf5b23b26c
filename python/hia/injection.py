"""Inject: write what was extracted into the visual tokens' hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels

from .config import HiAConfig
from .extractor import even_cu_seqlens, norm_project


class Injection(nn.Module):
    """V + CrossAtten(V, Z̄): each visual token reads its own image's extracted tokens (paper, section 3, step 3)."""

    def __init__(self, config: HiAConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_queries = config.num_queries
        self.zero_init = config.gate == "zero_init"
        self.visual_norm = nn.LayerNorm(config.hidden_size)
        self.extracted_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(config.hidden_size, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1)) if config.gate == "tanh" else None
        self.post_norm = nn.LayerNorm(config.hidden_size) if config.norms == "pre_post" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start so that attaching changes no output bit, unless the config's gate is "none"."""
        if self.zero_init:
            nn.init.zeros_(self.out_proj.weight)
            nn.init.zeros_(self.out_proj.bias)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def attend(self, hidden: Tensor, visual_rows: Tensor, cu_rows: Tensor, max_rows: int, extracted: Tensor) -> Tensor:
        """What the visual tokens read, before the output projection.

        Args:
            hidden: [T, D1].
            visual_rows: [R] int64, image by image.
            cu_rows: [n + 1] int32, the images' shares of ``visual_rows``.
            max_rows: the largest share.
            extracted: [n * M, D].

        Returns:
            [R, D].
        """
        heads = (self.num_heads, self.head_dim)
        q = norm_project(hidden, self.visual_norm, self.q_proj, visual_rows).unflatten(-1, heads)  # [R, H, d]
        k, v = norm_project(extracted, self.extracted_norm, self.kv_proj).unflatten(-1, (2, *heads)).unbind(1)
        cu_extracted = even_cu_seqlens(cu_rows.shape[0] - 1, self.num_queries, q)
        out = hia_kernels.cross_attention(q, k, v, cu_rows, cu_extracted, max_rows, self.num_queries)
        return out.flatten(1)

    def add(self, hidden: Tensor, update: Tensor, rows: Tensor) -> Tensor:
        """Project the update and add it to the rows; in place where no gradient is recorded.

        Args:
            hidden: [T, D1] contiguous.
            update: [R, D].
            rows: [R] int64, unique.

        Returns:
            [T, D1].
        """
        weight, bias = self.out_proj.weight, self.out_proj.bias
        if self.gate is not None:
            gate = torch.tanh(self.gate)
            update, bias = update * gate, bias * gate
        if torch.is_grad_enabled():
            out = hia_kernels.inject_rows(hidden, update, weight, bias, rows)
        else:
            out = hia_kernels.inject_rows_(hidden, update, weight, bias, rows)
        if self.post_norm is None:
            return out
        normed = F.layer_norm(
            out[rows], self.post_norm.normalized_shape, self.post_norm.weight, self.post_norm.bias, self.post_norm.eps
        )
        return out.index_copy(0, rows, normed)
