"""Kernels of ``cross_attention``: fused at head_dim 128 and 256 with each target's blocks, staged at 640, fp32 too."""

from __future__ import annotations

from collections.abc import Iterable

from ..compiled import Spec

FOLDER = "hia_kernels.ops.cross_attention"
FAMILY = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "amd"}


def _strides(*tensors: str) -> dict[str, str]:
    return {f"stride_{name}_{dim}": "i32" for name in tensors for dim in "th"}


def _tensors(kind: str, names: Iterable[str]) -> dict[str, str]:
    return {f"{name}_ptr": f"*{kind}" for name in names}


CU = _tensors("i32", ("cu_q", "cu_k"))
COUNTS = dict.fromkeys(("tokens", "tiles_m", "tiles_n", "splits", "first_pair", "H"), "i32")
UNALIGNED = tuple(COUNTS)


def _counts(*names: str) -> dict[str, str]:
    return {name: COUNTS[name] for name in names}


def _fused(target: str, head_dim: int) -> list[Spec]:
    """Forward and backward of one target with the blocks that its family has; those it has."""
    from hia_kernels.ops.cross_attention import triton_bwd, triton_fwd

    found = []
    inputs = _tensors("bf16", ("q", "k", "v", "dout"))
    shared = {"D": head_dim, "BLOCK_D": head_dim}
    signatures = {
        "fwd": _tensors("bf16", ("q", "k", "v", "out")) | CU | _tensors("fp32", ("top", "total"))
        | _counts("tokens", "tiles_m", "splits", "H") | {"scale_log2e": "fp32"} | _strides("q", "k", "v"),
        "dq": inputs | {"rows_ptr": "*fp32", "dq_ptr": "*bf16"} | CU | _counts("tokens", "tiles_m", "splits", "H")
        | {"scale": "fp32", "scale_log2e": "fp32"} | _strides("q", "k", "v", "dout"),
        "dkv": inputs | {"rows_ptr": "*fp32"} | _tensors("bf16", ("dk", "dv")) | CU | _counts("tokens", "tiles_n", "H")
        | {"scale": "fp32", "scale_log2e": "fp32"} | _strides("q", "k", "v", "dout"),
    }  # fmt: skip
    tables = {"fwd": triton_fwd.BLOCKS, "dq": triton_bwd.DQ_BLOCKS, "dkv": triton_bwd.DKV_BLOCKS}
    kernels = {"fwd": "_cross_attention_fwd_kernel", "dq": "_cross_attention_bwd_dq_kernel",
               "dkv": "_cross_attention_bwd_dkv_kernel"}  # fmt: skip
    for mode, table in tables.items():
        fitting = [limit for limit in table[FAMILY[target]] if head_dim <= limit]
        if not fitting:
            continue
        block_m, block_n, warps, stages = table[FAMILY[target]][min(fitting)]
        side, flags = ("fwd", {"HAS_LSE": True, "IS_SPLIT": False}) if mode == "fwd" else ("bwd", {})
        found.append(Spec(
            f"cross_attention {mode} d{head_dim} bf16, {FAMILY[target]}", f"{FOLDER}.triton_{side}",
            kernels[mode], signatures[mode], shared | flags | {"BLOCK_M": block_m, "BLOCK_N": block_n}, warps, stages,
            uses_dot=True, targets=(target,), unaligned=UNALIGNED,
        ))  # fmt: skip
    return found


def _staged(dtype: str, blocks: dict[str, int], warps: int, stages: int, targets: tuple[str, ...]) -> list[Spec]:
    """The three kernels of the forward and the backward at head_dim 640."""
    where, dot = f"{FOLDER}.triton_staged", dtype != "fp32"
    name = f"d640 {dtype}" + ("" if len(targets) > 2 else f", {stages} stages")
    q_k = _tensors(dtype, ("q", "k")) | CU
    scores = q_k | {"p_ptr": f"*{dtype}"} | _tensors("fp32", ("top", "total"))
    scores |= _counts("tiles_m", "tiles_n", "first_pair", "H") | {"scale_log2e": "fp32"} | _strides("q", "k")
    values = _tensors(dtype, ("p", "v", "out")) | CU | _tensors("fp32", ("top", "total", "lse", "split_total"))
    values |= COUNTS | _strides("v")
    dscores = q_k | _tensors(dtype, ("v", "dout", "p", "ds")) | {"rows_ptr": "*fp32", "scale_log2e": "fp32"}
    dscores |= _counts("tokens", "tiles_m", "tiles_n", "first_pair", "H") | _strides("q", "k", "v", "dout")
    product = _tensors(dtype, ("a", "x", "y")) | _tensors("i32", ("cu_y", "cu_x")) | COUNTS | _strides("x")
    product |= {"tiles_r": "i32", "scale": "fp32"}

    def spec(kernel: str, signature: dict[str, str], names: Iterable[str], **flags: object) -> Spec:
        chosen = {block: blocks[block] for block in names}
        return Spec(
            f"cross_attention {kernel} {name}", where, f"_cross_attention_{kernel}_kernel", signature,
            {"D": 640, **flags, **chosen}, warps, stages, uses_dot=dot, targets=targets,
            unaligned=(*UNALIGNED, "tiles_r"),
        )  # fmt: skip

    tile, depth = ("BLOCK_M", "BLOCK_N", "BLOCK_C"), ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_D")
    return [
        spec("scores", scores, tile),
        spec("values", values, depth, HAS_LSE=True, IS_SPLIT=False),
        spec("dscores", dscores, tile),
        spec("product", product, depth, IS_TRANSPOSED=True, BLOCK_R=blocks["BLOCK_N"]),
    ]


HALVES = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_C": 64, "BLOCK_K": 64, "BLOCK_D": 128}
SINGLES = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_C": 16, "BLOCK_K": 16, "BLOCK_D": 64}
COMBINE = _tensors("fp32", ("partial", "top", "total", "lse")) | {"out_ptr": "*bf16"} | _counts("tokens", "splits", "H")

SPECS = [
    *(spec for target in FAMILY for head_dim in (128, 256) for spec in _fused(target, head_dim)),
    *_staged("bf16", HALVES, 8, 3, ("sm_90", "sm_100")),
    *_staged("bf16", HALVES, 8, 2, ("sm_80", "gfx942")),
    *_staged("fp32", SINGLES, 4, 3, ("sm_80", "sm_90", "sm_100", "gfx942")),
    Spec(
        "cross_attention combine d128", f"{FOLDER}.triton_split", "_cross_attention_combine_kernel", COMBINE,
        {"D": 128, "HAS_STATS": True, "HAS_LSE": True, "BLOCK_T": 16, "BLOCK_D": 128}, unaligned=UNALIGNED,
    ),
    Spec(
        "cross_attention delta d640", f"{FOLDER}.triton_bwd", "_cross_attention_delta_kernel",
        _tensors("bf16", ("dout", "out")) | _tensors("fp32", ("lse", "dlse", "rows")) | _counts("tokens", "H")
        | _strides("dout", "out"),
        {"D": 640, "BLOCK_T": 4, "BLOCK_D": 1024}, unaligned=UNALIGNED,
    ),
]  # fmt: skip
