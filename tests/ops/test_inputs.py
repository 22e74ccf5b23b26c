"""``inputs.py`` of every op: the arguments it draws and the costs it counts."""

import dataclasses
import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import hia_kernels
from hia_kernels.core import costs, draw
from tests.inputs import OPS, module_of, small_inputs
from tests.ops.harness import leaves

F32 = torch.float32
# what changes the costs: options of a shape, by op
OPTIONS = [
    *((op, {}) for op in OPS),
    *((op, {"bias": False}) for op in ("condition_queries", "inject_rows", "linear", "norm_linear")),
    ("conv_norm_act", {"stride": 2, "residual": False, "activation": "gelu", "kernel": 1}),
    ("head_linear", {"merge_heads": True}),
    ("norm_linear", {"rows": None, "norm_dtype": torch.float32}),
    ("row_softmax", {"wide_scores": True}),
    ("row_softmax", {"out_dtype": torch.float16}),
    ("stem", {"pool": 1, "kernel": 3}),
    ("stem", {"pixel_dtype": torch.float16, "channels": 3}),
]


def shape_of(op, **options):
    """Return a small shape, with options."""
    return dataclasses.replace(module_of(op).SMALL, **options)


def counted(op, given, *, gradients):
    """Count by the formulas registered with the ops."""
    wrt = leaves(op, given) if gradients else {}
    with FlopCounterMode(display=False) as counter:
        out = getattr(hia_kernels, op)(**{**given, **wrt})
        out = out[0] if isinstance(out, tuple) else out
        if gradients:
            out.backward(torch.ones_like(out))
    return counter.get_total_flops()


@pytest.mark.parametrize(("op", "options"), OPTIONS, ids=str)
def test_flops_are_those_of_the_registered_formula(op, options):
    if op in ("cross_attention", "latent_attention"):  # ragged lengths are counted exactly, by the formula from above
        fields = (field.name for field in dataclasses.fields(module_of(op).Shape))
        options = {name: (5, 5) for name in fields if "lengths" in name}
    shape = shape_of(op, **options)
    given = module_of(op).make_inputs(shape, F32)
    assert module_of(op).flops(shape, "forward") == counted(op, given, gradients=False)
    assert module_of(op).flops(shape, "both") == counted(op, given, gradients=True)


def test_ragged_attention_is_counted_by_its_lengths():
    module = module_of("cross_attention")
    shape = module.Shape((3, 4), (5, 2), heads=2, head_dim=32)
    assert module.flops(shape, "forward") == 4 * (3 * 5 + 4 * 2) * 2 * 32
    assert module.flops(shape, "forward") < counted("cross_attention", module.make_inputs(shape, F32), gradients=False)


def nbytes(values):
    return sum(x.nbytes for x in values if isinstance(x, torch.Tensor))


@pytest.mark.parametrize(("op", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_forward_bytes_are_those_of_arguments_and_results(op, options, dtype):
    """Count only the rows of what is gathered."""
    shape = shape_of(op, **options)
    with FakeTensorMode():
        given = module_of(op).make_inputs(shape, dtype)
        outs = getattr(hia_kernels, op)(**given)
    source = given.get({"condition_queries": "hidden", "norm_linear": "x"}.get(op))
    index = given.get("row_idx")
    skipped = 0 if source is None or index is None else source[0].nbytes * (source.shape[0] - index.shape[0])
    expected = nbytes(given.values()) - skipped + nbytes(outs if isinstance(outs, tuple) else (outs,))
    assert module_of(op).moved_bytes(shape, dtype.itemsize, "forward") == expected


@pytest.mark.parametrize("op", OPS)
def test_costs_add_up_and_modes_are_checked(op):
    module, shape = module_of(op), shape_of(op)
    for cost in (module.flops, lambda *arguments: module.moved_bytes(arguments[0], 4, arguments[1])):
        assert cost(shape, "both") == cost(shape, "forward") + cost(shape, "backward")
        with pytest.raises(ValueError, match="costs: mode must be among forward, backward, both, got 'sideways'"):
            cost(shape, "sideways")
    assert module.moved_bytes(shape, 4, "backward") >= nbytes(leaves(op, module.make_inputs(shape, F32)).values())


@pytest.mark.parametrize("op", OPS)
def test_names_are_the_functions_own(op):
    module, shape = module_of(op), shape_of(op)
    names = list(inspect.signature(getattr(hia_kernels, op)).parameters)
    given = module.make_inputs(shape, F32)
    assert [name for name in names if name in given] == list(given)
    assert {*module.DIFFERENTIABLE, *module.PARAMETERS} <= set(names)
    assert hash(shape) == hash(shape_of(op))


@pytest.mark.parametrize("op", OPS)
def test_every_dtype_and_layout_is_one_draw(op):
    module, shape = module_of(op), shape_of(op)
    wide, half = (module.make_inputs(shape, dtype) for dtype in (F32, torch.bfloat16))
    for name, x in wide.items():
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.to(half[name].dtype), half[name]), name
    again = module.make_inputs(shape, F32, seed=1)
    assert any(not torch.equal(x, again[name]) for name, x in wide.items() if isinstance(x, torch.Tensor))
    strided = small_inputs(op, F32)
    tensors = [name for name, x in strided.items() if isinstance(x, torch.Tensor)]
    assert all(strided[name].shape == wide[name].shape for name in tensors)
    never_strided = op in ("stem", "conv_norm_act")  # but for the latter's residual
    assert never_strided or any(not strided[name].is_contiguous() for name in tensors)


def test_large_tensors_are_drawn_where_they_are_used(monkeypatch):
    monkeypatch.setattr(draw, "SMALL", 100)
    one, two = (draw.Draw(torch.bfloat16, seed=3).normal(20, 30, scale=2.0) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.bfloat16 and 1 < one.float().std() < 3
    pixels = draw.Draw(F32).uniform(20, 30, top=4095.0, dtype=torch.uint16)
    assert pixels.dtype == torch.uint16 and 255 < int(pixels.int().max()) < 4096


def test_rows_are_drawn_or_listed():
    one = draw.Draw(F32)
    assert draw.row_count(3) == 3 and draw.row_count(((1, 3), (7, 8))) == 3 and draw.row_count(()) == 0
    assert one.row_idx(((1, 3), (7, 8)), 9, unique=True).tolist() == [1, 2, 7]
    assert one.row_idx((), 9, unique=True).dtype == torch.int64
    assert sorted(one.row_idx(9, 9, unique=True).tolist()) == list(range(9))


def test_statistics_are_never_narrower_than_fp32():
    assert [costs.statistics_itemsize(size) for size in (2, 4, 8)] == [4, 4, 8]
