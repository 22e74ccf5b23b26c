"""Faults in the ops' references, CPU paths, schemas and formulas, and in what all ops share."""

from __future__ import annotations

from .mutant import Mutant

OPS, CORE = "hia_kernels/ops", "hia_kernels/core"
TESTS = "tests/ops"

REFERENCES = (
    Mutant(
        name="attention-reference-sums-fp64-in-fp32",
        kind="wrong dtype of a sum",
        file=f"{OPS}/cross_attention/reference.py",
        old="return torch.float64 if x.dtype == torch.float64 else torch.float32",
        new="return torch.float32",
        tests=(f"{TESTS}/test_cross_attention.py::test_agrees_with_scaled_dot_product_attention",),
        why="the truth that kernels are held to is no more exact than they are",
    ),
    Mutant(
        name="attention-reference-sign-of-dlse",
        kind="sign",
        file=f"{OPS}/cross_attention/reference.py",
        old="delta = delta - dlse[:, rows_q]",
        new="delta = delta + dlse[:, rows_q]",
        tests=(f"{TESTS}/test_cross_attention.py::test_backward_is_autograd_of_reference",),
        why="the explicit backward is not the derivative of the forward",
    ),
    Mutant(
        name="inject-rows-reference-loses-the-residual",
        kind="lost residual",
        file=f"{OPS}/inject_rows/reference.py",
        old="rows = hidden[row_idx].to(acc) + onednn.linear(update, weight, bias).to(acc)",
        new="rows = onednn.linear(update, weight, bias).to(acc)",
        tests=(f"{TESTS}/test_inject_rows.py::test_agrees_with_a_loop",),
        why="kernels would be held to a truth that forgets the hidden states",
    ),
    Mutant(
        name="stem-reference-gradient-outside-the-window",
        kind="wrong window",
        file=f"{OPS}/stem/reference.py",
        old="inside = (p >= 0) & (p <= 1)",
        new="inside = p == p",
        tests=(f"{TESTS}/test_stem.py::test_backward_is_autograd_of_reference",),
        why="pixels that the window cuts off get a gradient",
    ),
)

CPU_PATHS = (
    Mutant(
        name="cpu-attention-sign-of-dlse",
        kind="sign",
        file=f"{OPS}/cross_attention/cpu.py",
        old="delta = delta - dlse\n",
        new="delta = delta + dlse\n",
        tests=(f"{TESTS}/test_cross_attention_cpu.py::test_matches_reference[ragged-fp32]",),
        why="the gradient that arrives at the log-sum-exp is taken away instead of added",
    ),
    Mutant(
        name="cpu-attention-swaps-heads-and-sequences-of-lse",
        kind="swapped heads",
        file=f"{OPS}/cross_attention/cpu.py",
        old="reshaped(lse.transpose(0, 1).contiguous(), ",
        new="reshaped(lse.contiguous(), ",
        tests=(f"{TESTS}/test_cross_attention_cpu.py::test_matches_reference[neighbours-of-equal-lengths]",),
        why="sequences served together get each other's log-sum-exp",
    ),
    Mutant(
        name="latent-attention-backward-keeps-the-last-block",
        kind="lost part of a sum",
        file=f"{OPS}/latent_attention/blocked.py",
        old="parts.multiply(p.mT, douts, sums, add=first > 0)",
        new="parts.multiply(p.mT, douts, sums, add=False)",
        tests=(f"{TESTS}/test_latent_attention.py::test_blocks_are_the_whole",),
        why="the latent's gradient has the last block of queries alone",
    ),
    Mutant(
        name="latent-attention-sign-of-lse",
        kind="sign",
        file=f"{OPS}/latent_attention/blocked.py",
        old="return p, torch.where(m_i.isinf(), m_i, m_i - p.amax(-1).log_())",
        new="return p, torch.where(m_i.isinf(), m_i, m_i + p.amax(-1).log_())",
        tests=(f"{TESTS}/test_latent_attention.py::test_log_sum_exp_is_the_references",),
        why="the log-sum-exp is below the largest score instead of above it",
    ),
    Mutant(
        name="stem-strip-loses-its-last-row",
        kind="off by one at an edge",
        file=f"{OPS}/stem/cpu.py",
        old="(max(0, 2 * start - 1), min(convolved[0], 2 * stop))",
        new="(max(0, 2 * start - 1), min(convolved[0], 2 * stop - 1))",
        tests=(
            f"{TESTS}/test_stem_cpu.py::test_one_row_at_a_time",
            f"{TESTS}/test_stem_cpu.py::test_strips_do_not_show",
        ),
        why="seams every few rows of a large image's features",
    ),
    Mutant(
        name="stem-border-one-row-short",
        kind="off by one at an edge",
        file=f"{OPS}/stem/cpu.py",
        old="top = min(max(edge - first, 0), rows)",
        new="top = min(max(edge - 1 - first, 0), rows)",
        tests=(f"{TESTS}/test_stem_cpu.py::test_the_grey_border_is_exact",),
        why="a grey image's upper border is normalised as if padding were pixels",
    ),
    Mutant(
        name="inject-rows-on-the-cpu-loses-the-residual",
        kind="lost residual",
        file=f"{OPS}/inject_rows/cpu.py",
        old="hidden.index_add_(0, row_idx, products.linear(update, weight, bias))",
        new="hidden.index_copy_(0, row_idx, products.linear(update, weight, bias))",
        tests=(f"{TESTS}/test_inject_rows.py::test_matches_reference",),
        why="the update replaces the visual tokens' hidden states instead of being added",
    ),
)

LIBRARY = (
    Mutant(
        name="attention-counts-its-products-twice",
        kind="FLOPs counted twice",
        file=f"{OPS}/cross_attention/library.py",
        old="return 2 * _product_flops(",
        new="return 4 * _product_flops(",
        tests=(f"{TESTS}/test_cross_attention.py::test_flops_of_equal_lengths_are_exact",),
        why="every table shows the attention at twice its cost, and at twice its rate",
    ),
    Mutant(
        name="norm-linear-backward-counts-the-norm-as-products",
        kind="FLOPs counted twice",
        file=f"{OPS}/norm_linear/library.py",
        old="products = int(any(output_mask[:3])) + int(output_mask[3])",
        new="products = sum(output_mask[:3]) + int(output_mask[3])",
        tests=(f"{TESTS}/test_norm_linear.py::test_flops",),
        why="one product that three gradients share is counted three times",
    ),
    Mutant(
        name="attention-fake-turns-lse-round",
        kind="wrong shape",
        file=f"{OPS}/cross_attention/library.py",
        old="q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)",
        new="q.new_empty(q.shape[0], q.shape[1], dtype=lse_dtype)",
        tests=(f"{TESTS}/test_cross_attention.py::test_opcheck",),
        why="a compiled model is laid out for another shape than the kernel returns",
    ),
    Mutant(
        name="condition-queries-asks-for-the-wrong-gradients",
        kind="wrong index",
        file=f"{OPS}/condition_queries/library.py",
        old="mask = [needs[0], needs[2], needs[3], needs[4]]",
        new="mask = [needs[0], needs[1], needs[3], needs[4]]",
        tests=(f"{TESTS}/test_condition_queries.py::test_backward_is_autograd_of_reference",),
        why="the projection of the instruction is never trained",
    ),
    Mutant(
        name="autocast-rounds-the-residual-stream",
        kind="wrong dtype",
        file=f"{OPS}/inject_rows/library.py",
        old='cast=("update", "weight", "bias")',
        new='cast=("hidden", "update", "weight", "bias")',
        tests=(f"{TESTS}/test_inject_rows.py::test_autocast_leaves_the_residual_stream_in_fp32",),
        why="under autocast the host's hidden states lose 16 bits at every injection",
    ),
)

SHARED = (
    Mutant(
        name="a-forced-backend-falls-back-in-silence",
        kind="silent fallback",
        file=f"{CORE}/backend.py",
        old="if forced is not None and backend.name != forced:",
        new="if forced is not None and backend.name not in (forced, REFERENCE):",
        tests=(
            f"{TESTS}/test_dispatch.py::TestBackendChoice::test_a_forced_backend_that_cannot_run_says_every_reason",
        ),
        why="a measurement of one backend is of another",
    ),
    Mutant(
        name="last-backend-does-not-tell",
        kind="silent fallback",
        file=f"{CORE}/backend.py",
        old="_served.set({**_served.get(), op: [name]})",
        new="_served.set({op: [name], **_served.get()})",
        tests=(f"{TESTS}/test_dispatch.py::TestBackendChoice::test_first_that_can_run",),
        why="last_backend() names what served the first call, whatever served this one",
    ),
    Mutant(
        name="a-block-takes-away-the-last-one-entered",
        kind="lost state",
        file=f"{CORE}/backend.py",
        old="_blocks.set(tuple(one for one in _not_ended(_blocks.get()) if one is not block))",
        new="_blocks.set(_blocks.get()[:-1])",
        tests=(f"{TESTS}/test_dispatch_contexts.py::TestContexts::test_blocks_may_end_in_any_order",),
        why="a generator that ends inside another block takes that one away",
    ),
    Mutant(
        name="a-block-ends-for-the-tasks-it-began",
        kind="silent fallback",
        file=f"{CORE}/backend.py",
        old="            _entered.reset(entered)",
        new="            block.ended = True",
        tests=(f"{TESTS}/test_dispatch_contexts.py::TestContexts::test_what_is_begun_inside_keeps_the_block_after_it",),
        why="a worker that was handed a forced call runs auto once its caller has gone on",
    ),
    Mutant(
        name="gradients-forget-what-was-forced",
        kind="silent fallback",
        file=f"{CORE}/registration.py",
        old="if ctx.forced_backend is None or block_backend() is not None:",
        new="if ctx.forced_backend is None or ctx.forced_backend:",
        tests=(f"{TESTS}/test_dispatch_contexts.py::TestContexts::test_gradients_of_a_forced_call_are_forced",),
        why="a backend forced forward alone is measured with another one's backward",
    ),
    Mutant(
        name="the-extensions-row-takes-what-pytorch-multiplies",
        kind="silent fallback",
        file=f"{CORE}/products.py",
        old="if is_large(*size):",
        new="if size:",
        tests=(f"{TESTS}/test_products.py::test_small_calls_match_the_reference",),
        why="last_backend() says native where the extension has done nothing",
    ),
    Mutant(
        name="tuning-forgets-the-op",
        kind="wrong index",
        file=f"{CORE}/tuning.py",
        old='**stored(slug).get(f"{op}/{key}", {})',
        new="**stored(slug).get(key, {})",
        tests=(
            "tests/test_conftest.py::test_stored_tuning_is_not_looked_at",
            "tests/bench/test_tune.py::test_the_file_is_what_launchers_read",
        ),
        why="measured block sizes are never found",
    ),
    Mutant(
        name="packing-may-end-early",
        kind="missing check",
        file=f"{CORE}/varlen.py",
        old="if values[-1] != total:",
        new="if values[-1] > total:",
        tests=(f"{TESTS}/test_cross_attention.py::test_error_messages",),
        why="rows that belong to no sequence come back uninitialised",
    ),
)

MUTANTS = (*REFERENCES, *CPU_PATHS, *LIBRARY, *SHARED)
