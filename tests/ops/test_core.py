"""Parts that ops share: argument checks, backend choice, packing, autocast, the poison of these tests, the policy."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import hia_kernels
from hia_kernels import norm_linear
from hia_kernels.core import checks, cudnn, registration, tuning, varlen
from hia_kernels.testing import assert_close, rel_rms
from tests.inputs import OPS, differentiable, inputs_of, small_inputs

F32 = torch.float32


def _convolution_switches():
    """Return all that cuDNN's convolutions look at; the old switch is unreadable while the new ones disagree."""
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        allowed = "mixed"
    precisions = [torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision]
    return [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, allowed, *precisions]


def _allow_by_the_old_switch():
    torch.backends.cudnn.allow_tf32 = True


def _allow_by_the_new_switch():
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def _allow_everywhere():
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.fp32_precision = "tf32"


def _allow_by_both():
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.fp32_precision = "tf32"


class TestExactConvolutions:
    @pytest.fixture(autouse=True)
    def as_it_was(self):
        yield
        torch.backends.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False

    @pytest.mark.parametrize(
        "allow", [_allow_by_the_old_switch, _allow_by_the_new_switch, _allow_everywhere, _allow_by_both]
    )
    def test_no_tf32_inside_whoever_allowed_it(self, allow):
        allow()
        torch.backends.cudnn.benchmark = True
        before = _convolution_switches()
        assert before[3] == "tf32"
        with pytest.raises(KeyError), cudnn.exact():
            deterministic, benchmark, allowed, convolutions, _ = _convolution_switches()
            assert deterministic and not benchmark and convolutions == "ieee"
            assert allowed is False or before[2] == "mixed"
            raise KeyError
        assert _convolution_switches() == before

    @pytest.mark.parametrize("allow", [_allow_everywhere, _allow_by_both])
    def test_what_was_inherited_still_is(self, allow):
        allow()
        with cudnn.exact():
            pass
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == ("ieee" if allow is _allow_everywhere else "tf32")

    def test_nothing_to_switch(self):
        before = _convolution_switches()
        with cudnn.exact():
            assert _convolution_switches() == [True, *before[1:]]
        assert _convolution_switches() == before

    @pytest.mark.parametrize("stride", [1, 2])
    def test_backward_runs_inside(self, stride, monkeypatch):
        torch.backends.cudnn.allow_tf32 = True
        original, seen = torch.ops.aten.convolution_backward, []

        class Watched:
            def __call__(self, *args):
                seen.append(_convolution_switches())
                return original(*args)

            def __getattr__(self, name):  # what torch imports meanwhile looks at the op, too
                return getattr(original, name)

        monkeypatch.setattr(torch.ops.aten, "convolution_backward", Watched())
        x, weight = torch.randn(2, 7, 6, 3, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
        out = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=1)
        dout = torch.randn_like(out)
        expected = torch.autograd.grad(out, (x, weight), dout)
        dy = dout.permute(0, 2, 3, 1)
        got = cudnn.convolution_backward(dy, x.detach(), weight.detach(), stride, [True, True])
        for grad, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(grad, exact)
        assert cudnn.convolution_backward(dy, x.detach(), weight.detach(), stride, [False, True])[0] is None
        assert seen == [[True, False, False, "ieee", "ieee"]] * 2
        assert torch.backends.cudnn.allow_tf32

    @pytest.mark.gpu
    def test_gradients_have_all_their_digits(self):
        """Allow TF32, as PyTorch does by default: its ten bits would be some 5e-4 off."""
        torch.backends.cudnn.allow_tf32 = True
        dy, x = torch.randn(2, 28, 28, 64, device="cuda"), torch.randn(2, 28, 28, 64, device="cuda")
        weight = torch.randn(64, 64, 3, 3, device="cuda") / 24
        got = cudnn.convolution_backward(dy, x, weight, 1, [True, True])
        doubles = cudnn.convolution_backward(dy.double(), x.double(), weight.double(), 1, [True, True])
        for grad, exact in zip(got, doubles, strict=True):
            assert rel_rms(grad, exact) < 1e-5


class TestMeasuredBackend:
    DEVICE = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def a_file(self, tmp_path, monkeypatch):
        def write(content):
            tuning.stored.cache_clear()
            tuning.stored_backends.cache_clear()
            (tmp_path / "fake-9000.json").write_text(content)

        monkeypatch.setattr(tuning, "FOLDER", tmp_path)
        monkeypatch.setattr(tuning, "_slug", lambda _index: "fake-9000")
        monkeypatch.delenv("HIA_TUNED", raising=False)
        yield write
        tuning.stored.cache_clear()
        tuning.stored_backends.cache_clear()

    def test_of_this_device_alone(self, a_file, monkeypatch):
        assert tuning.measured_backend("stem", "k7", self.DEVICE) is None  # no file
        a_file('{"configurations": {"stem/k7": {"BLOCK": 1}}, "backends": {"stem/k7": "cudnn"}}')
        assert tuning.measured_backend("stem", "k7", self.DEVICE) == "cudnn"
        assert tuning.measured_backend("stem", "k3", self.DEVICE) is None
        assert tuning.measured_backend("stem", "k7", torch.device("cpu")) is None
        assert tuning.pick("stem", "k7", self.DEVICE, {"BLOCK": 2}) == {"BLOCK": 1}
        monkeypatch.setenv("HIA_TUNED", "0")
        assert tuning.measured_backend("stem", "k7", self.DEVICE) is None

    def test_a_device_without_a_file_takes_its_siblings(self, a_file, monkeypatch, tmp_path):
        """An H200 has an H100's processor; its own file comes first once there is one."""
        monkeypatch.setattr(tuning, "SIBLINGS", {"fake-9001": "fake-9000"})
        monkeypatch.setattr(tuning, "_slug", lambda _index: "fake-9001")
        assert tuning.measured_backend("stem", "k7", self.DEVICE) is None
        a_file('{"configurations": {}, "backends": {"stem/k7": "cudnn"}}')
        assert tuning.measured_backend("stem", "k7", self.DEVICE) == "cudnn"
        tuning.stored_backends.cache_clear()
        (tmp_path / "fake-9001.json").write_text('{"configurations": {}, "backends": {"stem/k7": "triton"}}')
        assert tuning.measured_backend("stem", "k7", self.DEVICE) == "triton"

    def test_a_file_without_backends(self, a_file):
        a_file('{"configurations": {}}')
        assert tuning.measured_backend("stem", "k7", self.DEVICE) is None

    @pytest.mark.parametrize("content", ["[]", "{", '{"configurations": {}, "backends": 3}'])
    def test_a_damaged_file(self, content, a_file):
        a_file(content)
        with pytest.raises(ValueError, match=r"fake-9000.json must hold an object 'backends', got: "):
            tuning.measured_backend("stem", "k7", self.DEVICE)

    def test_a_name_that_is_none(self, a_file):
        a_file('{"configurations": {}, "backends": {"stem/k7": "cudm"}}')
        with pytest.raises(ValueError, match=r"fake-9000.json must name backends, got: cudm$"):
            tuning.measured_backend("stem", "k7", self.DEVICE)


@pytest.mark.parametrize("op", [op for op in OPS if op != "row_softmax"])  # it returns two: its own file has these
class TestEveryOp:
    def test_fake_tensors_have_the_real_metadata(self, op):
        inputs = small_inputs(op, F32)
        real = getattr(hia_kernels, op)(**inputs)
        with FakeTensorMode() as mode:
            fakes = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            fake = getattr(hia_kernels, op)(**fakes)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())

    def test_meta_tensors(self, op):
        inputs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in small_inputs(op, F32).items()}
        assert getattr(hia_kernels, op)(**inputs).device.type == "meta"

    def test_float64_is_left_alone_by_autocast(self, op):
        inputs = small_inputs(op, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = getattr(hia_kernels, op)(**inputs)
        assert torch.equal(out, getattr(hia_kernels, op)(**inputs))

    def test_without_gradients_the_result_is_detached(self, op):
        inputs = small_inputs(op, F32)
        inputs |= {name: inputs[name].detach().requires_grad_() for name in differentiable(op)[1:2]}
        with torch.no_grad():
            assert not getattr(hia_kernels, op)(**inputs).requires_grad
        assert getattr(hia_kernels, op)(**inputs).requires_grad


class TestChecks:
    def test_choices(self):
        with pytest.raises(ValueError, match=r"^hia::op: pool must be 1 or 3, got 2$"):
            checks.check_choice("op", "pool", 2, (1, 3))


class TestPacking:
    def test_nothing_fake_is_pinned(self, monkeypatch):
        """Move fake tensors and trace, with PyTorch's own two steps replaced: they need a build for CUDA."""
        pinned, cuda = [], torch.device("cuda")
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **options: tensor)
        with FakeTensorMode() as mode:
            fake = varlen.to_device(torch.ones(3), cuda)
        assert isinstance(fake, FakeTensor) and varlen.to_device(fake, cuda) is fake and not pinned
        with mode:
            varlen.cu_seqlens_from_lengths([1, 2], "cuda")
        assert not pinned
        varlen.to_device(torch.ones(3), cuda)
        assert len(pinned) == 1

    def test_cu_seqlens_from_lengths(self, device):
        cu_seqlens = varlen.cu_seqlens_from_lengths([3, 0, 4], device)
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.device.type == device
        assert cu_seqlens.tolist() == [0, 3, 3, 7]
        assert varlen.cu_seqlens_from_lengths([]).tolist() == [0]

    def test_lengths_that_cannot_be_packed(self):
        with pytest.raises(ValueError, match=r"^cu_seqlens_from_lengths: lengths must not be negative, got \[3, -1\]$"):
            varlen.cu_seqlens_from_lengths([3, -1])
        message = r"^cu_seqlens_from_lengths: lengths must add up to less than 2\*\*31, got 2147483648$"
        with pytest.raises(ValueError, match=message):
            varlen.cu_seqlens_from_lengths([2**30, 2**30])

    def test_values_on_a_device_are_read_in_debug_mode_only(self, monkeypatch):
        elsewhere = torch.empty(3, dtype=torch.int32, device="meta")
        monkeypatch.delenv("HIA_DEBUG", raising=False)
        assert not varlen.check_values_now(elsewhere) and varlen.check_values_now(torch.empty(3))
        varlen.check_cu_seqlens("op", "cu_seqlens_q", elsewhere, 7, None)
        varlen.check_row_idx("op", "row_idx", elsewhere, 7, unique=True)
        monkeypatch.setenv("HIA_DEBUG", "1")
        assert varlen.check_values_now(elsewhere)

    @pytest.mark.gpu
    def test_debug_mode_checks_values_on_the_gpu(self, device, monkeypatch):
        inputs = inputs_of("norm_linear")(9, 5, F32, device) | {"row_idx": torch.tensor([9], device=device)}
        monkeypatch.setenv("HIA_DEBUG", "1")
        with pytest.raises(ValueError, match=r"row_idx must be in \[0, 9\), got values from 9 to 9"):
            norm_linear(**inputs)


class TestPoison:
    """Tests of the fixture in conftest.py that every test of this folder runs under."""

    def allocate(self, module, expression):
        return eval(expression, {"__name__": module, "torch": torch, "x": torch.ones(2)})

    @pytest.mark.parametrize("expression", ["torch.empty(3)", "torch.empty_like(x)", "x.new_empty(3)"])
    def test_the_library_gets_nan(self, expression):
        assert self.allocate("hia_kernels.ops.stem.triton_fwd", expression).isnan().all()

    def test_integers_get_their_largest(self):
        poisoned = self.allocate("hia_kernels.core.varlen", "torch.empty(3, dtype=torch.int32)")
        assert poisoned.tolist() == [2**31 - 1] * 3

    def test_others_get_what_they_asked_for(self):
        assert self.allocate("torch.nn.modules", "torch.empty(3).fill_(1)").tolist() == [1] * 3
        assert not torch.empty(0).isnan().any()

    def test_a_result_left_unwritten_is_seen(self):
        """Run an op that forgets its last row."""
        source = "def half(x):\n out = torch.empty_like(x)\n out[:-1] = x[:-1]\n return out"
        namespace = {"__name__": "hia_kernels.ops.half", "torch": torch}
        exec(source, namespace)
        x = torch.ones(3)
        with pytest.raises(AssertionError, match=r"^out: NaN pattern differs"):
            assert_close("out", namespace["half"](x), x, x, dtype=F32)


def test_overload():
    assert registration.overload("stem") is torch.ops.hia.stem.default
