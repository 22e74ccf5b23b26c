"""Inject: write what was extracted into the visual tokens' hidden states."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels

from ..config import HiAConfig
from ..unit import Unit, unit_forward
from . import plan
from .extractor import even_cu_seqlens, norm_project, unit_variance_
from .layout import CallLayout


def _weights(tokens: Tensor, keys: Tensor, offsets: Tensor, heads: int, scale: float) -> Tensor:
    """Take the softmax of each head's scores, ``scale * tokens keys^T + offsets``: [R, H * M]."""
    if tokens.device.type == "cpu" and tokens.dtype == torch.float32:  # 16 bits would be rounded before they are scaled
        scores = hia_kernels.linear(tokens, keys).mul_(scale).add_(offsets)
    else:
        scores = torch.addmm(offsets, tokens, keys.mT, alpha=scale)
    return torch.softmax(scores.unflatten(1, (heads, -1)), dim=-1).flatten(1)


class _AbsorbedRead(torch.autograd.Function):
    """One image's tokens [R, D1] read absorbed keys and values [H * M, D1]; the weights are not kept but made again."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, bias: Tensor, heads: int, scale: float
    ) -> Tensor:
        ctx.save_for_backward(tokens, keys, values, offsets)
        ctx.heads, ctx.scale = heads, scale
        return hia_kernels.linear(_weights(tokens, keys, offsets, heads, scale), values.mT, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise NotImplementedError(
                "hia::inject: gradients of gradients are not implemented for the absorbed form; use create_graph=False "
                "or model.set_plan('auto/direct')"
            )
        tokens, keys, values, offsets = ctx.saved_tensors
        with torch.autocast(dout.device.type, enabled=False):
            p = _weights(tokens, keys, offsets, ctx.heads, ctx.scale)
            dp, by_head = hia_kernels.linear(dout, values), (ctx.heads, -1)  # [R, H * M]
            dvalues = hia_kernels.linear(p.mT, dout.mT)
            ds = torch._softmax_backward_data(dp.unflatten(1, by_head), p.unflatten(1, by_head), -1, p.dtype).flatten(1)
            doffsets = ds.sum(0)
            ds *= ctx.scale
            dtokens, dkeys = hia_kernels.linear(ds, keys.mT), hia_kernels.linear(ds.mT, tokens.mT)
            return dtokens, dkeys, dvalues, doffsets, dout.sum(0), None, None


class Injection(Unit):
    """V + CrossAtten(V, Z̄): each visual token reads its own image's extracted tokens (paper, section 3, step 3)."""

    def __init__(self, config: HiAConfig):
        super().__init__()
        dim = config.dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_queries = config.num_queries
        self.hidden_size, self.form = config.hidden_size, plan.AUTO
        self.zero_init, self.init = config.gate == "zero_init", config.init
        self.visual_norm = nn.LayerNorm(config.hidden_size)
        self.extracted_norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(config.hidden_size, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.out_proj = nn.Linear(dim, config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1, dtype=torch.get_default_dtype())) if config.gate == "tanh" else None
        self.post_norm = nn.LayerNorm(config.hidden_size) if config.norms == "pre_post" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start so that attaching changes no output bit, unless the config's gate is "none"."""
        if self.init == "lecun_normal":
            unit_variance_(self.q_proj, self.kv_proj, self.out_proj)
        if self.zero_init:
            nn.init.zeros_(self.out_proj.weight)
            nn.init.zeros_(self.out_proj.bias)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    @unit_forward
    def forward(self, hidden: Tensor, layout: CallLayout, extracted: Tensor) -> Tensor:
        """Add to the visual tokens' rows; in place where no gradient is recorded.

        Args:
            hidden: [T, D1] contiguous.
            layout: where the images' visual tokens stand.
            extracted: [n * M, D].

        Returns:
            [T, D1].
        """
        if self.form_for(layout, hidden) == "absorbed":
            out = self._add(hidden, self._absorbed(hidden, layout, extracted), layout)
            return self._normed(out, layout.written_rows)
        update = self.attend(hidden, layout.visual_rows, layout.cu_rows, layout.max_rows, extracted)
        if layout.copies > 1:
            update = update.repeat(layout.copies, 1)
        return self.add(hidden, update, layout.written_rows)

    def form_for(self, layout: CallLayout, hidden: Tensor) -> str:
        """Choose the form that such a call takes now."""
        return plan.choose("inject", self.form, self.sizes(layout, hidden), hidden.device.type)

    def sizes(self, layout: CallLayout, hidden: Tensor) -> plan.Sizes:
        """Collect what the plan is made from, for this call."""
        return plan.Sizes(
            hidden_size=self.hidden_size,
            dim=self.num_heads * self.head_dim,
            heads=self.num_heads,
            queries=self.num_queries,
            channels=0,
            samples=layout.instruction_rows.shape[0],
            features=(),
            visual=layout.row_counts,
            itemsize=hidden.element_size(),
            training=torch.is_grad_enabled(),
        )

    def _absorbed(self, hidden: Tensor, layout: CallLayout, extracted: Tensor) -> Tensor:
        """Compute what the visual tokens read, after the output projection: [R, D1].

        Keys take in the visual tokens' projection and values the update's: scores are LN(V) (K_h W_q,h)^T, the update
        is the sum over heads of P_h (V_h W_o,h). The queries' bias is an offset per key.
        """
        heads, width = self.num_heads, self.head_dim
        images = len(layout.row_counts)
        norm = self.visual_norm
        visual = F.layer_norm(
            hidden[layout.visual_rows], norm.normalized_shape, norm.weight, norm.bias, norm.eps
        )  # [R, D1]
        kv = norm_project(extracted, self.extracted_norm, self.kv_proj).view(images, -1, 2, heads, width)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # [n, H, M, d]
        query_weight = self.q_proj.weight.view(heads, width, -1)  # [H, d, D1]
        out_weight = self.out_proj.weight.view(-1, heads, width).permute(1, 2, 0)  # [H, d, D1]
        keys = hia_kernels.head_linear(k, query_weight.mT).flatten(1, 2)  # [n, H * M, D1]
        values = hia_kernels.head_linear(v, out_weight.mT).flatten(1, 2)  # [n, H * M, D1]
        offsets = (k @ self.q_proj.bias.view(heads, width, 1)).flatten(1) * width**-0.5  # [n, H * M]
        updates = []
        for image, tokens in enumerate(visual.split(layout.row_counts)):
            updates.append(self._read(tokens, keys[image], values[image], offsets[image]))
        update = torch.cat(updates)
        return update if self.gate is None else update * torch.tanh(self.gate)

    def _read(self, tokens: Tensor, keys: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """Read for one image, [R, D1], in the tokens' dtype: autocast would round the scores."""
        scale, bias = self.head_dim**-0.5, self.out_proj.bias
        keys, values, offsets, bias = (x.to(tokens.dtype) for x in (keys, values, offsets, bias))
        with torch.autocast(tokens.device.type, enabled=False):
            if torch.is_grad_enabled():
                return _AbsorbedRead.apply(tokens, keys, values, offsets, bias, self.num_heads, scale)
            return hia_kernels.linear(_weights(tokens, keys, offsets, self.num_heads, scale), values.mT, bias)

    @staticmethod
    def _add(hidden: Tensor, update: Tensor, layout: CallLayout) -> Tensor:
        if layout.copies > 1:
            update = update.repeat(layout.copies, 1)
        update = update.to(hidden.dtype)
        if torch.is_grad_enabled():
            return hidden.index_add(0, layout.written_rows, update)
        return hidden.index_add_(0, layout.written_rows, update)

    def attend(self, hidden: Tensor, visual_rows: Tensor, cu_rows: Tensor, max_rows: int, extracted: Tensor) -> Tensor:
        """Compute what the visual tokens read, before the output projection.

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
        return self._normed(out, rows)

    def _normed(self, out: Tensor, rows: Tensor) -> Tensor:
        """Norm the rows after the sum, in the released maths."""
        if self.post_norm is None:
            return out
        normed = F.layer_norm(
            out[rows], self.post_norm.normalized_shape, self.post_norm.weight, self.post_norm.bias, self.post_norm.eps
        )
        return out.index_copy(0, rows, normed) if torch.is_grad_enabled() else out.index_copy_(0, rows, normed)
