from .functional import (
    PackedConv,
    conv_norm_act,
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
)

__all__ = [
    "PackedConv",
    "conv_norm_act",
    "conv_norm_act_packed",
    "conv_norm_act_packed_",
    "conv_norm_act_packed_out",
    "pack_conv",
]
