"""Contracts of ``hia::conv_norm_act``, its backward and the functions of packed weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...core.checks import FLOATS, Arg, Contract, check_choice, like, statistics

ACTIVATIONS = ("none", "relu", "gelu")
STRIDES = (1, 2)
KERNELS = (1, 3)

_PACKED_LAYOUTS = (torch.strided, torch._mkldnn)  # the latter is oneDNN's own

_INPUTS = {
    "x": Arg("N IH IW C", FLOATS),
    "weight": like("x", "OC C K K"),
    "scale": statistics("x", "OC"),
    "shift": statistics("x", "OC"),
    "residual": like("x", "N OH OW OC", optional=True),
}


class _Weights(Contract):
    """The contract of a convolution's weights: a kernel that the rows have, and channels."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        check_choice(self.op, "stride", arguments["stride"], STRIDES)
        sizes = super().__call__(arguments)
        check_choice(self.op, "weight's K", sizes["K"], KERNELS)
        if sizes["C"] < 1 or sizes["OC"] < 1:
            got = list(arguments["weight"].shape)
            raise ValueError(f"hia::{self.op}: weight must have at least one channel in and out, got {got}")
        return sizes


class _Convolution(_Weights):
    """The contract of a convolution: activation, and the sizes that follow from the others."""

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        check_choice(self.op, "activation", arguments["activation"], ACTIVATIONS)
        sizes = super().__call__(arguments)
        height, width, stride = sizes["IH"], sizes["IW"], arguments["stride"]
        if height < 1 or width < 1:
            raise ValueError(f"hia::{self.op}: x must hold at least one pixel, got shape {list(arguments['x'].shape)}")
        expected = [(height - 1) // stride + 1, (width - 1) // stride + 1]
        if "OH" in sizes and [sizes["OH"], sizes["OW"]] != expected:
            name = "dout" if arguments["residual"] is None else "residual"  # the first fixed the size
            got = list(arguments[name].shape[1:3])
            raise ValueError(f"hia::{self.op}: {name} must have the output's size {expected}, got {got}")
        return sizes


check = _Convolution("conv_norm_act", **_INPUTS)
check_bwd = _Convolution(
    "conv_norm_act_bwd", **{**_INPUTS, "dout": like("x", "N OH OW OC"), "out": like("x", "N OH OW OC")}
)
check_pack = _Weights(
    "conv_norm_act_packed",
    weight=Arg("OC C K K", FLOATS),
    scale=statistics("weight", "OC"),
    shift=statistics("weight", "OC"),
)
_IMAGES = {
    op: Contract(op, x=Arg("N IH IW C", FLOATS))
    for op in ("conv_norm_act_packed", "conv_norm_act_packed_", "conv_norm_act_packed_out")
}


def check_image(op: str, x: torch.Tensor) -> None:
    """Check that ``x`` has a height and a width, by which weights are packed."""
    _IMAGES[op]({"x": x})


class _PackedConvolution(Contract):
    """The contract of a convolution with packed weights, which may be in a layout of oneDNN's.

    Attributes:
        result: the argument that has the output's shape.
    """

    def __init__(self, op: str, result: str, **options: Any) -> None:
        super().__init__(
            op, x=Arg("N IH IW C", FLOATS), shift=statistics("x", "OC"), **{result: like("x", "N OH OW OC", **options)}
        )
        self.result = result

    def __call__(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        x, weight, stride, pad_rows = (arguments[name] for name in ("x", "weight", "stride", "pad_rows"))
        check_choice(self.op, "stride", stride, STRIDES)
        check_choice(self.op, "activation", arguments["activation"], ACTIVATIONS)
        sizes = super().__call__(arguments)
        kernel = self._kernel(weight, x)
        if sizes["OC"] != weight.shape[0]:
            got = list(arguments["shift"].shape)
            raise ValueError(
                f"hia::{self.op}: shift must have shape [{weight.shape[0]}] as the weight packed, got {got}"
            )
        if sizes["C"] != weight.shape[1]:
            expected = f"[N, IH, IW, {weight.shape[1]}] as the weight packed"
            raise ValueError(f"hia::{self.op}: x must have shape {expected}, got {list(x.shape)}")
        if sizes["IH"] < (1 if pad_rows else kernel) or sizes["IW"] < 1:
            got = list(x.shape)
            raise ValueError(f"hia::{self.op}: x must hold at least one output's rows and columns, got shape {got}")
        rows = sizes["IH"] - (1 if pad_rows else kernel)
        size = [rows // stride + 1, (sizes["IW"] - 1) // stride + 1]
        if "OH" in sizes and [sizes["OH"], sizes["OW"]] != size:
            got = [sizes["OH"], sizes["OW"]]
            raise ValueError(f"hia::{self.op}: {self.result} must have the output's size {size}, got {got}")
        result = arguments[self.result]
        if self.op != "conv_norm_act_packed" and not result.is_contiguous():  # it is written to
            got = list(result.stride())
            raise ValueError(f"hia::{self.op}: {self.result} must be contiguous, got strides {got}")
        return sizes

    def _kernel(self, weight: Any, x: torch.Tensor) -> int:
        """Return K of [OC, C, K, K], or of the native kernels' [OC, C, K * K] and [OC, C, 16]."""
        if not isinstance(weight, torch.Tensor):
            raise TypeError(f"hia::{self.op}: weight must be a tensor, got {type(weight).__name__}")
        if weight.layout not in _PACKED_LAYOUTS:
            raise TypeError(f"hia::{self.op}: weight must be of pack_conv, got {weight.layout}".replace("torch.", ""))
        for error, expected, got in ((TypeError, x.dtype, weight.dtype), (ValueError, x.device, weight.device)):
            if expected != got:
                raise error(f"hia::{self.op}: weight must be {expected} like x, got {got}".replace("torch.", ""))
        shape = tuple(int(size) for size in weight.shape[2:])
        kernel = {(1,): 1, (9,): 3, (16,): 3, (1, 1): 1, (3, 3): 3}.get(shape)
        if kernel is None:
            raise ValueError(f"hia::{self.op}: weight must be packed of K 1 or 3, got shape {list(weight.shape)}")
        return kernel


check_packed = _PackedConvolution("conv_norm_act_packed", "residual", optional=True)
check_packed_inplace = _PackedConvolution("conv_norm_act_packed_", "residual")
check_packed_out = _PackedConvolution("conv_norm_act_packed_out", "out")
