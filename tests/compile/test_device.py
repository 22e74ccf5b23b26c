"""The fake CUDA device: what Python sees inside, and that nothing of it stays."""

from __future__ import annotations

import pytest
import torch

import hia_kernels
from bench.launches.device import TARGETS, fake_device
from hia_kernels.core import tuning
from hia_kernels.ops.cross_attention.inputs import packing

CUDA = torch.device("cuda", 0)


@pytest.fixture
def device():
    with fake_device(TARGETS["sm_90"]):
        yield


def state():
    """Read all that a fake device replaces."""
    names = (
        "is_available",
        "device_count",
        "current_device",
        "get_device_name",
        "get_device_properties",
        "get_device_capability",
        "synchronize",
        "empty_cache",
        "is_bf16_supported",
        "is_current_stream_capturing",
    )
    return [
        *(getattr(torch.cuda, name) for name in names),
        torch.version.hip,
        torch.version.cuda,
        torch.Generator,
        torch.backends.cudnn.is_available,
        torch.empty(0, device="meta").device,
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    ]


def test_tensors_say_that_they_are_on_the_device(device):
    x = torch.randn(4, 6, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found = {
        "factory": x,
        "row": x[1],
        "slice": x[:, 2:4],
        "index": x[torch.tensor([0, 2])],
        "mask": x.t().contiguous(),
        "dtype": x.to(torch.bfloat16),
        "device": torch.ones(3).to("cuda"),
        "cuda": torch.ones(3).cuda(),
        "pinned": torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
        "new": x.new_empty(3),
        "like": torch.empty_like(x),
        "of": torch.empty(3, device=x.device),
        "view": x.view(-1),
        "product": torch.mm(x.bfloat16(), x.bfloat16().mT, out_dtype=torch.float32),
    }
    assert {name: tensor.device for name, tensor in found.items()} == dict.fromkeys(found, CUDA)
    assert all(tensor.is_cuda for tensor in found.values())
    assert found["slice"].storage_offset() == 2 and found["product"].dtype == torch.float32
    host = torch.ones(3)
    assert host.device.type == "cpu" and not host.is_cuda and host.sum() == 3


def test_a_value_can_not_be_read(device):
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="cuda").sum().item()


def test_torch_describes_the_target():
    for target in TARGETS.values():
        with fake_device(target):
            assert torch.cuda.is_available() and torch.cuda.get_device_capability() == target.capability
            assert torch.cuda.get_device_properties(0).multi_processor_count == target.multiprocessors
            assert (torch.version.hip is not None) == (target.kind == "hip")


def test_what_the_kernels_remember_of_a_device_goes_with_it():
    pytest.importorskip("triton", reason="NO TRITON: its launchers are not tested")
    from hia_kernels.ops.cross_attention.triton_split import family_of

    families = {}
    for name, target in TARGETS.items():
        with fake_device(target):
            families[name] = family_of(CUDA)
            assert tuning._slug(0) == tuning.device_slug(target.device_name)
    assert families == {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "gfx942": "amd"}


def test_ops_run_what_their_tables_choose(device):
    """Serve a product by cuBLAS, forward and through autograd."""
    x, weight = (torch.randn(8, 8, device="cuda", requires_grad=True) for _ in range(2))
    out = hia_kernels.linear(x, weight, None)
    assert hia_kernels.last_backend("linear") == "cublas"
    grads = torch.autograd.grad(out, (x, weight), torch.empty_like(out))
    assert [grad.device for grad in grads] == [CUDA, CUDA]


def test_ops_of_the_host_compute():
    x = {"q": torch.randn(3, 2, 16), "k": torch.randn(5, 2, 16), "v": torch.randn(5, 2, 16)}
    expected = hia_kernels.cross_attention(**x, **packing([3], [5], "cpu"))
    with fake_device(TARGETS["sm_90"]), hia_kernels.use_backend("reference"):
        found = hia_kernels.cross_attention(**x, **packing([3], [5], "cpu"))
    torch.testing.assert_close(found, expected)


def test_nothing_stays_after_an_exception():
    before = state()
    with pytest.raises(ZeroDivisionError), fake_device(TARGETS["gfx942"]):
        torch.empty(3, device="cuda")
        raise ZeroDivisionError
    assert state() == before
    with fake_device(TARGETS["sm_80"]):
        assert torch.cuda.get_device_name() == TARGETS["sm_80"].device_name
    assert state() == before


def test_one_at_a_time(device):
    with pytest.raises(RuntimeError, match="must not be nested, got sm_80 inside sm_90"), fake_device(TARGETS["sm_80"]):
        pass
    assert torch.cuda.get_device_name() == TARGETS["sm_90"].device_name
