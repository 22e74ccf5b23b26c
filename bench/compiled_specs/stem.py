"""``stem``: tiles as the launchers choose them for ResNet-50's stem, and for a 3 x 3 one without pool."""

from bench.compiled import Spec

FWD, BWD = (f"hia_kernels.ops.stem.triton_{mode}" for mode in ("fwd", "bwd"))
FP32 = dict.fromkeys(("window_ptr", "mean_ptr", "std_ptr", "scale_ptr", "shift_ptr", "sums_ptr"), "*fp32")
SIZES = ("IH", "IW", "OH", "OW", "PH", "PW", "tiles_r", "tiles_q", "size", "tiles", "programs")
STRIDES = ("stride_pixels_n", "stride_pixels_h", "stride_pixels_w", "stride_pixels_c")
WEIGHT_STRIDES = tuple(f"stride_weight_{dim}" for dim in "ochw")
ELEMENTS = {"uint8": "*u8", "uint16": "*i16", "float": "*fp32"}


def _signature(dtype, pixels="uint8"):
    """Rows of any length: a photograph's are multiples of 16 pixels, a radiograph's are not."""
    pointers = ("packed_ptr", "weight_ptr", "out_ptr", "x_ptr", "dx_ptr", "y_ptr", "dy_ptr", "dout_ptr")
    return {
        **dict.fromkeys(pointers, f"*{dtype}"), "pixels_ptr": ELEMENTS[pixels], "dpixels_ptr": ELEMENTS[pixels],
        **FP32, **dict.fromkeys((*SIZES, *STRIDES, *WEIGHT_STRIDES, "OC"), "i32"),
    }  # fmt: skip


def _fwd(name, dtype, channels, pixels="uint8", pool=3, kernel=7, has_norm=True, block_k=32, **options):
    taps = kernel * (kernel + 2) + 1
    constexprs = {
        "PIXELS": pixels, "CP": channels, "PLANES": 4, "KERNEL": kernel, "TAPS": taps, "BLOCK_K": min(taps, block_k),
        "BLOCK_R": 2 if dtype == "fp32" else 4, "BLOCK_Q": 16, "BLOCK_OC": 64,
        **({"ROWS": 2} if pool == 3 else {"HAS_NORM": has_norm}),
        **({"stride_pixels_w": 1} if channels == 1 else {}), "stride_pixels_c": 1,
    }  # fmt: skip
    signature = {name: kind for name, kind in _signature(dtype, pixels).items() if name not in constexprs}
    return Spec(
        f"stem fwd {name} {pixels} {dtype}", FWD, "_stem_pool_fwd_kernel" if pool == 3 else "_stem_conv_kernel",
        signature, constexprs, num_warps=8 if dtype == "fp32" and pool == 3 else 4, num_stages=1,
        uses_dot=dtype != "fp32", unaligned=(*SIZES, *STRIDES), **options,
    )  # fmt: skip


def _bwd(name, kernel, dtype="bf16", pixels="uint8", module=BWD, **constexprs):
    return Spec(
        f"stem {name} {dtype}",
        module,
        kernel,
        _signature(dtype, pixels),
        constexprs,
        unaligned=(*SIZES, *STRIDES, *WEIGHT_STRIDES),
    )


HOPPER_ON, AMPERE = ("sm_90", "sm_100", "gfx942"), ("sm_80",)
SPECS = [
    _fwd("grey pool", "bf16", 1, targets=HOPPER_ON),
    _fwd("grey pool k16", "bf16", 1, block_k=16, targets=AMPERE),
    _fwd("rgb pool", "bf16", 3, "float", targets=HOPPER_ON),
    _fwd("rgb pool k16", "bf16", 3, "float", block_k=16, targets=AMPERE),
    _fwd("grey pool", "fp32", 1, "uint16", block_k=16),
    _fwd("grey 3x3", "fp16", 1, "uint16", pool=1, kernel=3),
    _fwd("rgb conv k16", "bf16", 3, pool=1, has_norm=False, block_k=16),
    _fwd("rgb conv", "fp32", 3, pool=1, has_norm=False, block_k=16),
    _bwd("pack", "_stem_pack_kernel", module=FWD, PLANES=4, KERNEL=7, TAPS=64, HAS_SIGN=True, BLOCK_OC=16),
    _bwd("bwd pool", "_stem_bwd_kernel", POOL=3, HAS_DY=True, BLOCK=16, BLOCK_OC=64),
    _bwd("normalise", "_stem_normalise_kernel", PIXELS="uint8", BLOCK=256),
    _bwd("dpixels", "_stem_dpixels_kernel", pixels="float", PIXELS="float", CP=1, BLOCK=256),
]
