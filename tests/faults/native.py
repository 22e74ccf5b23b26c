"""Faults in csrc/: the runner builds the extension with each of them."""

from __future__ import annotations

from functools import partial

from .mutant import Mutant

Native = partial(Mutant, native=True)

MUTANTS = (
    Native(
        name="native-stem-pools-two-columns",
        kind="off by one at an edge",
        file="csrc/cpu/stem_kernels.h",
        old="const int64_t last = 2 * column + 1 < p.columns() ? 2 * column + 1 : p.columns() - 1;",
        new="const int64_t last = 2 * column < p.columns() ? 2 * column : p.columns() - 1;",
        tests=("tests/ops/test_stem_native.py::test_a_grey_image_is_three_equal_channels",),
        why="the pool's window lacks its right column",
    ),
    Native(
        name="native-winograd-loses-the-residual",
        kind="lost residual",
        file="csrc/cpu/winograd_kernels.h",
        old="const float* residual = p.residual ? p.residual + offset : nullptr;",
        new="const float* residual = nullptr;",
        tests=("tests/ops/test_conv_norm_act_native.py::test_borders_and_residual_are_the_references",),
        why="3 x 3 convolutions forget the bottleneck's shortcut",
    ),
    Native(
        name="native-product-forgets-the-sums-before",
        kind="lost part of a sum",
        file="csrc/cpu/gemm_kernels.h",
        old="const float start = k || p.add ? at",
        new="const float start = p.add ? at",
        tests=("tests/ops/test_products.py::test_sums_of_any_length[1600]",),
        why="columns of a last, narrow panel hold the last 768 terms of their sums alone",
    ),
    Native(
        name="native-convolution-wraps-at-the-right-border",
        kind="dropped mask",
        file="csrc/cpu/direct_kernels.h",
        old="j >= 0 && j < p.width)",
        new="j >= 0 && j <= p.width)",
        tests=("tests/ops/test_conv_norm_act_native.py::test_borders_and_residual_are_the_references",),
        why="the last column sees the next row's first pixel instead of padding",
    ),
    Native(
        name="native-window-shifted-by-its-width",
        kind="wrong window",
        file="csrc/cpu/stem_kernels.h",
        old="range = p_.window[2 * image_ + 1] - low;",
        new="range = p_.window[2 * image_ + 1];",
        tests=("tests/ops/test_stem_native.py::test_a_window_far_from_zero_keeps_its_bits",),
        why="a radiograph whose window does not begin at zero is shown too dark",
    ),
)
