"""``hia_kernels.testing``: the policy accepts roundings and nothing else, for every op and where terms cancel."""

import math

import pytest
import torch
import torch.nn.functional as F

import hia_kernels
from bench.workloads import references
from hia_kernels import testing
from hia_kernels.core.rounding import UNITS, Bounded
from hia_kernels.testing import UNIT_ROUNDOFF, assert_close, bounded, mismatch, rel_rms, worst_index
from tests.inputs import differentiable, inputs_of

F32, BF16 = torch.float32, torch.bfloat16
REFERENCES = references()
# of each op, inputs whose output has some thousand elements
INPUTS = {
    "stem": lambda dtype: inputs_of("stem")((61, 75), dtype),
    "conv_norm_act": lambda dtype: inputs_of("conv_norm_act")((13, 17), dtype, residual=True),
    "condition_queries": lambda dtype: inputs_of("condition_queries")(20, 4, dtype, queries=40),
    "cross_attention": lambda dtype: inputs_of("cross_attention")([50, 33], [100, 77], dtype),
    "norm_linear": lambda dtype: inputs_of("norm_linear")(150, 140, dtype),
    "inject_rows": lambda dtype: inputs_of("inject_rows")(150, 100, dtype),
    "linear": lambda dtype: inputs_of("linear")(140, dtype),
    "head_linear": lambda dtype: inputs_of("head_linear")(2, 40, dtype),
    "row_softmax": lambda dtype: inputs_of("row_softmax")(40, 120, dtype),
    "latent_attention": lambda dtype: inputs_of("latent_attention")(40, 64, [30, 51], dtype),
}


def replaced(**changes):
    """Seed a fault: the reference on other arguments, which ``changes`` makes of the right ones."""
    return lambda reference, given: reference(**{**given, **{name: change(given) for name, change in changes.items()}})


def first(results):
    return results[0] if isinstance(results, tuple) else results


def without(name, index):
    """Return ``name`` with zeros at ``index``: a mask that drops too much."""

    def drop(given):
        x = given[name].clone()
        x[index] = 0
        return x

    return drop


def half_precision_sums(reference, given):
    """Round every product to bf16 before it is added."""
    return (given["x"].bfloat16() @ given["weight"].mT.bfloat16()).float() + given["bias"]


def one_row_late(given):
    starts = given["cu_seqlens_k"].clone()
    starts[1] += 1
    return starts


# what each op gets wrong: seen in fp32, in the output
FAULTS = {
    "stem": {
        "a tap lost at the kernel's edge": replaced(weight=without("weight", (slice(None), slice(None), 6, 6))),
        "the window of one image turned over": replaced(window=lambda given: given["window"].flip(1)),
        "the mean of another channel": replaced(mean=lambda given: given["mean"].roll(1)),
    },
    "conv_norm_act": {
        "a tap lost at the kernel's edge": replaced(weight=without("weight", (slice(None), slice(None), 2, 2))),
        "one channel's residual lost in one pixel": replaced(residual=without("residual", (1, 5, 5, 3))),
        "the shift of another channel": replaced(shift=lambda given: given["shift"].roll(1)),
    },
    "condition_queries": {
        "the row before the instruction's": replaced(row_idx=lambda given: (given["row_idx"] - 1).clamp_min(0)),
        "no bias": replaced(bias=lambda given: None),
    },
    "cross_attention": {
        "the last key lost": replaced(v=without("v", -1)),
        "heads swapped": replaced(k=lambda given: given["k"].flip(1)),
        "a boundary of the packing off by one": replaced(cu_seqlens_k=one_row_late),
        "scaled by a head's width and not its root": replaced(softmax_scale=lambda given: 1 / given["q"].shape[-1]),
    },
    "norm_linear": {
        "no eps": replaced(eps=lambda given: 0.0),
        "one row twice": replaced(row_idx=lambda given: torch.cat([given["row_idx"][:1], given["row_idx"][:-1]])),
        "variance over one channel less": lambda reference, given: reference(
            **{**given, "norm_weight": given["norm_weight"] * (47 / 48) ** 0.5}
        ),
    },
    "inject_rows": {
        "one row not written": replaced(update=without("update", 7)),
        "added twice": lambda reference, given: 2 * reference(**given) - given["hidden"],
    },
    "linear": {
        "one product lost in one sum": lambda reference, given: _without_one_product(reference(**given), given),
        "sums in bf16": half_precision_sums,
        "no bias": replaced(bias=lambda given: None),
    },
    "head_linear": {
        "heads swapped": replaced(weight=lambda given: given["weight"].roll(1, 0)),
        "one channel of one row lost": replaced(x=without("x", (1, 2, 3, 4))),
    },
    "row_softmax": {
        "the sum lacks a column": lambda reference, given: _sum_without_a_column(given),
        "scaled twice": replaced(scale=lambda given: given["scale"] ** 2),
    },
    "latent_attention": {
        "a boundary of the images off by one": replaced(lengths=lambda given: [31, 50]),
        "a token lost": replaced(latent=without("latent", -1)),
    },
}


def _without_one_product(out, given):
    out[5, 7] -= given["x"][5, 11] * given["weight"][7, 11]
    return out


def _sum_without_a_column(given):
    weights = torch.exp(given["scores"] * given["scale"])
    return weights / weights[:, :-1].sum(1, keepdim=True)


@pytest.mark.parametrize(("op", "fault"), [(op, fault) for op, faults in FAULTS.items() for fault in faults])
def test_a_wrong_output_is_caught(op, fault):
    given = INPUTS[op](F32)
    expected = testing.expect(REFERENCES[op], given, dtype=F32)
    assert expected.problem("out", first(getattr(hia_kernels, op)(**given))) is None
    assert expected.problem("out", first(FAULTS[op][fault](REFERENCES[op], given))) is not None


@pytest.mark.parametrize("op", INPUTS)
def test_one_wrong_element_of_thousands_is_caught_in_bf16(op):
    """Shift one element by half its size: a root mean square over thousands does not show it."""
    given = INPUTS[op](BF16)
    expected = testing.expect(REFERENCES[op], given, dtype=BF16)
    out = first(getattr(hia_kernels, op)(**given)).clone()
    exact, plain = expected.exact["out"].value, expected.plain["out"]
    place = tuple(size // 2 for size in out.shape)
    out[place] += 0.5 * exact.square().mean().sqrt().bfloat16()
    assert mismatch("out", out, exact, plain, dtype=BF16) is None
    with pytest.raises(AssertionError, match=rf"1 of \d+ elements beyond \S+ roundings .*\[{place[0]}, {place[1]}"):
        assert_close("out", out, expected.exact["out"], plain, dtype=BF16)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_wrong_gradient_is_caught(op, dtype):
    """Take one too large, one of other rows. In 16 bits the stem's plain gradient is rough: roundings decide maxima."""
    given, wrt = INPUTS[op](dtype), differentiable(op)
    expected = testing.expect(REFERENCES[op], given, wrt, dtype=dtype)
    results = testing.forward_backward(getattr(hia_kernels, op), given, wrt)
    expected.check(results)
    for name in (name for name in results if name.startswith("d")):
        assert expected.problem(name, results[name] * (1.05 if dtype == F32 else 1.3)) is not None, name
        assert expected.problem(name, results[name].roll(1, 0)) is not None, name


@pytest.mark.parametrize("op", INPUTS)
def test_the_wrong_results_of_every_op_are_listed(op):
    assert op in FAULTS and set(INPUTS) == set(FAULTS) == set(REFERENCES)


class TestCancellation:
    """Sum of 215 products that is 0 but for 1e-6 of its terms."""

    x = torch.randn(1, 215, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(1, 215, generator=torch.Generator().manual_seed(1))

    def cancelling(self):
        weight = self.weight.double().clone()
        weight[0, -1] -= (self.x.double() @ weight.mT).item() / self.x[0, -1].item()
        return weight.float()

    def test_any_order_of_the_sum_passes(self):
        weight = self.cancelling()
        exact, plain = bounded(self.x, F32) @ bounded(weight, F32).mT, self.x @ weight.mT
        backwards = (self.x.flip(1) * weight.flip(1)).cumsum(1)[:, -1:]
        assert rel_rms(backwards, exact) > 1e-4  # a bound relative to the result refuses it
        for out in (plain, backwards):
            assert_close("out", out, exact, plain, dtype=F32)

    def test_a_lost_product_does_not(self):
        weight = self.cancelling()
        exact, plain = bounded(self.x, F32) @ bounded(weight, F32).mT, self.x @ weight.mT
        least = (self.x * weight).abs().min()
        wrong = plain + UNITS * 215 * least  # still less than any other product
        assert mismatch("out", wrong, exact, plain, dtype=F32) is not None


class TestRoundingAnalysis:
    """Tests of terms and spread, against sums written out."""

    def setup_method(self):
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randn(shape, generator=generator) for shape in ((4, 9), (9, 5)))

    def test_of_a_product(self):
        found = bounded(self.a, F32) @ bounded(self.b, F32)
        assert torch.equal(found.value, self.a.double() @ self.b.double())
        torch.testing.assert_close(found.terms, self.a.abs() @ self.b.abs())
        torch.testing.assert_close(found.spread, (self.a.square() @ self.b.square()).sqrt())

    def test_a_second_product_adds_its_own_terms_to_the_first_ones(self):
        c = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
        found = bounded(self.a, F32) @ bounded(self.b, F32) @ bounded(c, F32)
        inner = self.a.abs() @ self.b.abs()
        torch.testing.assert_close(found.terms, (inner + (self.a @ self.b).abs()) @ c.abs())

    def test_of_a_difference(self):
        x, y = bounded(torch.tensor([1.0, 2.0]), F32), bounded(torch.tensor([1.0, -2.0]), F32)
        found = x - y
        assert found.value.tolist() == [0, 4] and found.terms.tolist() == [0, 4]
        torch.testing.assert_close(found.spread, torch.tensor([2.0, 8.0]).sqrt())

    def test_autograd_runs_on_top(self):
        a, b = bounded(self.a, F32).requires_grad_(), bounded(self.b, F32)
        (gradient,) = torch.autograd.grad((a @ b).exp().sum(), a)
        assert isinstance(gradient, Bounded) and (gradient.terms >= gradient.value.abs() * 0.99).all()

    def test_a_branch_that_a_rounding_decides_is_in_the_terms(self):
        """Let ReLU's gradient be all or nothing at a sum that is 0 but for roundings; farther away it may not."""
        x = bounded(torch.tensor([1.0, 1.0]), F32).requires_grad_()
        out = torch.relu(x - bounded(torch.tensor([1.0, 0.5]), F32))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.value.tolist() == [0, 1]
        assert gradient.bound()[0] >= 1 and gradient.bound()[1] < 1e-5

    def test_what_a_clamp_stops_is_exact(self):
        x = bounded(torch.full((2, 300), -10.0, dtype=BF16), BF16).sum(1).clamp(-1, 1)
        assert x.value.tolist() == [-1, -1] and x.terms.tolist() == [0, 0] and (x.bound() < 0.1).all()

    def test_a_mask_of_infinity_leaves_the_rest_bounded(self):
        scores = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        scores[:, :3] = -math.inf
        p = torch.softmax(bounded(scores, F32), 1)
        assert p.bound().isfinite().all() and (p.bound()[:, :3] < 1e-30).all()
        wrong = p.value.float()
        wrong[0, 0] = 1e-7
        assert "1 of 32 elements" in mismatch("p", wrong, p, torch.softmax(scores, 1), dtype=F32)
        lse = torch.logsumexp(bounded(scores, F32), 1)
        assert lse.bound().isfinite().all()

    def test_fewer_digits_inside_a_reference_are_its_own(self):
        """Convert in the middle: it must not make the truth as wrong as what is tested."""
        found = bounded(self.a, F32).half().float() @ bounded(self.b, F32)
        assert torch.equal(found.value, self.a.double() @ self.b.double())

    def test_a_result_written_into_a_stranger_is_a_sentence(self):
        def reference(x):
            out = torch.zeros(4, 9)
            out[1] = x[1]
            return out

        with pytest.raises(NotImplementedError, match=r"writes into a tensor that was made without its inputs"):
            testing.expect(reference, {"x": self.a}, dtype=F32)

    def test_an_operator_without_a_rule_is_named(self):
        with pytest.raises(NotImplementedError, match=r"no rule says what roundings do in \w+\.erf_?inv"):
            torch.erfinv(bounded(self.a, F32))

    @pytest.mark.parametrize(
        ("reference", "shapes"),
        [
            pytest.param(lambda x: F.softmax(x, -1), [(5, 9)], id="softmax"),
            pytest.param(lambda x, w: F.gelu(x @ w, approximate="tanh"), [(5, 9), (9, 4)], id="gelu-tanh"),
            pytest.param(lambda x, w: F.rms_norm(x, (9,), w), [(5, 9), (9,)], id="rms-norm"),
            pytest.param(lambda x, w: F.layer_norm(x + 100, (9,), w), [(5, 9), (9,)], id="layer-norm"),
            pytest.param(lambda x, w: F.group_norm(x, 2, w), [(2, 4, 5, 5), (4,)], id="group-norm"),
            pytest.param(lambda x, w: F.batch_norm(x, None, None, w, training=True), [(2, 4, 5, 5), (4,)], id="batch"),
            pytest.param(lambda x, w: torch.einsum("bhd,hde->bhe", x, w), [(5, 2, 9), (2, 9, 4)], id="einsum"),
            pytest.param(lambda x, y: x.clone().mul_(2).add_(y).relu_(), [(5, 9), (5, 9)], id="in-place"),
            pytest.param(lambda x: x.masked_fill(x < 0, float("-inf")).softmax(-1), [(5, 9)], id="masked-softmax"),
            pytest.param(lambda x: (x - x.mean(0)) / x.std(0), [(5, 9)], id="standardised"),
            pytest.param(lambda x, w: F.silu(x) * torch.maximum(x, w), [(5, 9), (5, 9)], id="gated"),
            pytest.param(lambda x, w: F.conv_transpose2d(x, w), [(2, 4, 6, 6), (4, 3, 3, 3)], id="transposed"),
            pytest.param(lambda x: F.avg_pool2d(x, 2).cumsum(-1), [(2, 4, 6, 6)], id="pooled-running-sum"),
        ],
    )
    def test_references_of_others_are_analysed(self, reference, shapes):
        """Analyse the operators that people write references with, and gradients: right passes, wrong does not."""
        inputs = {name: torch.randn(shape) for name, shape in zip("xw", shapes, strict=False)}
        named = lambda **given: reference(*given.values())  # noqa: E731
        expected = testing.expect(named, inputs, tuple(inputs), dtype=F32)
        results = testing.forward_backward(named, inputs, tuple(inputs))
        expected.check(results)
        for name, result in results.items():
            assert expected.problem(name, result + 1e-3 * result.abs().max()) is not None, name

    @pytest.mark.parametrize("dtype", UNIT_ROUNDOFF, ids=str)
    def test_the_bound_of_a_stored_value_is_in_roundings(self, dtype):
        found = bounded(torch.ones(1, dtype=dtype), dtype)
        units = 2 * UNITS if dtype == torch.float64 else UNITS  # its truth is no more exact than it is
        assert found.bound().item() == pytest.approx(units * UNIT_ROUNDOFF[dtype], rel=1e-4)


def test_a_kink_that_only_one_side_takes_is_no_failure_in_fp32():
    """Set a pre-activation nearer to 0 than its roundings: its gradients are one branch's or the other's."""
    x, weight = torch.ones(100, 2), torch.tensor([[1.0, -1.0]])
    x[:, 1] = torch.linspace(0.5, 1.5, 100)
    x[50] = torch.tensor([1.0, 1.0 - 2**-24])  # 6e-8 above the kink, of terms of size 1
    reference = lambda x, weight: torch.relu(x @ weight.mT)  # noqa: E731
    expected = testing.expect(reference, {"x": x, "weight": weight}, ("x", "weight"), dtype=F32)
    results = testing.forward_backward(reference, {"x": x, "weight": weight}, ("x", "weight"))
    results["dx"][50] = 0
    expected.check(results)
    results["dx"][10] = 0  # far from the kink
    assert expected.problem("dx", results["dx"]) is not None


def test_sums_in_half_precision_are_seen_in_an_attention():
    """Sum 2048 keys in bf16, four at a time: one element may have such errors, but not all of them."""
    q, k, v = (
        torch.randn(size, 64, generator=torch.Generator().manual_seed(n)).bfloat16()
        for n, size in enumerate((40, 2048, 2048))
    )

    def reference(q, k, v):
        return (torch.softmax(q.float() @ k.float().mT / 8, 1) @ v.float()).to(q.dtype)

    def rounded(q, k, v):
        p, out = torch.softmax(q.float() @ k.float().mT / 8, 1), torch.zeros(40, 64)
        for first in range(0, 2048, 4):
            out = (out + p[:, first : first + 4] @ v[first : first + 4].float()).bfloat16().float()
        return out.bfloat16()

    given = {"q": q, "k": k, "v": v}
    expected = testing.expect(reference, given, dtype=BF16)
    assert expected.problem("out", reference(**given)) is None
    exact, plain, wrong = expected.exact["out"], expected.plain["out"], rounded(**given)
    assert expected.problem("out", wrong) is not None
    assert "rel-RMS" in mismatch("out", wrong, exact.value, plain, dtype=BF16)
    # the analysis must not make the root mean square milder where nothing cancels
    assert testing._scale(exact.value, exact) == pytest.approx(exact.value.square().mean().sqrt().item())


def test_every_output_has_a_name():
    with pytest.raises(
        ValueError, match=r"names must name every output, tensors all, got \('out', 'lse'\) for Tensor, "
    ):
        testing.expect(lambda x: (x, x, x), {"x": torch.ones(2)}, dtype=F32)
    with pytest.raises(ValueError, match=r"differentiable must name arguments among \['x'\], got \['y'\]"):
        testing.expect(lambda x: x, {"x": torch.ones(2)}, ("y",), dtype=F32)
    with pytest.raises(ValueError, match=r"dtype must be among float64, float32, float16, bfloat16, got torch.int32"):
        testing.expect(lambda x: x, {"x": torch.ones(2)}, dtype=torch.int32)


def test_expected_names_what_is_missing():
    given = INPUTS["linear"](F32)
    expected = testing.expect(REFERENCES["linear"], given, ("x",), dtype=F32)
    with pytest.raises(AssertionError, match=r"results must be \['dx', 'out'\], got \['out'\]"):
        expected.check({"out": hia_kernels.linear(**given)})


def test_an_overflowing_bound_binds_nothing_and_the_rest_is_compared():
    huge = torch.full((2, 3), 1e20)
    exact = bounded(huge, F32) @ bounded(huge, F32).mT
    assert exact.spread.isinf().all()
    out = torch.full((2, 2), 3e40, dtype=torch.float64)
    assert mismatch("out", out, exact, out, dtype=F32) is None
    assert "rel-RMS" in mismatch("out", 1.01 * out, exact, out, dtype=F32)


class TestTolerance:
    """Tests without an analysis: the root mean square and the patterns, which must be able to fail."""

    exact = torch.linspace(1, 2, 100, dtype=torch.float64)

    def test_rounding_passes_and_more_does_not(self):
        plain = self.exact.half()
        assert_close("x", plain, self.exact, plain, dtype=torch.float16)
        wrong = plain.clone()
        wrong[7] += 0.05
        with pytest.raises(AssertionError, match=r"^x: rel-RMS .* > .*; worst at \[7\]: 1.12012 instead of 1.07071$"):
            assert_close("x", wrong, self.exact, plain, dtype=torch.float16)

    def test_slack_is_in_roundoffs_of_the_dtype(self):
        for dtype, roundoff in {
            torch.float64: 2**-53,
            F32: 2**-24,
            torch.float16: 2**-11,
            torch.bfloat16: 2**-8,
        }.items():
            truth = torch.ones(4, dtype=torch.float64)
            plain = truth.to(dtype)
            step = 4 * roundoff  # representable above 1
            assert_close("x", plain + step, truth, plain, dtype=dtype, slack=4)
            with pytest.raises(AssertionError):
                assert_close("x", plain + step, truth, plain, dtype=dtype, slack=3.9)

    def test_twice_as_wrong_as_plain_is_the_limit(self):
        plain = self.exact.float() + 1e-5
        assert_close("x", self.exact.float() + 1.9e-5, self.exact, plain, dtype=F32)
        with pytest.raises(AssertionError, match="rel-RMS"):
            assert_close("x", self.exact.float() + 2.2e-5, self.exact, plain, dtype=F32)

    def test_integers_are_right_or_wrong(self):
        exact = torch.tensor([3001, 7])
        assert_close("index", exact.clone(), exact, exact, dtype=BF16)
        with pytest.raises(AssertionError, match=r"integers differ; \[0\]: 3006 instead of 3001"):
            assert_close("index", torch.tensor([3006, 7]), exact, exact, dtype=BF16)

    def test_nan_is_never_close_to_a_number(self):
        for value in (math.nan, math.inf):
            wrong = self.exact.clone()
            wrong[3] = value
            with pytest.raises(AssertionError, match="pattern differs"):
                assert_close("x", wrong, self.exact, self.exact, dtype=torch.float64)
            with pytest.raises(AssertionError, match="pattern differs"):
                assert_close("x", self.exact, wrong, wrong, dtype=torch.float64)
            with pytest.raises(AssertionError, match="the plain reference is not finite where the truth is"):
                assert_close("x", self.exact, self.exact, wrong, dtype=torch.float64)
            assert_close("x", wrong, wrong, wrong, dtype=torch.float64)
        opposite = wrong.clone()
        opposite[3] = -math.inf
        with pytest.raises(AssertionError, match="sign of Inf differs"):
            assert_close("x", opposite, wrong, wrong, dtype=torch.float64)

    def test_a_truth_of_zeros(self):
        zero = torch.zeros(4, dtype=torch.float64)
        assert_close("x", zero.float(), zero, zero.float(), dtype=F32)
        assert rel_rms(torch.full((4,), 0.5), zero) == 0.5
        with pytest.raises(AssertionError, match=r"rel-RMS 1.00e-03"):
            assert_close("x", (zero + 1e-3).float(), zero, zero.float(), dtype=F32)

    def test_shape_dtype_and_nothing_at_all(self):
        with pytest.raises(AssertionError, match=r"^x: shape \(2,\) != \(100,\)"):
            assert_close("x", self.exact[:2], self.exact, self.exact, dtype=torch.float64)
        with pytest.raises(AssertionError, match=r"^x: torch.float32 != torch.float64"):
            assert_close("x", self.exact.float(), self.exact, self.exact, dtype=F32)
        nothing = torch.empty(0, 3)
        assert_close("x", nothing, nothing.double(), nothing, dtype=F32)
        assert worst_index(nothing, nothing) == "nowhere (empty)"
