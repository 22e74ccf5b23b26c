from .functional import conv_norm_act

__all__ = ["conv_norm_act"]
