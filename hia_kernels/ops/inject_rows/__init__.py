from .functional import inject_rows, inject_rows_

__all__ = ["inject_rows", "inject_rows_"]
