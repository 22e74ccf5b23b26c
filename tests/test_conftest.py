"""Promises of ``tests/conftest.py`` and ``tests/ops/harness.py`` to every test."""

import os

import hypothesis
import pytest
import torch

from hia_kernels import row_softmax, use_backend
from hia_kernels.core import triton_support, tuning
from hia_kernels.ops.row_softmax.reference import row_softmax_ref
from tests import conftest
from tests.inputs import inputs_of
from tests.ops import harness

HEURISTIC = {"BLOCK_R": 8, "num_warps": 4}


def test_stored_tuning_is_not_looked_at(monkeypatch):
    """A block size measured on this machine would be picked, were it not for the fixture."""
    monkeypatch.setattr(tuning, "_slug", lambda _index: "fake-9000")
    monkeypatch.setattr(tuning, "stored", lambda slug: {"fake/fwd": {"BLOCK_R": 64}})
    device = torch.device("cuda", 0)
    assert tuning.pick("fake", "fwd", device, HEURISTIC) == HEURISTIC
    monkeypatch.setenv("HIA_TUNED", "1")
    assert tuning.pick("fake", "fwd", device, HEURISTIC) == {**HEURISTIC, "BLOCK_R": 64}


def test_drawn_examples_are_the_same_in_every_run():
    """A fresh random example now and then makes a suite red that nobody has changed."""
    if os.environ.get("HYPOTHESIS_PROFILE", "same") == "same":
        assert hypothesis.settings.default.derandomize and hypothesis.settings.default.database is None
        assert hypothesis.settings(max_examples=3).derandomize  # a test's own settings keep it


def test_workers_share_the_processors(monkeypatch):
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    conftest.pytest_configure()
    assert threads == []  # somebody asked for a number
    monkeypatch.delenv("OMP_NUM_THREADS")
    conftest.pytest_configure()
    assert threads == [2] and os.environ["OMP_NUM_THREADS"] == "2"


class Item:
    """A collected test, as far as the hook looks at it."""

    def __init__(self, *markers):
        self.markers = list(markers)

    def get_closest_marker(self, name):
        return next((marker for marker in self.markers if marker == name), None)

    def add_marker(self, marker):
        self.markers.append(marker if isinstance(marker, str) else marker.name)


def collected(monkeypatch, *, gpu, interpreted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(triton_support, "interpreted", lambda: interpreted)
    items = [Item("interpreter"), Item("gpu"), Item()]
    conftest.pytest_collection_modifyitems(items)
    return [item.markers for item in items]


def test_the_gpu_tier_runs_what_the_interpreter_runs(monkeypatch):
    assert collected(monkeypatch, gpu=True, interpreted=False) == [["interpreter", "gpu"], ["gpu"], []]
    assert collected(monkeypatch, gpu=True, interpreted=True) == [["interpreter"], ["gpu"], []]
    assert collected(monkeypatch, gpu=False, interpreted=True) == [["interpreter"], ["gpu", "skip"], []]


def test_on_a_gpu_the_reference_does_not_pass_for_a_kernel(monkeypatch):
    inputs = inputs_of("row_softmax")(3, 5, torch.float32)
    arguments = "row_softmax", row_softmax, row_softmax_ref, inputs, torch.float32
    with use_backend("reference"):
        harness.assert_matches(*arguments)
        monkeypatch.setattr(harness, "device_type", lambda inputs: "cuda")
        with pytest.raises(AssertionError, match=r"row_softmax was served by \['reference', 'reference'\]"):
            harness.assert_matches(*arguments)
