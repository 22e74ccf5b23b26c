"""Faults in the benchmarks: a wrong number is worse than none."""

from __future__ import annotations

from .mutant import Mutant

TESTS = "tests/bench"

CLOCKS = (
    Mutant(
        name="gpu-time-read-before-the-end",
        kind="timing without synchronisation",
        file="bench/timing.py",
        old="torch.cuda.synchronize()",
        new="pass",
        after="end.record()",
        tests=(f"{TESTS}/test_timing.py::test_a_repetition_on_cuda_is_cold_and_waited_for",),
        why="a kernel's time is that of its launch",
    ),
    Mutant(
        name="gpu-cache-left-warm",
        kind="wrong measure",
        file="bench/timing.py",
        old="self._cache.zero_()",
        new="pass",
        tests=(f"{TESTS}/test_timing.py::test_a_repetition_on_cuda_is_cold_and_waited_for",),
        why="inputs that fit into L2 are read at more than the memory's bandwidth",
    ),
    Mutant(
        name="dispatch-counts-the-kernels-before",
        kind="timing without synchronisation",
        file="bench/timing.py",
        old="synchronize(self._device)",
        new="pass",
        after="the device's queue must not fill",
        tests=(f"{TESTS}/test_timing.py::test_dispatch_waits_before_and_after",),
        why="what the CPU does for a call includes waiting for the calls before",
    ),
    Mutant(
        name="first-call-is-no-warm-up",
        kind="wrong measure",
        file="bench/timing.py",
        old="if one < SLOW_MS:",
        new="if one < 0:",
        tests=(f"{TESTS}/test_timing.py::test_short_calls_are_repeated_within_a_repetition",),
        why="compilation and first allocations count as a repetition",
    ),
    Mutant(
        name="percentiles-are-not-interpolated",
        kind="wrong measure",
        file="bench/timing.py",
        old="return ordered[low] + (ordered[high] - ordered[low]) * (place - low)",
        new="return ordered[low]",
        tests=(f"{TESTS}/test_timing.py::test_percentiles",),
        why="p20 and p80 of few repetitions are too low",
    ),
    Mutant(
        name="peak-is-what-is-left",
        kind="wrong measure",
        file="bench/timing.py",
        old="highest = max(highest, level)",
        new="highest = level",
        tests=(f"{TESTS}/test_timing.py::test_peak_is_what_the_call_allocates",),
        why="temporaries cost nothing",
    ),
)

COUNTS = (
    Mutant(
        name="backward-counts-the-forward-too",
        kind="FLOPs counted twice",
        file="bench/costs.py",
        old='return both if mode == "both" else both - forward',
        new="return both",
        tests=(f"{TESTS}/test_kernels.py::test_costs_of_attention_are_those_of_its_page",),
        why="a backward seems to run at more than the device can do",
    ),
    # To be ported: the line moves from costs.py to the ops' own inputs.py.
    Mutant(
        name="gathered-rows-cost-the-whole-tensor",
        kind="wrong measure",
        file="bench/costs.py",
        old='(inputs["row_idx"].shape[0] - source.shape[0]) * source.shape[1]',
        new="0 * source.shape[1]",
        tests=(f"{TESTS}/test_kernels.py::test_gathering_reads_the_rows_that_are_named",),
        why="a floor holds rows that nobody reads, and ops seem to beat the memory",
    ),
    Mutant(
        name="table-counts-attention-twice",
        kind="FLOPs counted twice",
        file="bench/formulas.py",
        old="layer = 2 * tokens * weights + 4 * tokens * tokens * width",
        new="layer = 2 * tokens * weights + 8 * tokens * tokens * width",
        tests=(f"{TESTS}/test_formulas.py::test_formula_is_within_2_percent_of_the_count_on_the_13b_host[baseline]",),
        why="Table 3's FLOPs are not those of the model that runs",
    ),
    Mutant(
        name="floor-takes-the-faster-limit",
        kind="wrong measure",
        file="bench/limits.py",
        old="return 1e3 * max(moved",
        new="return 1e3 * min(moved",
        tests=(f"{TESTS}/test_timing.py::test_floor_is_the_slower_of_memory_and_arithmetic",),
        why="no op ever seems to be near its limit",
    ),
    Mutant(
        name="allocations-rounded-down",
        kind="off by one at an edge",
        file="bench/tracking.py",
        old="size = -(-storage.nbytes() // self.granule) * self.granule",
        new="size = storage.nbytes() // self.granule * self.granule",
        tests=(f"{TESTS}/test_tracking.py::test_sizes_are_rounded_up_to_the_granule",),
        why="small tensors take no memory in the prediction",
    ),
    Mutant(
        name="views-count-as-memory",
        kind="wrong measure",
        file="bench/tracking.py",
        old="self.live += size - self._sizes.get(key, 0)",
        new="self.live += size",
        tests=(f"{TESTS}/test_tracking.py::test_views_and_in_place_ops_add_nothing",),
        why="every view of a tensor takes its memory again",
    ),
)

VERDICTS = (
    Mutant(
        name="ratio-is-upside-down",
        kind="wrong measure",
        file="bench/compare.py",
        old="return [now / base for base, now in",
        new="return [base / now for base, now in",
        tests=(f"{TESTS}/test_compare.py::test_median_of_the_pairs_decides_and_none_may_contradict",),
        why="make bench-compare fails where the code became faster",
    ),
    Mutant(
        name="slower-is-called-faster",
        kind="sign",
        file="bench/compare.py",
        old='word = "slower" if self.ratio > 1 else "faster"',
        new='word = "slower" if self.ratio < 1 else "faster"',
        tests=(f"{TESTS}/test_compare.py::test_median_of_the_pairs_decides_and_none_may_contradict",),
        why="a regression passes",
    ),
    Mutant(
        name="uncommitted-changes-are-not-recorded",
        kind="lost state",
        file="bench/environment.py",
        old='"dirty": dirty(),',
        new='"dirty": None,',
        tests=(f"{TESTS}/test_timing.py::test_anything_else_is",),
        why="a record names a commit that its numbers are not of",
    ),
    Mutant(
        name="a-failed-gate-is-timed",
        kind="missing check",
        file="bench/kernels.py",
        old="if problem is not None:",
        new='if problem == "":',
        after="return refusal(raised, [str(warning.message)",
        tests=(f"{TESTS}/test_kernels.py::test_a_peer_that_fails_is_a_red_row_and_absence_a_reason",),
        why="a provider that computes something else wins the comparison",
    ),
    # To be ported, both: the policy moves to hia_kernels/testing.py, and the gate asks it there.
    Mutant(
        name="tolerance-ten-times-as-wide",
        kind="loosened tolerance",
        file="bench/tolerance.py",
        old="bound = 2 * rel_rms(plain, exact)",
        new="bound = 20 * rel_rms(plain, exact)",
        tests=("tests/ops/test_core.py::TestTolerance::test_rounding_passes_and_more_does_not",),
        why="kernels may be ten times as wrong as plain PyTorch",
    ),
    Mutant(
        name="kinks-excuse-any-gradient",
        kind="loosened tolerance",
        file="bench/gate.py",
        old="comparable = name == KINKED and self.dtype",
        new="comparable = self.dtype",
        tests=(f"{TESTS}/test_figures.py::test_flipped_kinks_are_let_through_in_the_encoders_gradient_alone",),
        why="what is let through where ReLUs flip is let through everywhere",
    ),
)

MUTANTS = (*CLOCKS, *COUNTS, *VERDICTS)
