"""``conv_norm_act``: tiles as the launchers choose them for ResNet-50's steps."""

from dataclasses import replace

from bench.compiled import Spec

FWD, BWD = (f"hia_kernels.ops.conv_norm_act.triton_{mode}" for mode in ("fwd", "bwd"))
CUDA, AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942",)
STRIDES = {
    f"stride_{name}": "i32"
    for name in ("x_n", "x_h", "x_w", "weight_o", "weight_h", "weight_w", "residual_n", "residual_h", "residual_w")
}
PIXELS = ("IH", "IW", "OW", "pixels", "rows", "tiles_m")
NORM = {"scale_ptr": "*fp32", "shift_ptr": "*fp32"}


def _signature(dtype, **pointers):
    return {
        "x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}", "residual_ptr": f"*{dtype}", "out_ptr": f"*{dtype}",
        **NORM, **pointers, **dict.fromkeys((*PIXELS, "C", "OC"), "i32"), **STRIDES,
    }  # fmt: skip


def _fwd(name, dtype, blocks, warps, kernel=1, stride=1, activation="relu", residual=False, splits=1, **options):
    block_m, block_oc, block_c = blocks
    constexprs = {
        "KERNEL": kernel, "STRIDE": stride, "ACTIVATION": activation, "HAS_RESIDUAL": residual,
        "BLOCK_M": block_m, "BLOCK_OC": block_oc, "BLOCK_C": block_c, "SPLITS": splits,
    }  # fmt: skip
    out = {"out_ptr": "*fp32"} if splits > 1 else {}
    return Spec(
        f"conv_norm_act fwd {name} {dtype}", FWD, "_conv_norm_act_fwd_kernel", _signature(dtype, **out), constexprs,
        num_warps=warps, uses_dot=dtype != "fp32", unaligned=PIXELS, **options,
    )  # fmt: skip


def _bwd(name, dtype, blocks, warps, activation="relu", dscale=True, **options):
    block_m, block_oc, block_c = blocks
    signature = _signature(
        dtype, dout_ptr=f"*{dtype}", dy_ptr=f"*{dtype}", dresidual_ptr=f"*{dtype}", dscale_ptr="*fp32",
        dshift_ptr="*fp32",
    )  # fmt: skip
    constexprs = {
        "KERNEL": 3, "STRIDE": 1, "ACTIVATION": activation, "HAS_RESIDUAL": activation == "gelu", "HAS_DY": True,
        "HAS_DRESIDUAL": True, "HAS_DSCALE": dscale, "HAS_DSHIFT": True,
        "BLOCK_M": block_m, "BLOCK_OC": block_oc, "BLOCK_C": block_c,
    }  # fmt: skip
    return Spec(
        f"conv_norm_act bwd {name} {dtype}", BWD, "_conv_norm_act_bwd_kernel", signature, constexprs,
        num_warps=warps, uses_dot=dscale and dtype != "fp32", unaligned=PIXELS, **options,
    )  # fmt: skip


def _far(spec):
    """Images of more than 2**31 elements: Triton types every stride and count by its value."""
    wide = {name: "i64" for name in (*STRIDES, "rows") if not name.startswith("stride_weight")}
    return replace(spec, name=f"{spec.name} i64 strides", signature={**spec.signature, **wide})


REDUCE = Spec(
    "conv_norm_act reduce bf16", FWD, "_conv_norm_act_reduce_kernel",
    _signature("bf16", partial_ptr="*fp32"),
    {"ACTIVATION": "relu", "HAS_RESIDUAL": True, "BLOCK_M": 32, "BLOCK_OC": 64, "SPLITS": 8},
    unaligned=PIXELS,
)  # fmt: skip
SPECS = [
    _fwd("1x1 expand", "bf16", (128, 64, 64), 4, residual=True, num_stages=2),
    _fwd("3x3 wide", "bf16", (128, 128, 64), 8, kernel=3, residual=True, num_stages=4, targets=CUDA),
    _fwd("3x3 wide", "fp16", (128, 128, 64), 8, kernel=3, residual=True, num_stages=2, targets=AMD),
    _fwd("3x3 gelu", "bf16", (128, 64, 64), 4, kernel=3, activation="gelu", num_stages=4, targets=CUDA),
    _fwd("3x3 s2 split", "bf16", (64, 64, 64), 4, kernel=3, stride=2, splits=8, num_stages=4),
    _fwd("3x3", "fp32", (64, 64, 16), 4, kernel=3, residual=True, num_stages=3),
    _far(_fwd("3x3 wide", "bf16", (128, 128, 64), 8, kernel=3, residual=True, num_stages=4, targets=CUDA)),
    _far(_fwd("1x1 expand", "bf16", (128, 64, 64), 4, residual=True, num_stages=2)),
    REDUCE,
    _far(REDUCE),
    replace(
        REDUCE, name="conv_norm_act finish bf16", signature={**REDUCE.signature, "partial_ptr": "*bf16"},
        constexprs={**REDUCE.constexprs, "BLOCK_OC": 128, "SPLITS": 1},
    ),
    _bwd("3x3 relu", "bf16", (128, 64, 64), 8, num_stages=4, targets=CUDA),
    _far(_bwd("3x3 relu", "bf16", (128, 64, 64), 8, num_stages=4, targets=CUDA)),
    _bwd("3x3 gelu", "bf16", (64, 64, 64), 4, "gelu", num_stages=2),
    _bwd("3x3 relu", "fp32", (64, 64, 16), 4, num_stages=3),
    _bwd("no y", "bf16", (32, 128, 16), 4, dscale=False),
]  # fmt: skip
