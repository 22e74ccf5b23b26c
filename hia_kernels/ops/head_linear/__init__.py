from .functional import head_linear

__all__ = ["head_linear"]
