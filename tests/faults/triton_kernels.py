"""Faults in the Triton kernels, forward and backward. Their tests run in the interpreter."""

from __future__ import annotations

from functools import partial

from .mutant import Mutant

OPS = "hia_kernels/ops"
TESTS = "tests/ops"
Kernel = partial(Mutant, interpreter=True)

ATTENTION = (
    Kernel(
        name="attention-forward-last-block-unmasked",
        kind="dropped mask",
        file=f"{OPS}/cross_attention/triton_fwd.py",
        old="p = tl.where(mask_n[None, :], p, 0.0)",
        new="p = tl.where(mask_n[None, :], p, p)",
        tests=(f"{TESTS}/test_cross_attention_triton.py::test_matches_reference[ragged-fp16]",),
        why="keys behind the sequence's end count in the sum of a softmax",
    ),
    Kernel(
        name="attention-forward-skips-a-whole-last-block",
        kind="off by one at an edge",
        file=f"{OPS}/cross_attention/triton_fwd.py",
        old="last if TAIL_IN_LOOP else last - BLOCK_N + 1",
        new="last if TAIL_IN_LOOP else last - BLOCK_N",
        tests=(f"{TESTS}/test_cross_attention_triton.py::test_matches_reference[head-dim-96-whole-blocks-of-keys]",),
        why="a sequence of whole blocks of keys loses its last block",
    ),
    Kernel(
        name="attention-forward-keeps-the-old-maximum",
        kind="lost part of a sum",
        file=f"{OPS}/cross_attention/triton_fwd.py",
        old="acc = dot(p.to(v.dtype), v, acc * alpha[:, None])",
        new="acc = dot(p.to(v.dtype), v, acc)",
        tests=(
            f"{TESTS}/test_cross_attention_triton.py::test_matches_reference[several-blocks-of-queries-and-keys-fp16]",
        ),
        why="what was summed before a larger score came is not rescaled",
    ),
    Kernel(
        name="attention-splits-lose-the-last-keys",
        kind="off by one at an edge",
        file=f"{OPS}/cross_attention/triton_split.py",
        old="keys_per_split = tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK",
        new="keys_per_split = tl.cdiv(length, BLOCK) // splits * BLOCK",
        tests=(f"{TESTS}/test_cross_attention_triton.py::test_splits_without_keys_change_no_bit[64]",),
        why="blocks of keys that the splits do not divide are never read",
    ),
    Kernel(
        name="attention-backward-sign-of-dlse",
        kind="sign",
        file=f"{OPS}/cross_attention/triton_bwd.py",
        old="delta -= tl.load(dlse_ptr",
        new="delta += tl.load(dlse_ptr",
        tests=(f"{TESTS}/test_cross_attention_triton.py::test_matches_reference[ragged-fp16]",),
        why="the gradient that arrives at the log-sum-exp is taken away instead of added",
    ),
    Kernel(
        name="attention-backward-swaps-heads",
        kind="swapped heads",
        file=f"{OPS}/cross_attention/triton_bwd.py",
        old="offsets = (start_k * H + h) * D",
        new="offsets = (start_k * H + H - 1 - h) * D",
        tests=(f"{TESTS}/test_cross_attention_triton.py::test_matches_reference[ragged-fp16]",),
        why="keys and values of one head get the gradients of another",
    ),
)

LINEAR_ALGEBRA = (
    Kernel(
        name="norm-linear-sums-the-row-in-half",
        kind="wrong dtype of a sum",
        file=f"{OPS}/norm_linear/triton_fwd.py",
        old="x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)",
        new="x = tl.load(x_ptrs + start, mask=mask, other=0.0)",
        tests=(
            f"{TESTS}/test_norm_linear_triton.py::test_matches_reference[torch.float16-mean-30-deviations]",
            f"{TESTS}/test_norm_linear_triton.py::test_routes_agree_with_the_reference",
        ),
        why="mean and variance of a row are summed up in 16 bits",
    ),
    Kernel(
        name="norm-linear-last-chunk-counted-as-whole",
        kind="off by one at an edge",
        file=f"{OPS}/norm_linear/triton_fwd.py",
        old="count = tl.minimum(BLOCK_C, C - start).to(tl.float32)",
        new="count = tl.minimum(BLOCK_C, C).to(tl.float32)",
        tests=(f"{TESTS}/test_norm_linear_triton.py::test_matches_reference[torch.float32-ragged-fp32-norm]",),
        why="the mean of a ragged last chunk is taken over channels that are not there",
    ),
    Kernel(
        name="norm-linear-rows-variance-of-the-padding",
        kind="dropped mask",
        file=f"{OPS}/norm_linear/triton_fwd.py",
        old="centred = tl.where(mask, x - mean[:, None], 0.0)",
        new="centred = tl.where(mask, x - mean[:, None], x - mean[:, None])",
        tests=(f"{TESTS}/test_norm_linear_triton.py::test_routes_agree_with_the_reference",),
        why="columns behind the row's end count in its variance",
    ),
    Kernel(
        name="norm-linear-backward-sign-of-the-projection",
        kind="sign",
        file=f"{OPS}/norm_linear/triton_bwd.py",
        old="dx = rstd * (dnormed - along_ones - normed * along_normed)",
        new="dx = rstd * (dnormed - along_ones + normed * along_normed)",
        tests=(f"{TESTS}/test_norm_linear_triton.py::test_matches_reference[torch.float32-all-rows]",),
        why="the gradient has twice the part along the row that the norm removes",
    ),
    Kernel(
        name="inject-rows-loses-the-residual",
        kind="lost residual",
        file=f"{OPS}/inject_rows/triton_fwd.py",
        old="acc += tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)",
        new="acc += 0 * tl.load(hidden_ptrs, mask=mask, other=0.0).to(tl.float32)",
        after="as cuBLAS's would be",
        tests=(f"{TESTS}/test_inject_rows_triton.py::test_matches_reference[torch.float32-some-rows]",),
        why="the update replaces the visual tokens' hidden states instead of being added",
    ),
    Kernel(
        name="inject-rows-backward-counts-rows-twice",
        kind="off by one at an edge",
        file=f"{OPS}/inject_rows/triton_bwd.py",
        old="mask_r = offs_r < end",
        new="mask_r = offs_r < R",
        tests=(f"{TESTS}/test_inject_rows_triton.py::test_matches_reference[torch.float32-ragged]",),
        why="the bias's gradient holds the rows at the end of every split twice",
    ),
    Kernel(
        name="condition-queries-reads-another-sample",
        kind="wrong index",
        file=f"{OPS}/condition_queries/triton_fwd.py",
        old="(offs_b == first_b + b)",
        new="(offs_b == b)",
        tests=(
            f"{TESTS}/test_condition_queries_triton.py::test_matches_reference[torch.float32-more-samples-than-a-tile]",
        ),
        why="samples beyond the first tile lose their instruction",
    ),
    Kernel(
        name="condition-queries-backward-keeps-the-last-sample",
        kind="lost part of a sum",
        file=f"{OPS}/condition_queries/triton_bwd.py",
        old="acc += tl.where((offs_t == row)[:, None], drow[None, :], 0.0)",
        new="acc = tl.where((offs_t == row)[:, None], drow[None, :], acc)",
        tests=(f"{TESTS}/test_condition_queries_triton.py::test_matches_reference[torch.float32-rows-twice-no-bias]",),
        why="a token that several samples are conditioned on gets the gradient of one",
    ),
    Kernel(
        name="row-softmax-counts-the-padding",
        kind="dropped mask",
        file=f"{OPS}/row_softmax/triton_fwd.py",
        old='x = tl.where(mask, x.to(tl.float32) * scale, float("-inf"))',
        new="x = tl.where(mask, x.to(tl.float32) * scale, 0.0)",
        tests=(f"{TESTS}/test_row_softmax_triton.py::test_matches_reference[torch.float32-ragged-negative-scale]",),
        why="probabilities of a row whose length is no power of two add up to less than one",
    ),
    Kernel(
        name="row-softmax-adds-a-long-row-up-in-half",
        kind="wrong dtype of a sum",
        file=f"{OPS}/row_softmax/triton_fwd.py",
        old="l_i = l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(x - shift), axis=0)",
        new="l_i = (l_i * tl.exp(m_i - shift) + tl.sum(tl.exp(x - shift), axis=0))"
        ".to(p_ptr.dtype.element_ty).to(tl.float32)",
        tests=(f"{TESTS}/test_row_softmax_triton.py::test_matches_reference[torch.bfloat16-longest-promised]",),
        why="probabilities of a long row add up to more or less than one",
    ),
    Kernel(
        name="row-softmax-backward-sign-of-dlse",
        kind="sign",
        file=f"{OPS}/row_softmax/triton_bwd.py",
        old="delta -= tl.load(dlse_ptr + offs_r",
        new="delta += tl.load(dlse_ptr + offs_r",
        tests=(f"{TESTS}/test_row_softmax_triton.py::test_backward_takes_a_wider_dp_and_dlse[50]",),
        why="the gradient that arrives at the log-sum-exp is taken away instead of added",
    ),
)

IMAGES = (
    Kernel(
        name="convolution-wraps-at-the-right-border",
        kind="dropped mask",
        file=f"{OPS}/conv_norm_act/triton_fwd.py",
        old="(mask_m & (ix + kx >= 0) & (ix + kx < IW))",
        new="(mask_m & (ix + kx >= 0))",
        tests=(f"{TESTS}/test_conv_norm_act_triton.py::test_matches_reference[torch.float32-3x3-relu-residual]",),
        why="the last column sees the next row's first pixel instead of padding",
    ),
    Kernel(
        name="split-convolution-loses-the-residual",
        kind="lost residual",
        file=f"{OPS}/conv_norm_act/triton_fwd.py",
        after="_conv_norm_act_reduce_kernel[(",
        old="HAS_RESIDUAL=residual is not None,",
        new="HAS_RESIDUAL=False,",
        tests=(f"{TESTS}/test_conv_norm_act_triton.py::test_split_sums[relu]",),
        why="a convolution whose sums are split forgets the bottleneck's shortcut",
    ),
    Kernel(
        name="convolution-backward-passes-what-relu-stopped",
        kind="dropped mask",
        file=f"{OPS}/conv_norm_act/triton_bwd.py",
        old="dz = tl.where(out > 0, dz, 0.0)",
        new="dz = tl.where(out >= 0, dz, 0.0)",
        tests=(f"{TESTS}/test_conv_norm_act_triton.py::test_matches_reference[torch.float32-3x3-relu-residual]",),
        why="gradients flow through activations that are zero",
    ),
    Kernel(
        name="stem-sees-a-row-below-the-image",
        kind="off by one at an edge",
        file=f"{OPS}/stem/triton_pack.py",
        old="after = 2 * place + PAD - (size - 1)",
        new="after = 2 * place + PAD - size",
        tests=(f"{TESTS}/test_stem_triton.py::test_tiles_inside_and_along_the_borders",),
        why="the means of a grey image's channels count in a row of padding",
    ),
    Kernel(
        name="stem-takes-16-bits-for-signed",
        kind="wrong dtype",
        file=f"{OPS}/stem/triton_pack.py",
        old="p = p.to(tl.int32) & 0xFFFF",
        new="p = p.to(tl.int32)",
        tests=(f"{TESTS}/test_stem_triton.py::test_the_upper_half_of_16_bits",),
        why="bright pixels of a 16-bit radiograph turn black",
    ),
    Kernel(
        name="stem-backward-takes-16-bits-for-signed",
        kind="wrong dtype",
        file=f"{OPS}/stem/triton_bwd.py",
        old="p = p.to(tl.int32) & 0xFFFF",
        new="p = p.to(tl.int32)",
        tests=(f"{TESTS}/test_stem_triton.py::test_the_upper_half_of_16_bits",),
        why="the stem learns from bright pixels as if they were black",
    ),
    Kernel(
        name="stem-backward-gives-ties-to-the-last",
        kind="wrong index",
        file=f"{OPS}/stem/triton_bwd.py",
        old="larger = inside & (z > best)",
        new="larger = inside & (z >= best)",
        tests=(f"{TESTS}/test_stem_triton.py::test_a_tie_goes_to_the_first",),
        why="the max-pool's gradient goes to another pixel than PyTorch's where pixels are equal",
    ),
)

MUTANTS = (*ATTENTION, *LINEAR_ALGEBRA, *IMAGES)
