"""``hia_kernels.core.onednn``: in bf16 on the CPU, what is not finite reaches what depends on it and nothing else."""

import pytest
import torch
import torch.nn.functional as F

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import onednn
from hia_kernels.ops.conv_norm_act.packed import conv_norm_act_packed, conv_norm_act_packed_, pack_conv
from tests.inputs import inputs_of
from tests.ops.harness import forward_backward

BF16 = torch.bfloat16
NAN, INF = float("nan"), float("inf")
BOUND = {BF16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}  # a rounding of the result, whatever adds it up
SIZES = [(17, 9, 16), (40, 33, 5), (64, 34, 64), (100, 65, 1), (33, 200, 16), (17, 1, 4), (8, 31, 8)]


def beside_nan(rows, columns):
    """Draw a matrix whose rows lie among NaN."""
    x = torch.full((rows, columns + 3), NAN, dtype=BF16)[:, :columns]
    return x.copy_(torch.randn(rows, columns))


@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_products_read_no_more_than_their_rows(rows, inner, columns):
    a, b = beside_nan(rows, inner), beside_nan(inner, columns)
    assert onednn.matmul(a, b).isfinite().all()
    assert onednn.matmul(a.expand(3, -1, -1), b).isfinite().all()
    assert onednn.matmul(a.expand(3, -1, -1), b.expand(3, -1, -1)).isfinite().all()
    assert onednn.linear(a, beside_nan(columns, inner), None).isfinite().all()
    torch.testing.assert_close(onednn.matmul(a, b), a.contiguous() @ b.contiguous(), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
@pytest.mark.parametrize(("rows", "inner", "columns"), SIZES)
def test_rows_of_a_product_are_apart(rows, inner, columns, value):
    b = torch.randn(inner, columns, dtype=BF16)
    for row in (0, rows // 2, rows - 1):
        a = torch.full((rows, inner), value, dtype=BF16)
        a[row] = torch.randn(inner)
        spread = torch.full((rows, 2 * inner), NAN, dtype=BF16)[:, ::2].copy_(a)
        for x in (a, a.mT.contiguous().mT, spread):
            batch = x.expand(2, -1, -1)
            products = (onednn.matmul(x, b), onednn.matmul(x[None], b[None])[0], onednn.linear(x, b.mT, None))
            for product in (*products, onednn.matmul(batch, b)[1], onednn.matmul(batch, b.expand(2, -1, -1))[1]):
                assert product[row].isfinite().all()
                assert not product.isfinite().all(1).sum() > 1


@pytest.mark.parametrize("size", [(8, 8), (21, 19)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("channels", [*range(1, 40), 48, 49, 65, 97, 100, 127, 130])
def test_pixels_of_a_convolution_are_apart(channels, kernel, stride, size):
    if kernel == 7 and channels not in (1, 3):
        pytest.skip("the stem has grey or colour")
    x = torch.randn(2, *size, channels, dtype=BF16)
    weight = torch.randn(8, channels, kernel, kernel, dtype=BF16)
    x[1, 3, 4] = NAN
    seen = F.conv2d(x.isnan().any(-1)[:, None].float(), torch.ones(1, 1, kernel, kernel), None, stride, kernel // 2)
    out = onednn.convolution(x, weight, stride)
    assert torch.equal(out.isnan().any(-1), seen[:, 0] > 0)


def from_poisoned_memory(function, *arguments):
    """Call with large numbers in the memory that is free."""
    held = [torch.full((2**n,), 1e37) for n in range(2, 15) for _ in range(12)]
    del held
    return function(*arguments)


@pytest.mark.parametrize("size", [(8, 8), (5, 1), (1, 1), (13, 1), (30, 2), (64, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
@pytest.mark.parametrize(("channels", "out_channels"), [(1, 2), (3, 34), (12, 11), (34, 33), (32, 64)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_a_convolution_and_its_gradients(dtype, channels, out_channels, kernel, stride, size):
    x = torch.randn(2, *size, channels, dtype=dtype)
    weight = torch.randn(out_channels, channels, kernel, kernel, dtype=dtype)
    out = from_poisoned_memory(onednn.convolution, x, weight, stride)
    dy = torch.randn_like(out)
    found = from_poisoned_memory(onednn.convolution_backward, dy, x, weight, stride, [True, True])
    x_64, weight_64 = (tensor.double().requires_grad_() for tensor in (x, weight))
    y = F.conv2d(x_64.permute(0, 3, 1, 2), weight_64, None, stride, kernel // 2).permute(0, 2, 3, 1)
    exact = (y, *torch.autograd.grad(y, (x_64, weight_64), dy.double()))
    for got, expected in zip((out, *found), exact, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < BOUND[dtype]
    assert onednn.convolution_backward(dy, x, weight, stride, [False, True])[0] is None
    assert onednn.convolution_backward(dy, x, weight, stride, [True, False])[1] is None


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_gradients_without_onednn_are_rounded_once(dtype):
    x, dy = torch.randn(2, 2, 32, 32, 64).to(dtype)
    weight = torch.randn(64, 64, 3, 3, dtype=dtype)
    exact = onednn.convolution_backward(dy.double(), x.double(), weight.double(), 1, [True, True])
    with torch.backends.mkldnn.flags(enabled=False):
        found = onednn.convolution_backward(dy, x, weight, 1, [True, True])
    for got, expected in zip(found, exact, strict=True):
        assert (got.double() - expected).norm() < BOUND[dtype] * expected.norm()


def test_only_what_ends_within_a_tile_is_copied(monkeypatch):
    monkeypatch.setattr(onednn, "_has_amx", lambda: True)
    a, b = torch.randn(20, 33, dtype=BF16), torch.randn(33, 7, dtype=BF16)
    left, right = onednn.whole_tiles(a, b)
    assert right is b and torch.equal(left, a) and left.stride() == (64, 1)
    assert not left.as_strided((20, 31), (64, 1), 33).any()
    filled = onednn.whole_tiles(a[None], b[None])
    assert [tuple(x.shape) for x in filled] == [(1, 20, 64), (1, 64, 7)]
    assert not any(x.any() for x in (filled[0][..., 33:], filled[1][:, 33:]))
    for whole in ((a.float(), b.float()), (a[:, :32], b[:32]), (torch.randn(33, 20, dtype=BF16).mT, b), (a[:16], b)):
        assert all(x is y for x, y in zip(onednn.whole_tiles(*whole), whole, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("head_dim", [32, 144])
def test_queries_of_an_attention_are_apart(head_dim, backend):
    """Give a query of NaN, and look at those beside it, with one head and an odd number of keys."""
    inputs = inputs_of("cross_attention")([17, 20], [9, 33], BF16, heads=1, head_dim=head_dim)
    inputs["q"] = inputs["q"].clone()
    inputs["q"][12] = NAN
    with use_backend(backend):
        results = forward_backward("cross_attention", hia_kernels.cross_attention, inputs)
    for name in ("out", "dq"):
        assert torch.equal(results[name].isnan().flatten(1).any(1).nonzero().flatten(), torch.tensor([12])), name


@pytest.mark.parametrize("channels", [9, 34])
@pytest.mark.parametrize("op", ["linear", "norm_linear", "inject_rows"])
def test_rows_of_an_op_are_apart(op, channels):
    inputs = inputs_of(op)(*((40,) if op == "linear" else (40, 40)), BF16, channels=channels, dim=9)
    name = "x" if "x" in inputs else "update"
    inputs[name] = inputs[name].clone()
    inputs[name][20] = NAN
    rows = forward_backward(op, getattr(hia_kernels, op), inputs)["out"].isnan().any(1).nonzero().flatten()
    if op == "linear":
        expected = torch.tensor([20])
    elif op == "norm_linear":
        expected = (inputs["row_idx"] == 20).nonzero().flatten()
    else:
        expected = inputs["row_idx"][20:21]
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("pad_rows", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_packed_weights_on_thin_images(dtype, columns, pad_rows, activation):
    weight, shift = torch.randn(64, 32, 3, 3, dtype=dtype), torch.randn(64)
    with use_backend("cpu"):
        try:
            packed = pack_conv(weight, torch.ones(64), shift, stride=2)
        except NotImplementedError as reason:
            assert dtype == BF16
            pytest.skip(str(reason))
        x = torch.randn(2, 30, columns, 32, dtype=dtype)
        y = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), shift.double(), 2, (1 if pad_rows else 0, 1))
        y = y.permute(0, 2, 3, 1)
        residual = torch.randn(y.shape, dtype=dtype)
        act = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu}[activation]
        written = residual.clone()
        for got, expected in (
            (from_poisoned_memory(conv_norm_act_packed, x, packed, None, activation, pad_rows), y),
            (from_poisoned_memory(conv_norm_act_packed, x, packed, residual, activation, pad_rows), y + residual),
            (from_poisoned_memory(conv_norm_act_packed_, written, x, packed, activation, pad_rows), y + residual),
        ):
            assert got.shape == expected.shape and got.is_contiguous()
            error = (got.double() - act(expected)).norm() / act(expected).norm()
            assert error < (2**-7 if dtype == BF16 else 2**-20)
