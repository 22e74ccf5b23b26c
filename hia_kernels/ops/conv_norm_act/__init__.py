from .functional import conv_norm_act
from .packed import (
    PackedConv,
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
    packing_unsupported_reasons,
)

__all__ = [
    "PackedConv",
    "conv_norm_act",
    "conv_norm_act_packed",
    "conv_norm_act_packed_",
    "conv_norm_act_packed_out",
    "pack_conv",
    "packing_unsupported_reasons",
]
