"""``hia::conv_norm_act`` through cuDNN: which shapes take it; without a GPU, another convolution replaces cuDNN's."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from hia_kernels import conv_norm_act, last_backend, use_backend
from hia_kernels.core import triton_support, tuning
from hia_kernels.ops.conv_norm_act import cudnn, library
from hia_kernels.ops.conv_norm_act.reference import conv_norm_act_ref
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, assert_matches, assert_repeatable

pytest.importorskip("triton", reason="NO TRITON: what follows cuDNN's convolution is not tested")

OP = "conv_norm_act"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param((9, 12), {"kernel": 1, "activation": "none"}, id="1x1-none"),
    pytest.param((9, 13), {"residual": True}, id="3x3-relu-residual"),
    pytest.param((7, 11), {"stride": 2, "activation": "gelu", "residual": True, "nchw": True}, id="3x3-s2-gelu-odd"),
    pytest.param((10, 7), {"kernel": 1, "stride": 2, "channels": (13, 5)}, id="1x1-s2-ragged-channels"),
    pytest.param((5, 4), {"channels": (1, 140)}, id="one-channel-in"),
    pytest.param((1, 1), {"images": 1, "residual": True}, id="one-pixel"),
    pytest.param((8, 8), {"images": 0, "residual": True}, id="no-images"),
]


def as_cudnn(calls):
    """Compute what ``torch.cudnn_convolution`` does, and append its arguments to ``calls``."""

    def convolution(x, weight, padding, stride, dilation, groups, **flags):
        calls.append({"x": x, "weight": weight, "groups": groups, "dilation": dilation, **flags})
        wide = x.float() if x.dtype != torch.float64 else x
        y = F.conv2d(wide, weight.to(wide.dtype), stride=stride, padding=padding)
        return y.to(x.dtype, memory_format=torch.channels_last)

    return convolution


@pytest.fixture
def calls(monkeypatch, triton_device):
    """Make the backend run: on the GPU as it is, in the interpreter with another convolution."""
    found = []
    if triton_device == "cuda":
        original = torch.cudnn_convolution
        monkeypatch.setattr(torch, "cudnn_convolution", lambda *a, **k: (found.append(k), original(*a, **k))[1])
        return found
    row = dataclasses.replace(library.BACKENDS.backends[0], unavailable_reasons=list)
    assert row.name == "cudnn"
    monkeypatch.setattr(library.BACKENDS, "backends", [row, *library.BACKENDS.backends[1:]])
    monkeypatch.setattr(torch, "cudnn_convolution", as_cudnn(found))
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize(("size", "options"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(size, options, dtype, calls, triton_device):
    inputs = make_inputs(size, dtype, triton_device, **options)
    with use_backend("cudnn"):
        assert_matches(OP, conv_norm_act, conv_norm_act_ref, inputs, dtype)
    assert last_backend(OP) == "cudnn"
    assert len(calls) == (options.get("images") != 0)
    for call in calls:
        assert call["deterministic"] and not call["benchmark"] and call["allow_tf32"] is False


@pytest.mark.interpreter
def test_nothing_is_copied_to_reach_channels_last(calls, triton_device):
    if triton_device == "cuda":
        pytest.skip("looks into the convolution that stands for cuDNN's")
    inputs = make_inputs((9, 7), torch.float16, triton_device, images=2)
    inputs["weight"] = inputs["weight"].contiguous(memory_format=torch.channels_last)
    with use_backend("cudnn"):
        conv_norm_act(**inputs)
    (call,) = calls
    for name in ("x", "weight"):
        assert call[name].data_ptr() == inputs[name].data_ptr()
        assert call[name].is_contiguous(memory_format=torch.channels_last)
    assert call["groups"] == 1 and call["dilation"] == [1, 1]


@pytest.mark.interpreter
def test_nan_stays_in_its_image(calls, triton_device):
    inputs = make_inputs((9, 7), torch.float32, triton_device, images=2, residual=True)
    dirty = inputs["x"].clone()
    dirty[0] = float("nan")
    with use_backend("cudnn"):
        clean, out = conv_norm_act(**inputs), conv_norm_act(**{**inputs, "x": dirty})
    assert torch.equal(out[1], clean[1]) and out[0].isnan().all()


@pytest.mark.interpreter
def test_two_runs_are_bit_identical(calls, triton_device):
    with use_backend("cudnn"):
        assert_repeatable(OP, conv_norm_act, make_inputs((9, 13), torch.float32, triton_device, residual=True))


@pytest.mark.interpreter
def test_auto_takes_it_where_it_was_measured_to_be_faster(calls, triton_device, monkeypatch):
    """Take it forward and backward alike, at that shape alone."""
    measured = {}
    monkeypatch.setattr(tuning, "measured_backend", lambda op, key, device: measured.get(f"{op}/{key}"))
    monkeypatch.delenv("HIA_BACKEND", raising=False)
    inputs = make_inputs((9, 12), torch.float32, triton_device)
    x = inputs["x"].requires_grad_()
    key = cudnn.backend_key(x, inputs["weight"], 1)
    assert key == "k3s1-px128-c16-oc24-float32"

    def backends():
        out = conv_norm_act(**inputs)
        forward = last_backend(OP)
        out.sum().backward()
        return forward, last_backend(OP)

    assert backends() == ("triton", "triton")
    measured[f"{OP}/{key}"] = "triton"
    assert backends() == ("triton", "triton") and not calls
    measured[f"{OP}/{key}"] = "cudnn"
    assert backends() == ("cudnn", "cudnn")
    inputs["stride"] = 2
    assert backends() == ("triton", "triton")
    assert len(calls) == 1


def test_the_key_follows_one_image_not_the_batch():
    weight = torch.empty(32, 16, 3, 3)
    one, many = torch.empty(1, 224, 224, 16, dtype=torch.bfloat16), torch.empty(9, 200, 180, 16, dtype=torch.bfloat16)
    keys = {cudnn.backend_key(x, weight, 1) for x in (one, many)}
    assert keys == {"k3s1-px65536-c16-oc32-bfloat16"}
    assert cudnn.backend_key(one, weight, 2) == "k3s2-px16384-c16-oc32-bfloat16"


def test_the_file_of_the_device_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_slug_of", lambda device: "fake-9000")
    content = {"configurations": {}, "backends": {f"{OP}/k3s1-px128-c16-oc24-float32": "cudnn"}}
    (tmp_path / "fake-9000.json").write_text(json.dumps(content))
    tuning.stored_backends.cache_clear()
    forward = make_inputs((9, 12), torch.float32)
    backward = {
        "dout": torch.empty(2, 9, 12, 24),
        **forward,
        "out": torch.empty(2, 9, 12, 24),
        "output_mask": [True] * 5,
    }
    assert cudnn.slower_reasons(OP, **forward) == cudnn.slower_reasons(f"{OP}_bwd", **backward) == []
    assert cudnn.slower_reasons(OP, **make_inputs((5, 4), torch.float32)) == [
        "nothing was measured at k3s1-px32-c16-oc24-float32"
    ]
    tuning.stored_backends.cache_clear()


def test_a_slower_one_says_so(monkeypatch):
    monkeypatch.setattr(tuning, "measured_backend", lambda *_: "triton")
    found = cudnn.slower_reasons(OP, **make_inputs((9, 12), torch.float32))
    assert found == ["triton was faster at k3s1-px128-c16-oc24-float32"]


def test_reasons(monkeypatch):
    monkeypatch.setattr(triton_support, "device_reasons", lambda tensor: [])
    weight = torch.empty(64, 1, 1, 1, device="meta")
    large = torch.empty(2**11, 2**10, 2**10, 1, device="meta")
    found = cudnn.unsupported_reasons(OP, x=large, weight=weight, stride=2)
    assert found == [
        "x must have at most 2147483647 elements, got 2147483648",
        "the result must have at most 2147483647 elements, got 34359738368",
    ]
    none = torch.empty(2, 3, 3, 0, device="meta")
    found = cudnn.unsupported_reasons(OP, x=none, weight=none.permute(0, 3, 1, 2), stride=1)
    assert found == ["x must have channels, got 0"]
    monkeypatch.undo()
    inputs = make_inputs((4, 3), torch.float64)
    assert "float64 is left to the reference" in cudnn.unsupported_reasons(OP, **inputs)


def test_unavailable_reasons(monkeypatch):
    monkeypatch.setattr(triton_support, "unavailable_reasons", list)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert cudnn.unavailable_reasons() == ["this build of torch has no cuDNN"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cudnn.unavailable_reasons() == []
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn.unavailable_reasons() == ["torch.backends.cudnn.enabled is off"]
    monkeypatch.setattr(triton_support, "unavailable_reasons", lambda: ["the package triton is not installed"])
    assert cudnn.unavailable_reasons()[0] == "the package triton is not installed"


def test_forced_where_there_is_none_says_why():
    if not cudnn.unavailable_reasons():
        pytest.skip("there is one")
    with (
        use_backend("cudnn"),
        pytest.raises(NotImplementedError, match="HIA_BACKEND=cudnn can't run this call: cudnn: "),
    ):
        conv_norm_act(**make_inputs((4, 3), torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resnet_steps(dtype):
    for size, options in (
        ((112, 112), {"channels": (64, 64)}),
        ((112, 112), {"channels": (128, 128), "stride": 2}),
        ((28, 28), {"channels": (512, 2048), "kernel": 1, "residual": True}),
    ):
        with use_backend("cudnn"):
            inputs = make_inputs(size, dtype, "cuda", **options)
            assert_matches(OP, _with_tf32_allowed, conv_norm_act_ref, inputs, dtype)
        assert last_backend(OP) == "cudnn"


def _with_tf32_allowed(**inputs):
    """Allow TF32, which must not matter to us; the reference, whose error is the bound, runs without."""
    torch.backends.cudnn.allow_tf32 = True
    try:
        return conv_norm_act(**inputs)
    finally:
        torch.backends.cudnn.allow_tf32 = False
