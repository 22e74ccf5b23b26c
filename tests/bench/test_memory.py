"""The meters on cases that can be counted by hand, and against each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hia_kernels
from bench.measure.footprint import fake_mode
from bench.measure.memory import CpuMeter, ProcessMeter, StorageMeter, memory_of, peak_bytes, tensors_in
from hia_kernels import use_backend
from tests.inputs import small_inputs

KB = 1024  # 256 fp32 numbers


def vector(n: int = 256) -> torch.Tensor:
    return torch.ones(n)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_views_and_in_place_ops_add_nothing(fake):
    with fake_mode() if fake else torch.no_grad(), StorageMeter() as meter:
        x = vector()
        assert meter.live == KB
        y = x.view(16, 16).t()[2:]
        y.add_(1)
        assert (meter.live, meter.peak) == (KB, KB)
        del x
        assert meter.live == KB, "a view keeps the storage alive"
        del y
        assert (meter.live, meter.peak) == (0, KB)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_freed_temporaries_stop_counting(fake):
    with fake_mode() if fake else torch.no_grad(), StorageMeter() as meter:
        x = vector()
        y = (x + 1) * 2  # x, the sum and the product are alive at once
        assert meter.peak == 3 * KB
        assert meter.live == 2 * KB
        z = y + 1
        assert meter.peak == 3 * KB, "a third tensor again, not a fourth"
        del x, y, z
    assert meter.live == 0


def test_copies_count_and_strides_do_not():
    with torch.no_grad(), StorageMeter() as meter:
        x = vector().expand(4, 256)
        assert meter.live == KB
        y = x.contiguous()
        assert meter.live == 5 * KB
        assert y.shape == x.shape


def test_sizes_are_rounded_up_to_the_granule():
    with torch.no_grad(), StorageMeter(granule=512) as meter:
        x = torch.ones(3)
        assert meter.live == 512
        y = torch.ones(129)
        assert meter.live == 512 + 1024
        del x, y


def test_shared_parameters_count_once():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    meter = StorageMeter()
    meter.track(*model.parameters())
    assert meter.live == 16 * 16 * 4


def test_a_forward_follows_all_that_its_call_allocates():
    model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)), torch.ones(32, 64)
    meter = StorageMeter()
    meter.track(*model.parameters(), x)
    given = meter.live
    with torch.no_grad():
        assert meter.measure(lambda: model(x)).peak - given == CpuMeter().measure(lambda: model(x)).peak
    assert meter.live == given


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# the ops whose plain form calls nothing that allocates inside a kernel, as a convolution does
FOLLOWED = ("condition_queries", "inject_rows", "latent_attention", "linear", "norm_linear", "row_softmax")


@pytest.mark.parametrize("op", FOLLOWED)
def test_what_an_op_of_ours_allocates_inside_is_followed_to_the_byte(op):
    """The op's own fake would show its result alone."""
    inputs, function = small_inputs(op, torch.float32), getattr(hia_kernels, op)
    with torch.no_grad(), use_backend("reference"):
        function(**inputs)
        allocated = peak_bytes(lambda: function(**inputs), "cpu")
        with fake_mode() as mode:
            fakes = {name: mode.from_tensor(x) if is_float(x) else x for name, x in inputs.items()}
            meter = StorageMeter()
            meter.track(*tensors_in(fakes))
            given = meter.live
            assert meter.measure(lambda: function(**fakes)).peak - given == allocated


def test_frozen_models_may_run_twice_in_a_meter():
    """torch's tracker refuses both by itself: it hooks every parameter's gradient, and takes one pass a model."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    meter = StorageMeter()
    meter.track(*model.parameters())
    peaks = {meter.measure(lambda: model(torch.ones(4, 16))).peak for _ in range(2)}
    assert len(peaks) == 1


def test_peak_is_what_the_call_allocates():
    held = torch.ones(1000, 1000)

    def call():
        first = held + 1  # 4 MB
        del first
        return (held + 2) * 3  # two of 4 MB at once

    assert 8e6 <= peak_bytes(call, "cpu") < 9e6


def test_memory_left_is_what_a_forward_keeps():
    x = torch.ones(1000, requires_grad=True)
    found = memory_of(lambda: (x.exp() * 2).sum(), "cpu")
    assert 4000 <= found.left <= found.peak  # exp's output is kept for the backward
    assert memory_of(lambda: None, "cpu").left == 0


def test_the_process_counts_from_when_its_meter_was_made(monkeypatch):
    from bench.measure import memory

    resident = {"VmRSS": 1000, "VmHWM": 1000}
    monkeypatch.setattr(memory, "process_peak_unavailable", lambda: None)
    monkeypatch.setattr(memory, "_status_bytes", lambda name: resident[name])
    monkeypatch.setattr(ProcessMeter, "_return_memory", lambda self: None)  # there is no way back
    meter = ProcessMeter()
    found = meter.measure(lambda: resident.update(VmRSS=1016, VmHWM=1064))
    assert (found.peak, found.left) == (64, 16)
    assert meter.measure(lambda: resident.update(VmRSS=900, VmHWM=900)).peak == 0
    monkeypatch.setattr(memory, "process_peak_unavailable", lambda: "no Linux")
    assert memory.user_meter("cpu") is None
    with pytest.raises(RuntimeError, match="ProcessMeter: no Linux"):
        ProcessMeter()
