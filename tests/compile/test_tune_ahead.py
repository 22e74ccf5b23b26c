"""Candidates of a tuning, recorded before it, so that they can be compiled in parallel."""

from __future__ import annotations

from bench.launches.device import TARGETS
from bench.tune.ahead import launches_of, target_of
from bench.tune.run import tasks_of
from bench.workloads import gpu_workloads
from hia_kernels.ops.conv_norm_act.inputs import Shape

HOPPER = TARGETS["sm_90"]


def blocks_of(launches, kernel, **constexprs):
    """List the blocks, warps and stages of a kernel's launches."""
    found = set()
    for launch in launches:
        known = dict(launch.constexprs)
        if launch.kernel == kernel and constexprs.items() <= known.items():
            found.add((known["BLOCK_M"], known["BLOCK_N"], launch.num_warps, launch.num_stages))
    return found


def test_every_candidate_of_a_key_is_recorded_and_the_heuristic():
    task = next(one for one in gpu_workloads() if one.op == "cross_attention" and one.name == "13b-896-2img:extract")
    launches = launches_of([task], "bf16", HOPPER)
    forward = blocks_of(launches, "_cross_attention_fwd_kernel", D=128)
    assert {(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2)} <= forward and len(forward) == 6
    tails = [dict(one.constexprs)["TAIL_IN_LOOP"] for one in launches if one.kernel == "_cross_attention_fwd_kernel"]
    assert {0, 1} == set(tails), "the partial block inside the loop is tried too"
    assert len(blocks_of(launches, "_cross_attention_bwd_dq_kernel", D=128)) == 6
    assert len(launches) == len(set(launches))


def test_a_convolution_of_a_race_is_recorded_too():
    shapes = [one for one in tasks_of(["conv_norm_act"]) if isinstance(one, Shape)]
    launches = launches_of(shapes[:1], "bf16", HOPPER)
    assert {launch.kernel for launch in launches} >= {"_conv_norm_act_fwd_kernel", "_conv_norm_act_reduce_kernel"}


def test_targets_are_found_by_capability():
    assert target_of((9, 0)) == "sm_90" and target_of((7, 5)) is None
