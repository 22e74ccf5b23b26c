"""A convolution with its batch-norm, computed from the parameters or from folded weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hia_kernels
from hia_kernels.ops import conv_norm_act as conv_op
from hia_kernels.ops import stem as stem_op
from hia_kernels.ops.conv_norm_act import (
    PackedConv,
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
)
from hia_kernels.ops.stem import PackedStem, pack_stem

from ..versions import WeightVersion
from .cuda_graphs import GraphCache
from .workspace import PingPongWorkspace, WorkspaceCache, temporary_workspace


def statistics_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of the scales and shifts that go with ``weight``."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class EncoderConv(nn.Conv2d):
    """A convolution's parameters, in ``nn.Conv2d``'s names. Its batch-norm is folded into it when it is applied."""

    def folded(self, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Compute each channel's scale and shift from the norm's running statistics and the bias, in fp32 or fp64."""
        acc = statistics_dtype(self.weight)
        scale = norm.weight.to(acc) * torch.rsqrt(norm.running_var.to(acc) + norm.eps)
        mean = norm.running_mean.to(acc) if self.bias is None else norm.running_mean.to(acc) - self.bias.to(acc)
        return scale, norm.bias.to(acc) - mean * scale

    def with_live_statistics(self, x: Tensor, norm: nn.Module, residual: Tensor | None, activation: str) -> Tensor:
        """Convolve, then normalise by the result's own statistics: [N, IH, IW, C] -> [N, OH, OW, OC]."""
        one = torch.ones(self.out_channels, dtype=statistics_dtype(self.weight), device=self.weight.device)
        bias = torch.zeros_like(one) if self.bias is None else self.bias.to(one.dtype)
        y = hia_kernels.conv_norm_act(x, self.weight, one, bias, None, self.stride[0], "none")
        z = norm(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        z = z if residual is None else z + residual
        return (F.relu(z) if activation == "relu" else z).contiguous()


@dataclass(frozen=True)
class FoldedConv:
    """One convolution's weights for inference, its norm folded in.

    Attributes:
        weight: [OC, C, K, K], channels last where our kernels want it so.
        scale: [OC] of its norm.
        shift: [OC] of its norm and bias.
        packed: both convolution and norm as oneDNN takes them; None where it doesn't serve.
        stem: the stem's, as the Triton kernels take them; None elsewhere and where they don't serve.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    packed: PackedConv | None
    stem: PackedStem | None = None

    @property
    def nbytes(self) -> int:
        """Count the bytes it occupies; on the CPU the weight is the parameter itself."""
        own = 0 if self.weight.device.type == "cpu" else self.weight.nbytes
        own += 0 if self.stem is None else self.stem.nbytes
        return own + self.scale.nbytes + self.shift.nbytes + (0 if self.packed is None else self.packed.nbytes)


@dataclass(frozen=True)
class FoldedEncoder:
    """An encoder's weights folded by ``Encoder.fold_weights``: they are kept beside the parameters, in no state_dict.

    Attributes:
        version: of the parameters and statistics that they were made from.
        convs: by convolution.
        constants: mean and std of the stem, on the device.
        graphs: CUDA graphs of the whole encoder with these weights.
        workspace_cache: memory for activations, kept between images; on the CPU.
    """

    version: WeightVersion
    convs: dict[nn.Module, FoldedConv] = field(repr=False)
    constants: tuple[Tensor, Tensor] = field(repr=False)
    graphs: GraphCache = field(default_factory=GraphCache, repr=False)
    workspace_cache: WorkspaceCache = field(default_factory=WorkspaceCache, repr=False)

    def packed_serves(self) -> bool:
        """Tell whether the packed weights serve now: no other backend is forced, autocast is off."""
        packs = [conv.packed for conv in self.convs.values() if conv.packed is not None]
        return bool(packs) and not any(packed.unsupported_reasons() for packed in packs)

    @property
    def nbytes(self) -> int:
        """Count the bytes they occupy, memory that is kept for their use included."""
        parts = (*self.convs.values(), *self.constants, self.graphs, self.workspace_cache)
        return sum(part.nbytes for part in parts)


@torch.no_grad()
def fold_conv(
    conv: EncoderConv, norm: nn.BatchNorm2d, *, pack: bool = True, stem: tuple[Tensor, Tensor, int] | None = None
) -> FoldedConv:
    """Fold one norm, and pack the weight where packing serves.

    Args:
        conv: the convolution.
        norm: what follows it.
        pack: whether ``conv_norm_act`` will compute it.
        stem: mean, std and pool, if it is the stem's.
    """
    scale, shift = conv.folded(norm)
    weight, packed = conv.weight.detach(), None
    if weight.device.type != "cpu":
        weight = weight.contiguous(memory_format=torch.channels_last)
    if pack and not conv_op.packing_unsupported_reasons(weight):
        packed = pack_conv(weight, scale, shift, conv.stride[0])
    if stem is None or stem_op.packing_unsupported_reasons(weight):
        return FoldedConv(weight, scale, shift, packed)
    mean, std, pool = stem
    return FoldedConv(weight, scale, shift, packed, pack_stem(weight, mean, std, scale, shift, pool))


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
        graphs: GraphCache | None = None,
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
        return all(step.packed is None or step.packed.writes_out() for step in self.weights.values())

    def advance(self, out: Tensor) -> None:
        """Free a unit's input: ``out`` is the next unit's."""
        if self.workspace is not None:
            self.workspace.advance(out)

    def released(self, out: Tensor) -> Tensor:
        """Return ``out``, or a copy of it if it lies in the workspace."""
        return out.clone() if self.workspace is not None and self.workspace.holds(out) else out

    def folded(self, conv: EncoderConv, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
        """Return a convolution's weight, and the scale and shift of the norm behind it."""
        step = self.weights.get(conv)
        return (conv.weight, *conv.folded(norm)) if step is None else (step.weight, step.scale, step.shift)

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
        step = self.weights.get(conv)
        if step is not None and step.packed is not None and self.packed:
            if residual is None and self.workspace is not None:
                images, height, width, _ = x.shape
                size = (images, (height - 1) // step.packed.stride + 1, (width - 1) // step.packed.stride + 1)
                place = self.workspace.scratch if scratch else self.workspace.output
                return conv_norm_act_packed_out(place((*size, conv.out_channels)), x, step.packed, activation)
            if residual is None or not residual.is_contiguous():
                return conv_norm_act_packed(x, step.packed, residual, activation, pad_rows)
            return conv_norm_act_packed_(residual, x, step.packed, activation, pad_rows)
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
