"""Faults in what checks arguments, and in what keeps results and memory apart."""

from __future__ import annotations

from .mutant import Mutant

OPS, CORE = "hia_kernels/ops", "hia_kernels/core"
TESTS = "tests/ops"
CONTRACT = f"{TESTS}/test_contract.py"

MUTANTS = (
    Mutant(
        name="the-op-checks-nothing",
        kind="missing check",
        file=f"{CORE}/registration.py",
        old="check(arguments)",
        new="pass",
        after="    def run(*args: Any) -> Any:",
        tests=(f"{CONTRACT}::test_every_tensor_is_checked_at_the_op[cross_attention-real]",),
        why="called directly, kernels read other memory",
    ),
    Mutant(
        name="fake-tensors-are-not-checked",
        kind="missing check",
        file=f"{CORE}/registration.py",
        old="check(arguments)",
        new="pass",
        after="    def run(*args: Any, **kwargs: Any) -> Any:",
        tests=(f"{CONTRACT}::test_every_tensor_is_checked_at_the_op[linear-fake]",),
        why="what can't run is compiled and exported",
    ),
    Mutant(
        name="a-size-may-differ",
        kind="missing check",
        file=f"{CORE}/checks.py",
        old="if bound is not size and not expect_true(bound == size):",
        new="if bound is not size and not expect_true(bound <= size):",
        tests=(f"{CONTRACT}::test_every_tensor_is_checked_at_the_op[norm_linear-real]",),
        why="a longer argument is cut without a word",
    ),
    Mutant(
        name="layouts-are-not-checked",
        kind="missing check",
        file=f"{CORE}/checks.py",
        old="if tensor.layout is not _STRIDED:",
        new="if False:",
        tests=(f"{CONTRACT}::test_every_tensor_is_checked_at_the_op[linear-real]",),
        why="a sparse tensor's error is some library's, deep inside",
    ),
    Mutant(
        name="a-bool-is-an-int",
        kind="missing check",
        file=f"{CORE}/call.py",
        old="if isinstance(value, bool | Tensor):",
        new="if isinstance(value, Tensor):",
        tests=(f"{CONTRACT}::test_other_types_are_named[conv_norm_act]",),
        why="stride=True is a stride of 1",
    ),
    Mutant(
        name="in-place-ops-lose-gradients",
        kind="missing check",
        file=f"{CORE}/transforms.py",
        old="if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):",
        new="if False:",
        after="    names = [argument.name for argument in overload._schema.arguments]",
        tests=(f"{CONTRACT}::test_gradients_are_not_lost[row_softmax_]",),
        why="a graph through what was overwritten gives wrong gradients",
    ),
    Mutant(
        name="onednn-reads-a-strided-bias",
        kind="wrong index",
        file=f"{OPS}/conv_norm_act/cpu.py",
        old="shift = None if shift is None else shift.contiguous()",
        new="pass",
        tests=(f"{CONTRACT}::test_strides_change_nothing[conv_norm_act-cpu]",),
        why="a column of a table is read as the elements beside it",
    ),
    Mutant(
        name="results-are-views",
        kind="wrong shape",
        file=f"{CORE}/fresh.py",
        old="x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape)",
        new="x.view(shape)",
        tests=(f"{TESTS}/test_fresh.py::test_what_comes_back_can_be_written_to[conv_norm_act-cpu]",),
        why="y += 1 raises in training",
    ),
)
