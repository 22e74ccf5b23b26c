from .functional import row_softmax, row_softmax_

__all__ = ["row_softmax", "row_softmax_"]
