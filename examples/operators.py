"""Use one operator on its own: packed cross-attention with few queries and many keys.

python operators.py
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

import hia_kernels


def inputs() -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    """Make two sequences of 32 queries each, over 784 and 416 keys."""
    torch.manual_seed(0)
    q = torch.randn(64, 8, 128, requires_grad=True)  # [Tq, H, D]
    k, v = (torch.randn(1200, 8, 128, requires_grad=True) for _ in range(2))  # [Tk, H, D]
    cu_seqlens_q = torch.tensor([0, 32, 64], dtype=torch.int32)
    cu_seqlens_k = torch.tensor([0, 784, 1200], dtype=torch.int32)
    return (q, k, v, cu_seqlens_q, cu_seqlens_k), {"max_seqlen_q": 32, "max_seqlen_k": 784}


def main() -> None:
    arguments, lengths = inputs()

    # Every operator picks the first backend of its table that can run the call.
    out = hia_kernels.cross_attention(*arguments, **lengths)
    out.square().sum().backward()
    query, key, value = arguments[:3]
    print(f"served by {hia_kernels.last_backend('cross_attention')}: out {list(out.shape)}")
    print("gradient norms:", ", ".join(f"{x.grad.norm():.3f}" for x in (query, key, value)))

    # A forced backend runs or raises with its reasons; nothing falls back in silence.
    with hia_kernels.use_backend("reference"):
        expected = hia_kernels.cross_attention(*arguments, **lengths)
    print(f"largest difference from the reference: {(out - expected).abs().max():.1e}")

    # The operators are registered with torch.library: compilers and counters know them.
    compiled = torch.compile(hia_kernels.cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, **lengths), out)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hia_kernels.cross_attention(*arguments, **lengths)
    print(f"at most {counter.get_total_flops():,} FLOPs, counted from shapes alone")


if __name__ == "__main__":
    main()
