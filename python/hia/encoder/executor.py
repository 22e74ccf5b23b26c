"""Convolutions with their norms, computed from the parameters or from folded weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import hia_kernels
from hia_kernels.ops.conv_norm_act import conv_norm_act_packed, conv_norm_act_packed_, conv_norm_act_packed_out

from .conv import EncoderConv
from .cuda_graphs import EncoderGraphs
from .folded import FoldedConv
from .workspace import PingPongWorkspace, WorkspaceCache, temporary_workspace


class ConvExecutor:
    """Computes convolutions with their norms: from folded weights where there are any, else from the parameters.

    Args:
        weights: folded ones by convolution.
        packed: whether packed weights serve now; where they don't, folded scales and shifts still do.
        graphs: CUDA graphs of the encoder with these weights; None to launch kernel by kernel.
        workspace_cache: memory for activations; None to allocate every map.
    """

    def __init__(
        self,
        weights: Mapping[nn.Module, FoldedConv] | None = None,
        packed: bool = False,
        graphs: EncoderGraphs | None = None,
        workspace_cache: WorkspaceCache | None = None,
    ):
        self.weights, self.packed, self.graphs, self.workspace_cache = weights or {}, packed, graphs, workspace_cache
        self.workspace: PingPongWorkspace | None = None

    @contextmanager
    def within(self, elements: int, dtype: torch.dtype, keep: bool) -> Iterator[None]:
        """Let activations in the block lie in one workspace where that serves; :meth:`released` gets the result out.

        Args:
            elements: how many the units need at most, ``workspace_elements`` of them.
            dtype: of the activations.
            keep: whether the memory stays for the next image.
        """
        if self.workspace_cache is None or not self.packed or not self._writes_out():
            yield
            return
        lease = self.workspace_cache.lease if keep else temporary_workspace
        with lease(elements, dtype) as self.workspace:
            try:
                yield
            finally:
                self.workspace = None

    def _writes_out(self) -> bool:
        """Tell whether every packed convolution writes into the memory it is given."""
        return all(folded.packed is None or folded.packed.writes_out() for folded in self.weights.values())

    def advance(self, out: Tensor) -> None:
        """Free a unit's input: ``out`` is the next unit's."""
        if self.workspace is not None:
            self.workspace.advance(out)

    def released(self, out: Tensor) -> Tensor:
        """Return ``out``, or a copy of it if it lies in the workspace."""
        return out.clone() if self.workspace is not None and self.workspace.holds(out) else out

    def folded(self, conv: EncoderConv, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
        """Return a convolution's weight, and the scale and shift of the norm behind it."""
        folded = self.weights.get(conv)
        return (conv.weight, *conv.folded(norm)) if folded is None else (folded.weight, folded.scale, folded.shift)

    def __call__(
        self,
        conv: EncoderConv,
        norm: nn.BatchNorm2d,
        x: Tensor,
        residual: Tensor | None = None,
        activation: str = "relu",
        pad_rows: bool = True,
        scratch: bool = False,
    ) -> Tensor:
        """Convolve, normalise, add the residual and activate: [N, IH, IW, C] -> [N, OH, OW, OC].

        Args:
            conv: the convolution.
            norm: what follows it.
            x: its input.
            residual: is added before the activation, and may be written over: nothing may read it afterwards.
            activation: "relu" or "none".
            pad_rows: False where ``x`` is a strip that brings its neighbours' rows.
            scratch: put the result beside the unit's input in the workspace, as what the unit needs for itself alone;
                False: at the workspace's other end, as its output.
        """
        folded = self.weights.get(conv)
        packed = folded.packed if folded is not None and self.packed else None
        if packed is not None:
            if residual is None and self.workspace is not None:
                images, height, width, _ = x.shape
                size = (images, (height - 1) // packed.stride + 1, (width - 1) // packed.stride + 1)
                place = self.workspace.scratch if scratch else self.workspace.output
                return conv_norm_act_packed_out(place((*size, conv.out_channels)), x, packed, activation)
            if residual is None or not residual.is_contiguous():
                return conv_norm_act_packed(x, packed, residual, activation, pad_rows)
            return conv_norm_act_packed_(residual, x, packed, activation, pad_rows)
        if norm.training:
            return conv.with_live_statistics(x, norm, residual, activation)
        weight, scale, shift = self.folded(conv, norm)
        stride = conv.stride[0]
        if pad_rows or conv.kernel_size[0] == 1:
            return hia_kernels.conv_norm_act(x, weight, scale, shift, residual, stride, activation)
        return _without_padded_rows(x, weight, scale, shift, stride, activation)


def _without_padded_rows(
    x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int, activation: str
) -> Tensor:
    """Convolve a strip, 3 x 3, with the op's padding, and drop the rows that have seen the padding."""
    rows = (x.shape[1] - 3) // stride + 1
    if stride == 2:  # the op's windows are centred on even rows, the strip's on odd ones
        x = torch.cat([x.new_zeros(x.shape[0], 1, *x.shape[2:]), x], dim=1)
    return hia_kernels.conv_norm_act(x, weight, scale, shift, None, stride, activation)[:, 1 : 1 + rows]
