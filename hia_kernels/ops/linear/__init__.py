from .functional import linear

__all__ = ["linear"]
