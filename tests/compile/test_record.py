"""The recorder: a launch is what Triton would compile for it, on the target, with all that it knows of arguments."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch

import hia_kernels.ops
from bench.launches.compile import _source
from bench.launches.device import TARGETS
from bench.launches.record import _binder, launch_of, recorded
from bench.launches.workloads import Call, CompositeCall, calls, run
from bench.workloads import in_set, op_entry, ops, workloads
from hia_kernels.core import triton_support

triton = pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
tl = pytest.importorskip("triton.language")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process"),
]
FACTS = {"D": ("tt.divisibility", 16), "S": ("tt.pointer_range", 32)}
STATED = {"enable_fp_fusion": True}
SIXTEEN_BITS_ONLY = {  # attention of fp32 passes through memory
    "_cross_attention_fwd_kernel",
    "_cross_attention_bwd_dq_kernel",
    "_cross_attention_bwd_dkv_kernel",
}


@triton.jit(do_not_specialize=["free"])
def _copy_kernel(x_ptr, y_ptr, idx_ptr, count, stride, one, free, scale, HAS_IDX: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * one, mask=offs < count + free, other=0.0) * scale
    tl.store(y_ptr + offs.to(tl.int64) * stride, x, mask=offs < count)


def launch(**changes):
    """Return the arguments of a launch, on whatever device the tensors are made."""
    x, y = changes.pop("x", None), changes.pop("y", None)
    return {
        "x_ptr": x,
        "y_ptr": y,
        "idx_ptr": None,
        "count": 48,
        "stride": 3,
        "one": 1,
        "free": 16,
        "scale": 0.5,
        "HAS_IDX": False,
        "BLOCK": 64,
        "num_warps": 2,
        **changes,
    }


def one_recorded(target, offset=0, **changes):
    with recorded(TARGETS[target]) as found:
        x = torch.empty(64 + offset, dtype=torch.bfloat16, device="cuda")[offset:]
        _copy_kernel[(3, 2)](**launch(x=x, y=torch.empty(64, device="cuda"), **changes))
    ((kept, uses),) = found.launches.items()
    return kept, uses


def test_a_launch_by_hand():
    kept, uses = one_recorded("sm_90")
    assert (kept.module, kept.kernel, uses.grids) == (__name__, "_copy_kernel", (3, 2, 1))
    assert dict(kept.signature) == {
        "x_ptr": "*bf16",
        "y_ptr": "*fp32",
        "idx_ptr": "constexpr",
        "count": "i32",
        "stride": "i32",
        "one": "constexpr",
        "free": "i32",
        "scale": "fp32",
        "HAS_IDX": "constexpr",
        "BLOCK": "constexpr",
    }
    assert dict(kept.constexprs) == {"idx_ptr": None, "one": 1, "HAS_IDX": False, "BLOCK": 64}
    known = {name: facts for name, facts in kept.attributes if facts}
    assert known == dict.fromkeys(("x_ptr", "y_ptr", "count"), (FACTS["D"],))  # 48; not free, which is 16
    assert dict(kept.options) == {"num_warps": 2, "num_stages": 3}


@pytest.mark.parametrize(("target", "stages"), [("sm_80", 3), ("gfx942", 2)])
def test_options_that_the_launch_leaves_out_are_the_targets(target, stages):
    assert one_recorded(target)[0].num_stages == stages


def test_fusion_of_roundings_follows_the_launch_and_no_variable(monkeypatch):
    """Check what a launch of ours gives, where the process's default is other than Triton's."""
    with monkeypatch.context() as environment:
        environment.setenv("TRITON_DEFAULT_FP_FUSION", "0")
        _binder.cache_clear()
        by_default, stated = (dict(one_recorded("sm_90", **given)[0].options) for given in ({}, STATED))
        with recorded(TARGETS["sm_90"]) as found:
            hia_kernels.row_softmax(torch.empty(8, 64, dtype=torch.bfloat16, device="cuda"), 0.5)
    _binder.cache_clear()
    assert "enable_fp_fusion" not in by_default and stated["enable_fp_fusion"] is True
    assert [dict(kept.options)["enable_fp_fusion"] for kept in found.launches] == [True]
    assert one_recorded("sm_90", **STATED) == one_recorded("sm_90")  # the same kernel where that is the default


def test_alignment_follows_the_offset_in_the_storage():
    facts = {offset: dict(one_recorded("sm_90", offset)[0].attributes)["x_ptr"] for offset in (0, 1, 8)}
    assert facts == {0: (FACTS["D"],), 1: (), 8: (FACTS["D"],)}  # bf16: 8 elements are 16 bytes


def test_integers_are_typed_by_value():
    types = {
        value: dict(one_recorded("sm_90", stride=value)[0].signature)["stride"] for value in (1, 2, 2**31 - 1, 2**31)
    }
    assert types == {1: "constexpr", 2: "i32", 2**31 - 1: "i32", 2**31: "i64"}


def test_amd_knows_which_pointers_stay_within_2_gib():
    facts = dict(one_recorded("gfx942")[0].attributes)
    assert facts["x_ptr"] == (FACTS["D"], FACTS["S"])
    with recorded(TARGETS["gfx942"]) as found:
        large = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
        _copy_kernel[(1,)](**launch(x=large[8:64], y=large))
    assert dict(next(iter(found.launches)).attributes)["x_ptr"] == (FACTS["D"],)


@pytest.mark.parametrize("offset", [0, 1])
def test_it_is_what_triton_makes_of_real_tensors(offset):
    """Compare with Triton's own binder, on real memory, and with the key that a launch looks up in its cache."""
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = TARGETS["sm_90"]
    backend = make_backend(target.gpu_target())
    binder = create_function_from_signature(_copy_kernel.signature, _copy_kernel.params, backend)
    x = torch.empty(64 + offset, dtype=torch.bfloat16)[offset:]
    given = launch(x=x, y=torch.empty(64), debug=False, instrumentation_mode="")
    bound, specialization, rest = binder(**given)
    options, *parts = _copy_kernel._pack_args(backend, given, bound, specialization, rest)
    kept, _ = one_recorded("sm_90", offset)
    assert _source(kept).hash() == ASTSource(_copy_kernel, *parts).hash()
    assert backend.parse_options(dict(kept.options)).hash() == options.hash()


@pytest.mark.parametrize("grid", [(1, 65536), (2**31,), (0,)])
def test_a_grid_beyond_the_device_is_an_error(grid):
    with pytest.raises(ValueError, match="_copy_kernel: grid must be within"), recorded(TARGETS["sm_90"]):
        _copy_kernel[grid](**launch(x=torch.empty(64, device="cuda"), y=torch.empty(64, device="cuda")))


def test_launches_are_launches_again_after_an_exception():
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    with pytest.raises(ZeroDivisionError), recorded(TARGETS["sm_90"]):
        raise ZeroDivisionError
    assert JITFunction.run is before


def kernels_of_the_ops():
    found = set()
    for op in pkgutil.iter_modules(hia_kernels.ops.__path__):
        package = importlib.import_module(f"hia_kernels.ops.{op.name}")
        for part in pkgutil.iter_modules(package.__path__):
            if part.name.startswith("triton_"):
                module = importlib.import_module(f"{package.__name__}.{part.name}")
                found |= {
                    name
                    for name, value in vars(module).items()
                    if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
                }
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_launched(target, recording):
    """Find every kernel launched in 16 bits, and in fp32 where it takes that."""
    by_dtype = {"16": set(), "fp32": set()}
    for kept, uses in recording(target).launches.items():
        for workload in uses.workloads:
            by_dtype["fp32" if workload.split(" ")[-2] == "fp32" else "16"].add(kept.kernel)
    kernels = kernels_of_the_ops()
    assert len(kernels) > 20
    assert by_dtype["16"] == kernels
    assert by_dtype["fp32"] == kernels - SIXTEEN_BITS_ONLY


@pytest.mark.parametrize("target", TARGETS)
def test_only_cudnn_is_refused(target, recording):
    """Refuse only cuDNN, which AMD lacks and which counts elements in 32 bits."""
    for workload, reason in recording(target).refused:
        assert workload.endswith(" cudnn"), f"{workload}: {reason}"
        assert "2^31" in workload or target == "gfx942", f"{workload}: {reason}"


def test_both_passes_are_recorded_by_every_row_of_the_table():
    call = next(call for call in calls(["norm_linear"]) if call.dtype == "bf16")
    with recorded(TARGETS["sm_90"]) as found:
        run(call, found)
    rows = {workload.rsplit(" ", 1)[1] for uses in found.launches.values() for workload in uses.workloads}
    assert rows == {"triton", "cublas"} and not found.refused
    assert {"_norm_linear_fused_kernel", "_norm_linear_rows_kernel", "_norm_linear_bwd_dx_kernel"} <= {
        kept.kernel for kept in found.launches
    }


def test_a_composite_is_recorded_as_it_is_measured():
    """Record launches of composites that no op's workload has.

    These are the shortcut's convolution, folded, a step's split sums, and the backward for the parameters that a
    training step differentiates.
    """
    for op, kernel, expected in (
        ("encode", "_conv_norm_act_fwd_kernel", {"KERNEL": 1, "STRIDE": 2, "ACTIVATION": "none", "SPLITS": 1}),
        ("encode", "_conv_norm_act_reduce_kernel", {"ACTIVATION": "relu", "SPLITS": 6}),
        ("encode_train_step", "_conv_norm_act_bwd_kernel", {"KERNEL": 1, "STRIDE": 2, "ACTIVATION": "none"}),
    ):
        call = next(call for call in calls([op]) if "px448 " in call.label)
        with recorded(TARGETS["sm_90"]) as found:
            run(call, found)
        assert {workload for uses in found.launches.values() for workload in uses.workloads} == {f"{call.label} chosen"}
        values = [dict(kept.constexprs) for kept in found.launches if kept.kernel == kernel]
        assert any(expected.items() <= each.items() for each in values), f"{op}: {values}"


def test_dtypes_follow_a_rule():
    """Record bf16 everywhere; the other dtypes at an op's first workload of each role, and at its edges."""
    for op in ops():
        edges = {(edge.name, edge.dtype) for edge in op_entry(op).edges}
        gpu = [workload for workload in workloads(op) if in_set(workload, "gpu")]
        first = {workload.role: workload.name for workload in reversed(gpu)}
        found = {
            dtype: {call.name for call in calls([op]) if call.dtype == dtype and (call.name, dtype) not in edges}
            for dtype in ("bf16", "fp16", "fp32")
        }
        assert found["bf16"] == {workload.name for workload in gpu}
        assert found["fp16"] == found["fp32"] == set(first.values())


def test_before_hopper_a_1x1_convolution_has_more_warps(recording):
    """Find eight warps: with four it would spill, having the operands in registers beside the residual's addresses."""
    warps = {}
    for target in ("sm_80", "sm_90"):
        for kept in recording(target).launches:
            values = dict(kept.constexprs)
            if kept.kernel == "_conv_norm_act_fwd_kernel" and dict(kept.signature)["x_ptr"] != "*fp32":
                tile = values["BLOCK_M"], values["BLOCK_OC"]
                warps.setdefault((target, values["KERNEL"], tile), set()).add(kept.num_warps)
    assert warps["sm_80", 1, (128, 64)] == {8} and warps["sm_90", 1, (128, 64)] == {4}
    assert warps["sm_80", 3, (128, 64)] == {4} and warps["sm_80", 1, (64, 64)] == {4}


def test_unknown_op():
    with pytest.raises(ValueError, match=r"ops must be among .*stem.*, got nothing"):
        calls(["nothing"])


def test_labels_are_unique():
    labels = [call.label for call in calls()]
    assert len(labels) == len(set(labels)) and all(isinstance(call, Call | CompositeCall) for call in calls())


def test_tensors_of_the_host_have_their_own_address():
    x = torch.empty(65, dtype=torch.bfloat16)[1:]
    assert dict(launch_of(_copy_kernel, TARGETS["sm_90"], (), launch(x=x, y=x)).attributes)["x_ptr"] == ()
