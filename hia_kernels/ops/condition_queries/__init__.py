from .functional import condition_queries

__all__ = ["condition_queries"]
