"""``cross_attention``: tiles as the launchers choose them for head_dim 64 to 256 (fused), to 640 (staged), for fp32.

Of head_dims that are no power of two, 80, 96, 192 and 272: their last columns are masked.
"""

from bench.compiled import Spec

FWD, BWD, STAGED, SPLIT = (
    f"hia_kernels.ops.cross_attention.triton_{part}" for part in ("fwd", "bwd", "staged", "split")
)
LARGE, AMPERE, AMD = ("sm_90", "sm_100"), ("sm_80",), ("gfx942",)
EVERY = LARGE + AMPERE + AMD
COUNTS = ("tokens", "tiles_m", "tiles_n", "tiles_r", "tiles_t", "splits", "once", "most", "first_pair")
CU_SEQLENS = {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32", "cu_x_ptr": "*i32", "cu_y_ptr": "*i32"}
FP32 = ("top", "total", "share_top", "share_total", "lse", "dlse", "rows", "partial")
STATS = {f"{name}_ptr": "*fp32" for name in FP32}
SCALARS = dict.fromkeys((*COUNTS, "H"), "i32") | dict.fromkeys(("scale", "scale_log2e", "factor"), "fp32")
STRIDES = {f"stride_{name}_{dim}": "i32" for name in ("q", "k", "v", "x", "out", "dout") for dim in "th"}
TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "p", "ds", "a", "x", "y")


def _spec(name, module, kernel, constexprs, launch, targets, dtype="bf16", uses_dot=True):
    """``launch``: warps, stages."""
    tensors = {f"{tensor}_ptr": f"*{dtype}" for tensor in TENSORS}
    warps, stages = launch
    return Spec(
        f"cross_attention {name} {dtype}", module, f"_cross_attention_{kernel}_kernel",
        {**CU_SEQLENS, **STATS, **SCALARS, **STRIDES, **tensors}, constexprs, num_warps=warps, num_stages=stages,
        uses_dot=uses_dot and dtype != "fp32", targets=targets, unaligned=COUNTS,
    )  # fmt: skip


def _fused(kernel, head_dim, blocks, targets, name="", *, is_split=False):
    """``blocks``: BLOCK_M, BLOCK_N, warps, stages, as in the launchers' tables."""
    constexprs = {
        "D": head_dim,
        "BLOCK_M": blocks[0],
        "BLOCK_N": blocks[1],
        "BLOCK_D": 1 << (head_dim - 1).bit_length(),
    }
    if kernel == "fwd":
        constexprs["HAS_LSE"] = True
    if kernel != "bwd_dkv":
        constexprs |= {"IS_SPLIT": is_split, "LEAST": 2048}
    label = f"{kernel.removeprefix('bwd_')} d{head_dim} {blocks[0]}x{blocks[1]}{name}{' split' if is_split else ''}"
    return _spec(label, FWD if kernel == "fwd" else BWD, kernel, constexprs, blocks[2:], targets)


def _staged(kernel, tiles, launch, targets, dtype="bf16", head_dim=640, **more):
    """``tiles``: of BLOCK_M, BLOCK_N, and one of what the kernel calls C, or K and D."""
    """``more``: constexprs; IS_SPLIT writes partial results."""
    rows, columns, *inner = tiles
    names = ("BLOCK_C",) if kernel.endswith("scores") else ("BLOCK_K", "BLOCK_D")
    constexprs = {"D": head_dim, "BLOCK_M": rows, "BLOCK_N": columns, **dict(zip(names, inner, strict=True)), **more}
    label = f"{kernel}{' transposed' if more.get('IS_TRANSPOSED') else ''} d{head_dim} {'x'.join(map(str, tiles))}"
    if not kernel.endswith("scores"):
        constexprs = {"IS_SPLIT": False, "LEAST": 1024 if dtype == "fp32" else 2048} | constexprs
    is_split = " split" if more.get("IS_SPLIT") else ""
    return _spec(f"{label}{is_split}", STAGED, kernel, constexprs, launch, targets, dtype)


def _staged_fwd(dtype, launch, targets, values_k, rows=128, columns=128, inner=64, width=128, head_dim=640):
    shapes = {"launch": launch, "targets": targets, "dtype": dtype, "head_dim": head_dim}
    return [
        _staged("scores", (rows, columns, inner), **shapes),
        _staged("values", (rows, columns, values_k, width), HAS_LSE=True, **shapes),
    ]


def _staged_bwd(dtype, launch, targets, rows=128, columns=128, inner=64, width=128, head_dim=640):
    shapes = {"launch": launch, "targets": targets, "dtype": dtype, "head_dim": head_dim}
    of_rows, of_columns = {"IS_TRANSPOSED": False, "BLOCK_R": rows}, {"IS_TRANSPOSED": True, "BLOCK_R": columns}
    return [
        _staged("dscores", (rows, columns, inner), **shapes),
        _staged("product", (rows, columns, inner, width), **of_rows, **shapes),
        _staged("product", (rows, columns, inner, width), **of_columns, **shapes),
    ]


def _combine(name, head_dim, *, dtype="bf16", **constexprs):
    block_d = min(128, 1 << (head_dim - 1).bit_length())
    return _spec(
        f"combine {name} d{head_dim}", SPLIT, "combine",
        {"D": head_dim, "LEAST": 2048, "BLOCK_T": 16, "BLOCK_D": block_d, **constexprs}, (4, 3), EVERY, dtype,
        uses_dot=False,
    )  # fmt: skip


SPECS = [
    _fused("fwd", 128, (128, 128, 8, 2), LARGE),
    _fused("fwd", 128, (128, 128, 8, 2), LARGE, is_split=True),
    _fused("fwd", 128, (128, 64, 8, 3), AMPERE),
    _fused("fwd", 128, (128, 64, 8, 3), AMPERE, is_split=True),
    _fused("fwd", 128, (128, 64, 8, 2), AMD, " AMD"),
    _fused("fwd", 128, (128, 64, 8, 2), AMD, " AMD", is_split=True),
    _fused("fwd", 256, (64, 64, 8, 2), LARGE),
    _fused("fwd", 256, (64, 64, 8, 2), LARGE, is_split=True),
    _fused("fwd", 256, (128, 32, 8, 1), AMD),
    _fused("fwd", 256, (128, 32, 8, 1), AMD, is_split=True),
    _fused("bwd_dq", 128, (128, 64, 8, 3), LARGE),
    _fused("bwd_dq", 128, (128, 64, 8, 3), LARGE, is_split=True),
    _fused("bwd_dq", 128, (128, 32, 8, 2), AMPERE + AMD),
    _fused("bwd_dq", 128, (128, 32, 8, 2), AMPERE + AMD, is_split=True),
    _fused("bwd_dq", 256, (64, 64, 8, 2), ("sm_90",)),
    _fused("bwd_dq", 256, (64, 32, 8, 2), ("sm_100",)),
    _fused("bwd_dkv", 128, (64, 128, 8, 2), ("sm_90",)),
    _fused("bwd_dkv", 128, (32, 128, 8, 3), ("sm_100",)),
    _fused("bwd_dkv", 128, (64, 64, 8, 2), AMPERE),
    _fused("bwd_dkv", 128, (32, 64, 4, 2), AMD),
    _fused("bwd_dkv", 256, (32, 64, 8, 2), LARGE),
    # head_dim 64 where it has tiles of its own, 256 on AMD
    _fused("bwd_dq", 64, (128, 64, 8, 2), AMPERE + AMD),
    _fused("bwd_dkv", 64, (64, 128, 8, 2), AMPERE),
    _fused("bwd_dkv", 64, (32, 128, 8, 2), AMD),
    _fused("bwd_dq", 256, (64, 32, 4, 1), AMD, " AMD"),
    _fused("bwd_dkv", 256, (16, 64, 8, 2), AMD),
    # columns that are masked
    _fused("fwd", 80, (128, 128, 8, 2), LARGE),
    _fused("fwd", 96, (128, 64, 8, 3), AMPERE),
    _fused("fwd", 192, (64, 64, 8, 2), LARGE),
    _fused("bwd_dq", 80, (128, 64, 8, 3), LARGE),
    _fused("bwd_dq", 96, (128, 32, 8, 2), AMPERE + AMD),
    _fused("bwd_dkv", 80, (64, 128, 8, 2), ("sm_90",)),
    _fused("bwd_dkv", 80, (32, 128, 8, 3), ("sm_100",)),
    _fused("bwd_dkv", 96, (64, 64, 8, 2), AMPERE),
    *_staged_fwd("bf16", (8, 3), LARGE, values_k=128),
    *_staged_bwd("bf16", (8, 3), LARGE),
    *_staged_fwd("fp16", (8, 2), AMPERE + AMD, values_k=64),
    *_staged_bwd("fp16", (8, 2), AMPERE + AMD),
    *_staged_fwd("bf16", (8, 3), LARGE, values_k=128, head_dim=512),
    *_staged_bwd("bf16", (8, 3), LARGE, head_dim=512),
    *_staged_fwd("fp16", (8, 3), LARGE, values_k=128, head_dim=272),
    *_staged_bwd("fp16", (8, 3), LARGE, head_dim=272),
    _staged("values", (128, 128, 128, 128), (8, 3), LARGE, HAS_LSE=True, IS_SPLIT=True),
    _staged("values", (128, 128, 64, 128), (8, 2), AMPERE + AMD, "fp16", HAS_LSE=True, IS_SPLIT=True),
    _staged("product", (128, 128, 64, 128), (8, 3), LARGE, IS_TRANSPOSED=False, BLOCK_R=128, IS_SPLIT=True),
    _staged("product", (128, 128, 64, 128), (8, 2), AMPERE + AMD, "fp16",
            IS_TRANSPOSED=False, BLOCK_R=128, IS_SPLIT=True),
    *_staged_fwd("fp32", (4, 3), EVERY, 16, rows=64, columns=64, inner=16, width=64, head_dim=128),
    *_staged_bwd("fp32", (4, 3), EVERY, rows=64, columns=64, inner=16, width=64, head_dim=128),
    *_staged_fwd("fp32", (4, 3), LARGE, 16, rows=64, columns=64, inner=16, width=64, head_dim=80),
    _staged("values", (64, 64, 16, 64), (4, 3), EVERY, "fp32", HAS_LSE=True, IS_SPLIT=True),
    _staged("product", (64, 64, 16, 64), (4, 3), EVERY, "fp32", IS_TRANSPOSED=False, BLOCK_R=64, IS_SPLIT=True),
    _spec("delta d640", BWD, "delta", {"D": 640, "BLOCK_T": 4, "BLOCK_D": 1024}, (4, 3), EVERY, uses_dot=False),
    _combine("fused", 128, HAS_STATS=True, IS_NATURAL=False, HAS_LSE=True),
    _combine("fused without lse", 80, HAS_STATS=True, IS_NATURAL=False, HAS_LSE=False),
    _combine("staged", 640, HAS_STATS=True, IS_NATURAL=True, HAS_LSE=True),
    _combine("dq", 640, HAS_STATS=False, IS_NATURAL=True, HAS_LSE=False, dtype="fp32"),
]  # fmt: skip
