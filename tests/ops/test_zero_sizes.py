"""Axes of size 0: the reference's result, forward and backward. In a process of its own, which may die."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import backend
from hia_kernels.ops.cross_attention.inputs import packing
from tests.ops.harness import assert_identical

ROOT = Path(__file__).resolve().parents[2]


def _attention(queries, keys, heads):
    q, k = torch.ones(queries, heads, 32), torch.ones(keys, heads, 32)
    return {"q": q, "k": k, "v": k.clone(), **packing([queries], [keys])}


def _heads(images, heads, rows, channels, dim, merge):
    x, weight = torch.ones(images, heads, rows, channels), torch.ones(heads, dim, channels)
    return {"x": x, "weight": weight, "merge_heads": merge}


CALLS = {
    "attention-no-heads": ("cross_attention", lambda: _attention(7, 9, 0), ("q", "k", "v")),
    "attention-no-queries": ("cross_attention", lambda: _attention(0, 9, 2), ("q", "k", "v")),
    "attention-no-keys": ("cross_attention", lambda: _attention(7, 0, 2), ("q", "k", "v")),
    **{
        f"head-linear-{'merged-' if merge else ''}without-{name}": (
            "head_linear",
            lambda place=place, merge=merge: _heads(*(0 if i == place else 2 + i for i in range(5)), merge),
            ("x", "weight"),
        )
        for place, name in enumerate(("images", "heads", "rows", "channels", "dim"))
        for merge in (False, True)
    },
}


def check(case):
    """Compare every row that runs here with the reference, bit for bit: sums of nothing are 0."""
    op, draw, wrt = CALLS[case]
    inputs = draw()
    results = {}
    for name in ("auto", *(row.name for row in backend.TABLES[op].backends)):
        row = backend.TABLES[op].row(name)
        if row is None or not (row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)):
            with use_backend(name):
                leaves = {key: x.requires_grad_() if key in wrt else x for key, x in inputs.items()}
                out = getattr(hia_kernels, op)(**leaves)
                grads = torch.autograd.grad(out.sum(), [leaves[key] for key in wrt], allow_unused=True)
            results[name] = {"out": out.detach(), **dict(zip(wrt, grads, strict=True))}
    for found in results.values():
        assert_identical(found, results["reference"])


@pytest.mark.parametrize("case", CALLS)
def test_is_the_references(case):
    code = f"from tests.ops.test_zero_sizes import check; check({case!r})"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"


@pytest.mark.parametrize("sizes", [(0, 4), (3, 0)], ids=["in", "out"])
def test_a_convolution_without_channels_is_refused(sizes):
    channels, out_channels = sizes
    x, weight, ones = torch.ones(2, 5, 4, channels), torch.ones(out_channels, channels, 3, 3), torch.ones(out_channels)
    with pytest.raises(ValueError, match="hia::conv_norm_act: weight must have at least one channel in and out"):
        hia_kernels.conv_norm_act(x, weight, ones, ones)
