from .functional import norm_linear

__all__ = ["norm_linear"]
