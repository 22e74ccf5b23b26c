"""Fused operators for HiA: high-resolution instruction-aware adapters (MICCAI 2024).

Importing needs no GPU, no Triton and no compiler. Every function here is one ``torch.library`` op of the
namespace ``hia`` with fake tensors, autograd, autocast and a FLOP formula.
"""

from .core.backend import last_backend, use_backend
from .ops.condition_queries import condition_queries
from .ops.conv_norm_act import conv_norm_act
from .ops.cross_attention import cross_attention, cross_attention_with_lse
from .ops.head_linear import head_linear
from .ops.inject_rows import inject_rows, inject_rows_
from .ops.latent_attention import latent_attention
from .ops.linear import linear
from .ops.norm_linear import norm_linear
from .ops.row_softmax import row_softmax, row_softmax_
from .ops.stem import stem

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "condition_queries",
    "conv_norm_act",
    "cross_attention",
    "cross_attention_with_lse",
    "head_linear",
    "inject_rows",
    "inject_rows_",
    "last_backend",
    "latent_attention",
    "linear",
    "norm_linear",
    "row_softmax",
    "row_softmax_",
    "stem",
    "use_backend",
]
