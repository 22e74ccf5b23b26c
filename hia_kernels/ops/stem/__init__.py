from .functional import stem

__all__ = ["stem"]
