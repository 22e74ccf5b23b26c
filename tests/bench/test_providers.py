"""Providers: equal maths on equal weights, and why one can't run."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import workloads
from bench.providers import layers, peers
from hia_kernels.testing import rel_rms


def workload(op, case, role=""):
    return workloads.Workload(op, workloads.CASES[case], role)


@pytest.mark.parametrize("op", [op for op in workloads.composites() if workloads.entry(op).parts])
def test_released_port_and_ours_agree_on_the_same_weights(op):
    found = workload(op, "tiny-released")
    given = workloads.make_inputs(found, torch.float64, "cpu")
    weights = layers.make_weights(found.case, torch.float64, "cpu")
    outs = []
    for step in (layers.our_step(found.case, weights), layers.released_step(found.case, weights)):
        arguments = layers.arguments_of(step, op, given)
        with torch.no_grad():
            outs.append(getattr(step, op)(**{**arguments, "hidden": given["hidden"].clone()})[0])
    assert rel_rms(outs[1], outs[0]) < 1e-7  # its normalised pixels are fp32
    changed = outs[0].shape == given["hidden"].shape and not torch.equal(outs[0], given["hidden"])
    assert changed or op == "extract", "an injection that does nothing proves nothing"


def test_reasons_on_a_fake_gpu(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: sys.modules[__name__])
    found = {peer.name: peer for peer in peers.ATTENTIONS}
    wide = workload("cross_attention", "13b-released-896-2img", "extract")
    narrow = workload("cross_attention", "13b-896-2img", "extract")
    half = torch.bfloat16

    def reason(name, dtype, where):
        return found[name].unavailable_reason("cuda", dtype, where, "forward")

    assert reason("flash_attn_2", half, narrow) is None
    assert reason("flash_attn_2", half, wide) == "head_dim 640 is above its 256"
    assert reason("flash_attn_2", torch.float32, narrow) == "takes float16 or bfloat16 only"
    assert reason("sdpa_efficient", half, wide) is None and reason("xformers", half, wide) is None
    assert reason("ffpa", half, narrow) == "hands head_dim 128, below 320, to SDPA"
    assert reason("ffpa", half, wide) == "hands fewer than 512 queries or keys to SDPA"
    assert reason("ffpa_cutedsl", half, wide) is None


def test_missing_and_broken_packages_are_reasons(monkeypatch):
    assert peers.import_problem("no_such_package_here") == "no_such_package_here is not installed"

    def broken(name):
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(peers.importlib, "import_module", broken)
    assert peers.import_problem("flash_attn") == "flash_attn is broken: OSError: libcudart.so.13: cannot open"
