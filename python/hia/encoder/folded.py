"""The encoder's weights folded once for inference: norms into convolutions, beside the parameters, in no state_dict."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hia_kernels.ops import conv_norm_act as conv_op
from hia_kernels.ops import stem as stem_op
from hia_kernels.ops.conv_norm_act import PackedConv, pack_conv
from hia_kernels.ops.stem import PackedStem, pack_stem

from ..versions import WeightVersion
from .conv import EncoderConv
from .cuda_graphs import EncoderGraphs
from .workspace import WorkspaceCache


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
    graphs: EncoderGraphs = field(default_factory=EncoderGraphs, repr=False)
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
