"""NaN and infinities on the CPU: a fast kernel must not lose what the reference shows."""

import pytest
import torch

import hia_kernels
from hia_kernels import use_backend
from hia_kernels.core import backend
from hia_kernels.ops.cross_attention import cpu
from hia_kernels.testing import assert_close
from tests.inputs import OPS, inputs_of, small_inputs
from tests.ops.not_finite import (
    INF,
    NAN,
    PLACES,
    SPOILT,
    VALUES,
    assert_attention_loses_nothing,
    assert_nothing_is_lost,
    assert_op_loses_nothing,
    poisoned,
    run,
    spoilt_attention,
)

F32, BF16 = torch.float32, torch.bfloat16
FITTING = {  # what the small inputs are not: rows of the extension have panels of 32 channels
    ("conv_norm_act", "native"): lambda: inputs_of("conv_norm_act")((9, 8), F32, channels=(32, 64)),
    ("stem", "native"): lambda: inputs_of("stem")((20, 17), F32, out_channels=32),
}
ROWS = [(op, row.name) for op in OPS for row in backend.TABLES[op].backends if row.name not in ("triton", "reference")]
LEFT_OUT = {("stem", name) for name in ("window", "mean", "std")}  # checked to be finite
# oneDNN's ReLU gives 0 for NaN; another pass over the output would cost more than the fusion gains
WITHOUT_RELU = {("conv_norm_act", "cpu"): {"activation": "gelu"}}
ATTENTION = [  # by the flash kernel with one call, with several, and by products
    pytest.param([7], [9], 32, id="flash-one-length"),
    pytest.param([7, 3, 2, 0], [9, 16, 0, 4], 32, id="flash-ragged"),
    pytest.param([4], [520], 16, id="flash-more-keys-than-its-block"),
    pytest.param([7, 3, 2, 0], [9, 16, 0, 4], 144, id="products"),
]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize(("lengths_q", "lengths_k", "head_dim"), ATTENTION)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_attention_loses_nothing(lengths_q, lengths_k, head_dim, dtype, how):
    inputs = spoilt_attention(lengths_q, lengths_k, dtype, how, head_dim=head_dim)
    assert_attention_loses_nothing(inputs, how, "cpu")


@pytest.mark.parametrize("how", SPOILT)
def test_attention_with_too_many_scores_to_hold_loses_nothing(how, monkeypatch):
    monkeypatch.setattr(cpu, "MANY_SCORES", 17)
    inputs = spoilt_attention([7, 2], [9, 30], F32, how, head_dim=256)
    assert_attention_loses_nothing(inputs, how, "cpu")


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("scale", [0.0, -0.0], ids=str)
@pytest.mark.parametrize(("lengths_q", "lengths_k", "head_dim"), [([1], [1], 16), *ATTENTION])
def test_a_scale_of_zero_leaves_no_operand_out(lengths_q, lengths_k, head_dim, scale, name):
    inputs = inputs_of("cross_attention")(lengths_q, lengths_k, F32, head_dim=head_dim) | {"softmax_scale": scale}
    assert_attention_loses_nothing(poisoned(inputs, name, "element", NAN), "scale-zero", "cpu")


def test_a_large_scale_does_not_overflow_before_the_product():
    q, k, v = torch.full((2, 1, 16), 1e-38), torch.full((1030, 1, 16), 1e30), torch.ones(1030, 1, 16)
    ends = [torch.tensor([0, length], dtype=torch.int32) for length in (2, 1030)]
    with use_backend("cpu"):
        out, lse = hia_kernels.cross_attention_with_lse(q, k, v, *ends, 2, 1030, softmax_scale=1e9)
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 166.937), rtol=1e-4, atol=0)


def test_other_queries_are_as_they_are_alone():
    """Compute the queries beside a NaN one, in its sequence and in the next, as without it."""
    inputs = inputs_of("cross_attention")([7, 7], [9, 9], F32, head_dim=32)
    spoilt = poisoned(inputs, "q", "element", NAN)  # query 7, head 1
    whole, partly = (run("cross_attention", _attend, x, "cpu") for x in (inputs, spoilt))
    assert partly["out"][7, 1].isnan().all()
    for name in ("out", "lse"):
        plain, found = whole[name].clone(), partly[name].clone()
        for x in (plain, found):
            (x[7, 1] if name == "out" else x[1, 7]).zero_()
        assert_close(name, found, plain.double(), plain, dtype=F32)


def test_a_single_key_of_score_zero_has_an_lse_of_zero():
    """Take no query for lost whose only key has a score of 0: its result is the value."""
    inputs = spoilt_attention([3], [1], F32, "q-all-0.0", head_dim=32)
    with_zero = run("cross_attention", _attend, inputs, "cpu")
    assert not with_zero["lse"].any()
    assert torch.equal(with_zero["out"], inputs["v"].expand(3, -1, -1))


def _attend(**arguments):
    return torch.ops.hia.cross_attention_with_lse(*arguments.values(), *_scale(arguments))


def _scale(arguments):
    return () if "softmax_scale" in arguments else (arguments["q"].shape[-1] ** -0.5,)


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("op", "name"), ROWS)
def test_every_row_loses_nothing(op, name, place, value):
    row = backend.TABLES[op].row(name)
    if (op, name) in FITTING:
        inputs = FITTING[op, name]()
    else:
        inputs = small_inputs(op, F32) | WITHOUT_RELU.get((op, name), {})
    reasons = row.unavailable_reasons() or row.unsupported_reasons(op, **inputs)
    if reasons:
        pytest.skip("; ".join(reasons))
    for argument, x in inputs.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and (op, argument) not in LEFT_OUT:
            assert_op_loses_nothing(op, name, inputs, argument, place, value)


@pytest.mark.parametrize("head_dim", [32, 256])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_one_infinite_score(dtype, head_dim):
    """Overflow one score: NaN is where the reference has it, and nowhere else."""
    inputs = inputs_of("cross_attention")([2], [3], dtype, heads=1, head_dim=head_dim) | {"softmax_scale": 1e-3}
    for name, row in (("q", 1), ("k", 2)):
        inputs[name] = inputs[name].abs()
        inputs[name][row] = 1e20
    got, expected = (run("cross_attention", _attend, inputs, name) for name in ("cpu", "reference"))
    assert_nothing_is_lost(got, expected, exactly=True)
    assert expected["dv"].isnan().flatten(1).any(1).tolist() == [False, False, True]


@pytest.mark.parametrize("head_dim", [32, 256])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_large_scores_too_many_to_hold(dtype, head_dim, monkeypatch):
    """Give a query a large score, and gradients are summed over blocks of queries, a few scores at a time."""
    inputs = inputs_of("cross_attention")([40, 9], [50, 60], dtype, head_dim=head_dim)
    inputs["q"] = inputs["q"].clone()
    inputs["q"][5] *= 2.0**13
    expected = run("cross_attention", _attend, inputs, "reference")
    largest = []
    monkeypatch.setattr(cpu, "MANY_SCORES", 500)
    probabilities = cpu._probabilities

    def watched(*arguments):
        p = probabilities(*arguments)
        largest.append(p[0].numel())
        return p

    monkeypatch.setattr(cpu, "_probabilities", watched)
    got = run("cross_attention", _attend, inputs, "cpu")
    assert len(largest) > 4
    assert max(largest) <= 500
    for name, x in expected.items():
        error = (got[name].double() - x.double()).norm() / x.double().norm()
        assert error < {F32: 1e-5, BF16: 2**-7, torch.float16: 2**-10}[dtype], name


@pytest.mark.parametrize("score", [2.0**10, 2.0**15, 2.0**27, 2.0**37])  # exact, in whatever order they are summed
@pytest.mark.parametrize("dim", [16, 256])
@pytest.mark.parametrize("op", ["cross_attention", "latent_attention"])
def test_equal_scores_share_the_weight_however_large(op, dim, score):
    """Give two equal keys scores beside which the logarithm of 2 is nothing in fp32."""
    key, query = torch.full((2, 1, dim), 0.25), torch.full((1, 1, dim), score / (dim / 4))
    for row in backend.TABLES[op].backends:
        if row.unavailable_reasons():
            continue
        k, v = (key.clone().requires_grad_() for _ in range(2))
        with use_backend(row.name):
            if op == "cross_attention":
                ends = [torch.tensor([0, length], dtype=torch.int32) for length in (1, 2)]
                out, dv = hia_kernels.cross_attention(query, k, v, *ends, 1, 2, softmax_scale=1.0), v
            else:
                out, dv = hia_kernels.latent_attention(query, k[:, 0], [2], 1.0)[0], k
            assert torch.equal(out.flatten(), key[0, 0]), row.name
            out.sum().backward()
        assert (dv.grad - 0.5).abs().max() < 1e-4, row.name


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["cross_attention", "latent_attention", "row_softmax"])
def test_an_infinite_score_has_an_infinite_lse(op, sign):
    """Overflow every score."""
    large = torch.full((2, 16), 1e20)
    for row in backend.TABLES[op].backends:
        if row.unavailable_reasons():
            continue
        with use_backend(row.name):
            if op == "cross_attention":
                ends = [torch.tensor([0, 2], dtype=torch.int32)] * 2
                qkv = large[:, None], sign * large[:, None], large[:, None]
                lse = hia_kernels.cross_attention_with_lse(*qkv, *ends, 2, 2)[1]
            elif op == "latent_attention":
                lse = torch.ops.hia.latent_attention(large[None], sign * large, [2], 1.0)[1]
            else:
                lse = hia_kernels.row_softmax(sign * large * large, 1.0)[1]
                assert torch.equal(lse, hia_kernels.row_softmax_(sign * large * large, 1.0))
        assert torch.equal(lse.flatten(), torch.full((2,), sign * INF)), row.name
