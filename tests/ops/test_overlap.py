"""In-place ops whose arguments share memory with what they write: the result is that of arguments apart."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import hia_kernels
from hia_kernels import inject_rows, inject_rows_, row_softmax_, use_backend
from hia_kernels.core import backend, overlap, registration
from hia_kernels.ops.conv_norm_act import (
    conv_norm_act_packed,
    conv_norm_act_packed_,
    conv_norm_act_packed_out,
    pack_conv,
    packing_unsupported_reasons,
)

F32 = torch.float32
BACKENDS = ["native", "cpu", "reference"]
CHANNELS, ROWS = 48, 40


def unless_refused(op, name, function, inputs):
    row = backend.TABLES[op].row(name)
    reasons = row.unavailable_reasons() or row.unsupported_reasons(function, **inputs)
    if reasons:
        pytest.skip("; ".join(reasons))


def injection(dtype=F32, device="cpu"):
    """Return hidden of square products: every other argument can be a view of it."""
    hidden = torch.randn(2 * ROWS + CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device, dtype)
    row_idx = torch.arange(ROWS, 2 * ROWS, device=device)
    weight, bias = hidden[2 * ROWS :].clone() / 8, hidden[0].clone()
    return {"hidden": hidden, "update": hidden[:ROWS].clone(), "weight": weight, "bias": bias, "row_idx": row_idx}


def views(hidden):
    """Return, by argument, views of the rows that are written, and of columns that lie between them."""
    columns = torch.randn(2 * ROWS + CHANNELS, 2 * CHANNELS, generator=torch.Generator().manual_seed(1)).to(hidden)
    return {
        "update": [hidden[ROWS : 2 * ROWS], hidden[ROWS - 3 : 2 * ROWS - 3], hidden[: 2 * ROWS : 2]],
        "weight": [hidden[ROWS - 5 : ROWS - 5 + CHANNELS], hidden[ROWS - 5 : ROWS - 5 + CHANNELS].T],
        "bias": [hidden[ROWS + 7], hidden[ROWS : ROWS + CHANNELS, 3]],
        "apart": [columns[:ROWS, :CHANNELS]],
    }


OVERLAPS = [("update", 0), ("update", 1), ("update", 2), ("weight", 0), ("weight", 1), ("bias", 0), ("bias", 1)]


def assert_injects_as_if_apart(name, place, dtype=F32, device="cpu"):
    inputs = injection(dtype, device)
    view = views(inputs["hidden"])[name][place]
    expected = inject_rows(**{**inputs, name: view.clone()})
    got = inject_rows_(**{**inputs, name: view})
    assert torch.equal(got, expected) and got is inputs["hidden"]


@pytest.mark.parametrize(("name", "place"), OVERLAPS)
@pytest.mark.parametrize("served", BACKENDS)
def test_inject_rows_with_a_view_of_hidden(served, name, place):
    unless_refused("inject_rows", served, "inject_rows_", injection())
    with use_backend(served):
        assert_injects_as_if_apart(name, place)


@pytest.mark.parametrize("served", BACKENDS)
def test_inject_rows_with_indices_inside_hidden(served):
    """Keep the indices in the bytes of a row that is written."""
    unless_refused("inject_rows", served, "inject_rows_", injection())
    inputs = injection()
    inside = inputs["hidden"][ROWS : ROWS + 2].view(-1).view(torch.int64)[:ROWS]
    inside.copy_(inputs["row_idx"])
    with use_backend(served):
        expected = inject_rows(**inputs)
        assert torch.equal(inject_rows_(**{**inputs, "row_idx": inside}), expected)


def test_compiled_with_a_view_of_hidden():
    inputs = injection()
    expected = inject_rows(**{**inputs, "update": inputs["hidden"][ROWS - 3 : 2 * ROWS - 3].clone()})

    def inject(hidden, weight, bias, row_idx):
        return inject_rows_(hidden, hidden[ROWS - 3 : 2 * ROWS - 3], weight, bias, row_idx)

    del inputs["update"]
    got = torch.compile(inject, backend="aot_eager", fullgraph=True)(**inputs)
    assert torch.equal(got, expected)


def test_fake_tensors_are_not_looked_at():
    with FakeTensorMode():
        hidden = torch.empty(9, 16)
        row_idx = torch.arange(4)
        assert inject_rows_(hidden, hidden[:4], torch.empty(16, 16), None, row_idx) is hidden


def strips():
    """Return one buffer of which both x and the result of a 3 x 3 convolution are parts, and its packed weights."""
    seeded = torch.Generator().manual_seed(0)
    buffer = torch.randn(84, 70, 32, generator=seeded)
    weight = torch.randn(32, 32, 3, 3, generator=seeded) / 17
    scale, shift = torch.rand(32, generator=seeded) + 0.5, torch.randn(32, generator=seeded)
    return buffer, weight, scale, shift


def packed_or_skip(*weights):
    reasons = packing_unsupported_reasons(weights[0])
    if reasons:
        pytest.skip("; ".join(reasons))
    return pack_conv(*weights)


PACKED = ["native", "cpu"]
X_FROM = [0, 1, 4]  # rows of the buffer; the result takes the rows from 4 on


@pytest.mark.parametrize("first", X_FROM)
@pytest.mark.parametrize("served", PACKED)
def test_packed_convolution_in_place(served, first):
    buffer, *weights = strips()
    with use_backend(served):
        packed = packed_or_skip(*weights)
        x, residual = buffer[None, first : first + 80], buffer[None, 4:]
        expected = conv_norm_act_packed(x.clone(), packed, residual.clone())
        assert torch.equal(conv_norm_act_packed_(residual, x, packed), expected)


@pytest.mark.parametrize("first", X_FROM)
@pytest.mark.parametrize("served", PACKED)
def test_packed_convolution_into_its_input(served, first):
    buffer, *weights = strips()
    with use_backend(served):
        packed = packed_or_skip(*weights)
        x, out = buffer[None, first : first + 80], buffer[None, 4:]
        expected = conv_norm_act_packed(x.clone(), packed)
        assert torch.equal(conv_norm_act_packed_out(out, x, packed), expected)


@pytest.mark.parametrize("served", PACKED)
@pytest.mark.parametrize("function", ["conv_norm_act_packed_", "conv_norm_act_packed_out"])
def test_packed_convolution_over_its_shift(served, function):
    buffer, weight, scale, _ = strips()
    into, x = buffer[None, 4:], torch.randn(1, 80, 70, 32, generator=torch.Generator().manual_seed(1))
    with use_backend(served):
        inside = packed_or_skip(weight, scale, into[0, 2, 3])
        before = packed_or_skip(weight, scale, into[0, 2, 3].clone())
        expected = conv_norm_act_packed(x, before, into.clone() if function.endswith("packed_") else None)
        assert torch.equal(getattr(hia_kernels.ops.conv_norm_act, function)(into, x, inside), expected)


@pytest.mark.parametrize("change", [lambda x: x[:1].expand(4, -1), lambda x: x.as_strided((4, 6), (2, 1))])
def test_what_overlaps_itself_is_refused(change):
    scores = change(torch.randn(4, 6))
    with pytest.raises(ValueError, match="hia::row_softmax_: scores must not overlap itself in memory, got shape"):
        row_softmax_(scores, 1.0)
    row_softmax_(torch.randn(6, 4).T, 1.0)
    row_softmax_(torch.randn(4, 9)[:, 2:8], 1.0)
    with pytest.raises(ValueError, match="hia::inject_rows_: hidden must not overlap itself in memory"):
        inject_rows_(scores, torch.ones(1, 2), torch.ones(6, 2), None, torch.zeros(1, dtype=torch.int64))


def apart(*args):
    return overlap.Written("op", "first", 0, tuple(range(1, len(args)))).apart(args)


def test_the_schemas_say_what_is_written():
    written = {name: registration._written(name) for name in ("inject_rows_", "conv_norm_act_packed_", "row_softmax_")}
    assert {name: [(one.name, one.readers) for one in ones] for name, ones in written.items()} == {
        "inject_rows_": [("hidden", (1, 2, 3, 4))],
        "conv_norm_act_packed_": [("residual", (1, 2, 3))],
        "row_softmax_": [("scores", ())],
    }


def test_only_what_overlaps_is_copied():
    x = torch.zeros(9, 4)
    args = (x[2:5], x[:2], x[5:], x[4:6], None, x[:0], torch.ones(2))
    got = apart(*args)
    assert [one is other for one, other in zip(got, args, strict=True)] == [True, True, True, False, *[True] * 3]
    table = torch.zeros(5, 6)
    assert apart(table[:, :2], table[:, 2:])[1].is_contiguous()
    assert apart(table[::2], table[1::2])[1].is_contiguous()


def test_two_storages_of_one_memory():
    numpy = pytest.importorskip("numpy")
    memory = numpy.zeros(12, dtype=numpy.float32)
    one, other = torch.from_numpy(memory[:8]), torch.from_numpy(memory[4:])
    assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    assert apart(one, other)[1] is not other
