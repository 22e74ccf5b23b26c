"""Bits on a CPU: repeated with the same number of threads, and with any where docs/conventions.md says so."""

import pytest
import torch

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import backend
from tests.inputs import OPS, inputs_of
from tests.ops.harness import assert_identical, forward_backward, skip_unless_here

COUNTS = (1, 2, 3)
SHAPES = {  # work for several threads: of whole blocks and panels for the native kernels, and of others
    "condition_queries": [((400, 130, 320, 5, 96), {}), ((60, 7, 48), {})],
    "conv_norm_act": [(((13, 11),), {"channels": (32, 64), "residual": True}), (((22, 30),), {"stride": 2})],
    "cross_attention": [(((40, 70), (300, 33)), {}), (((9,), (1293,)), {"heads": 3, "head_dim": 64})],
    "head_linear": [((2, 150, 3, 128, 64), {"merge_heads": True}), ((2, 9), {})],
    "inject_rows": [((300, 200, 320, 96), {}), ((60, 31), {})],
    "latent_attention": [((150, 96, (130, 40)), {}), ((530, 64, (22,)), {})],
    "linear": [((300, 320, 96), {}), ((5, 3000, 200), {})],
    "norm_linear": [((300, 200, 320, 96), {}), ((2000, None, 17, 64), {})],
    "row_softmax": [((300, 784), {}), ((2, 20000), {})],
    "stem": [(((70, 61),), {"out_channels": 32}), (((48, 40),), {"channels": 3})],
}
INDEPENDENT = [  # the table of docs/conventions.md: results that have the same bits with any number of threads
    ("condition_queries", "native", ("out", "dhidden", "dweight", "dbias", "dqueries")),
    ("conv_norm_act", "native", ("out", "dx", "dweight", "dresidual")),
    ("head_linear", "native", ("out", "dx", "dweight")),
    ("inject_rows", "native", ("out", "dhidden", "dupdate", "dweight", "dbias")),
    ("latent_attention", "native", ("out",)),
    ("linear", "native", ("out", "dx", "dweight", "dbias")),
    ("norm_linear", "native", ("out", "dx", "dweight", "dbias")),
    ("row_softmax", "reference", ("out", "lse", "dscores")),
    ("stem", "native", ("out",)),
]
ON_A_CPU = ("native", "cpu", "reference")
ROUTES = [(op, row.name) for op in OPS for row in backend.TABLES[op].backends if row.name in ON_A_CPU]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(op, name, inputs, count):
    torch.set_num_threads(count)
    with use_backend(name):
        return forward_backward(op, getattr(hia_kernels, op), inputs)


@pytest.mark.parametrize(("op", "name"), ROUTES)
def test_the_same_number_of_threads_repeats_every_bit(op, name):
    skip_unless_here(name)
    row, ran = backend.TABLES[op].row(name), 0
    for sizes, options in SHAPES[op]:
        inputs = inputs_of(op)(*sizes, torch.float32, **options)
        if row.unsupported_reasons(op, **inputs):
            continue
        first = {count: run(op, name, inputs, count) for count in COUNTS}
        for count in COUNTS:  # each behind another number
            assert_identical(run(op, name, inputs, count), first[count])
        ran += 1
    assert ran, "no shape suits the row"


@pytest.mark.parametrize(("op", "name", "results"), INDEPENDENT)
def test_any_number_of_threads_gives_the_same_bits(op, name, results):
    skip_unless_here(name)
    (sizes, options), _ = SHAPES[op]
    inputs = inputs_of(op)(*sizes, torch.float32, **options)
    one, *others = (run(op, name, inputs, count) for count in COUNTS)
    assert set(results) <= set(one)
    for other in others:
        assert_identical({key: other[key] for key in results}, {key: one[key] for key in results})
