from .functional import cross_attention, cross_attention_with_lse

__all__ = ["cross_attention", "cross_attention_with_lse"]
