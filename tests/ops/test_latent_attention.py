"""``hia::latent_attention``."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from hia_kernels import cross_attention, last_backend, latent_attention, row_softmax, use_backend
from hia_kernels.core import triton_support
from hia_kernels.ops.latent_attention import blocked
from hia_kernels.ops.latent_attention import reference as reference_module
from hia_kernels.testing import FP64_SLACK, analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import (
    DTYPES,
    HALVES,
    assert_autocast,
    assert_backward_is_autograd_of_reference,
    assert_compiles,
    assert_exports,
    assert_gradcheck,
    assert_identical,
    assert_matches,
    assert_repeatable,
    flops,
    forward_backward,
    opcheck,
    skip_unless_here,
)

OP = "latent_attention"
make_inputs = inputs_of(OP)
CASES = [
    pytest.param(24, 32, [17], id="one-image"),
    pytest.param(24, 32, [5, 1, 40], id="ragged"),
    pytest.param(7, 20, [33 * 33], id="odd-grid"),
    pytest.param(12, 16, [0, 9, 0], id="empty-images"),
    pytest.param(1, 16, [1], id="one-token"),
    pytest.param(300, 48, [900, 30], id="several-blocks"),
    pytest.param(2048, 5120, [784, 784], id="13b-896px", marks=pytest.mark.gpu),
]


def reference(**inputs):
    return reference_module.latent_attention_ref(**inputs)[0]


@pytest.mark.parametrize(("rows", "width", "lengths"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(rows, width, lengths, dtype, device):
    assert_matches(OP, latent_attention, reference, make_inputs(rows, width, lengths, dtype, device), dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [[17], [5, 0, 40]], ids=str)
def test_matches_reference_through_the_row_softmax_kernel(lengths, dtype, triton_device):
    with use_backend("triton"):
        assert_matches(OP, latent_attention, reference, make_inputs(24, 32, lengths, dtype, triton_device), dtype)
        assert last_backend(OP) == last_backend("row_softmax") == "triton"


@pytest.mark.interpreter
def test_fp32_probabilities_overwrite_the_scores(triton_device):
    scores = torch.randn(9, 33, device=triton_device)
    expected, expected_lse = row_softmax(scores.clone(), 0.25)
    p, lse = blocked._softmax_by_op(scores, 0.25, torch.float32)
    assert p.data_ptr() == scores.data_ptr()
    assert torch.equal(p, expected) and torch.equal(lse, expected_lse)
    halves, lse = blocked._softmax_by_op(torch.randn(9, 33, device=triton_device), 0.25, torch.float16)
    assert halves.dtype == torch.float16 and lse.dtype == torch.float32


@pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter's process")
def test_backend_on_the_cpu():
    latent_attention(**make_inputs(3, 16, [4], torch.float32))
    assert last_backend(OP) == "cpu"
    with use_backend("reference"):
        latent_attention(**make_inputs(3, 16, [4], torch.float32))
    assert last_backend(OP) == "reference"


@pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter's process")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_large_products_are_the_extensions(dtype):
    """Multiply all but fp64 by the extension: halves are multiplied in fp32."""
    skip_unless_here("native")
    inputs = make_inputs(20, 400, [4000, 0, 3], dtype)
    inputs["q"].requires_grad_()
    out = latent_attention(**inputs)
    assert last_backend(OP) == "cpu"  # 20 rows
    out.sum().backward()
    assert last_backend(OP) == ("cpu" if dtype == torch.float64 else "native")  # 4000 in the latent's gradient
    latent_attention(**make_inputs(300, 400, [400], dtype))
    assert last_backend(OP) == ("cpu" if dtype == torch.float64 else "native")


@pytest.mark.parametrize("backend", ["native", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "lengths"), [(24, 32, [5, 0, 40]), (300, 400, [400])])
def test_forced_on_the_cpu(rows, width, lengths, dtype, backend):
    skip_unless_here(backend)
    with use_backend(backend):
        assert_matches(OP, latent_attention, reference, make_inputs(rows, width, lengths, dtype), dtype)
    assert last_backend(OP) == backend


def test_native_takes_no_doubles():
    skip_unless_here("native")
    with use_backend("native"), pytest.raises(NotImplementedError, match="native: float64 is left to others"):
        latent_attention(**make_inputs(3, 16, [4], torch.float64))


def test_backward_is_autograd_of_reference(device):
    inputs = make_inputs(9, 16, [7, 3], torch.float64, device)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            assert_backward_is_autograd_of_reference(OP, latent_attention, reference, inputs)


def test_is_attention_with_one_key_value_head(device):
    """Check against ``cross_attention`` with the latent as every head's key and value."""
    lengths = [7, 3]
    inputs = make_inputs(6, 16, lengths, torch.float64, device)
    cu_q, cu_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 6, 12], [0, 7, 10]))
    kv = inputs["latent"][:, None]
    expected = cross_attention(inputs["q"].flatten(0, 1)[:, None], kv, kv, cu_q, cu_k, 6, 7, inputs["softmax_scale"])
    out = latent_attention(**inputs)
    assert_close("out", out.flatten(0, 1)[:, None], expected, expected, dtype=torch.float64, slack=FP64_SLACK)


def test_gradcheck():
    assert_gradcheck(OP, latent_attention, make_inputs(3, 4, [3, 0, 2], torch.float64))


def test_opcheck(device):
    inputs = make_inputs(5, 16, [4, 3], torch.float32, device)
    opcheck(OP, torch.ops.hia.latent_attention.default, inputs)
    q, latent, lengths, scale = inputs.values()
    out, lse = torch.ops.hia.latent_attention(q, latent, lengths, scale)
    torch.library.opcheck(
        torch.ops.hia.latent_attention_bwd.default, (torch.randn_like(out), q, latent, out, lse, lengths, scale)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(backend, device):
    assert_compiles(OP, latent_attention, make_inputs(5, 16, [4, 3], torch.float32, device), backend)


def test_dynamic_lengths_compile_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(latent_attention, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([4, 3], [9, 2], [30, 31]):
        inputs = make_inputs(5, 16, lengths, torch.float32, device)
        assert torch.equal(compiled(**inputs), latent_attention(**inputs))
    assert counter.frame_count == 1


def test_exports(device):
    assert_exports(latent_attention, make_inputs(5, 16, [4, 3], torch.float32, device))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(dtype, device):
    inputs = make_inputs(5, 16, [4, 3], torch.float32, device)
    assert_autocast(OP, latent_attention, inputs, dtype, cast=("q", "latent"), out_dtype=dtype)


def test_flops():
    inputs = make_inputs(5, 16, [4, 3], torch.float32)
    assert flops(latent_attention, **inputs) == flops(reference, **inputs) == 4 * 7 * 5 * 16


def test_repeatable(device):
    assert_repeatable(OP, latent_attention, make_inputs(300, 48, [900, 30], torch.float32, device))


def test_an_image_does_not_see_its_neighbours(device):
    """Compare to rounding: the products are the vendor's."""
    inputs = make_inputs(24, 32, [5, 1, 40], torch.float32, device)
    together, start = latent_attention(**inputs), 0
    for image, length in enumerate(inputs["lengths"]):
        alone = {
            **inputs,
            "q": inputs["q"][image : image + 1],
            "latent": inputs["latent"][start : start + length],
            "lengths": [length],
        }
        start += length
        torch.testing.assert_close(latent_attention(**alone)[0], together[image], rtol=1e-5, atol=1e-6)


def test_blocks_are_the_whole(monkeypatch):
    inputs = make_inputs(300, 16, [200], torch.float64)
    whole = forward_backward(OP, latent_attention, inputs)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", {"cpu": 1, "cuda": 1})
    for name, part in forward_backward(OP, latent_attention, inputs).items():
        assert_close(name, part, whole[name], whole[name], dtype=torch.float64, slack=FP64_SLACK)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
)
def test_any_sizes(rows, width, lengths, dtype):
    assert_matches(OP, latent_attention, reference, make_inputs(rows, width, lengths, dtype), dtype)


def test_an_expanded_query_is_like_a_copied_one():
    inputs = make_inputs(6, 16, [4, 3], torch.float32)
    one = inputs["q"][:1]
    expanded, copied = ({**inputs, "q": q} for q in (one.expand(2, -1, -1), one.repeat(2, 1, 1)))
    assert_identical({"out": latent_attention(**expanded)}, {"out": latent_attention(**copied)})


ERRORS = [
    ({"latent": torch.zeros(7, 8)}, ValueError, r"latent must have shape \[T, E\], got \[7, 8\]; E=16 is fixed by q"),
    ({"lengths": [7]}, ValueError, r"lengths must have one entry for each of the 2 images, got \[7\]"),
    ({"lengths": [4, 4]}, ValueError, r"lengths must be >= 0 and add up to latent's 7 rows, got \[4, 4\]"),
    ({"lengths": [9, -2]}, ValueError, r"lengths must be >= 0 and add up to latent's 7 rows, got \[9, -2\]"),
    ({"lengths": torch.tensor([4, 3])}, TypeError, "lengths must be a sequence of ints, got a tensor"),
    ({"latent": torch.zeros(7, 16).half()}, TypeError, "latent must be float32 like q, got float16"),
    ({"q": torch.zeros(2, 5, 16).int()}, TypeError, "q must be float32 or float16 or bfloat16 or float64, got int32"),
]


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:30] for *_, message in ERRORS])
def test_bad_input_names_the_argument(change, kind, message):
    inputs = {**make_inputs(5, 16, [4, 3], torch.float32), **change}
    with pytest.raises(kind, match=f"hia::latent_attention: {message}"):
        latent_attention(**inputs)


def test_no_second_derivatives():
    inputs = make_inputs(3, 4, [3], torch.float64)
    q = inputs["q"].detach().requires_grad_()
    (grad,) = torch.autograd.grad(latent_attention(**{**inputs, "q": q}).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients"):
        grad.sum().backward()


@pytest.mark.parametrize(("rows", "lengths"), [(24, [5, 0, 40]), (300, [900])], ids=["ragged", "several-blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_sum_exp_is_the_references(rows, lengths, dtype, device):
    """Compare lse itself: the public function returns none, and only the reference's backward reads it."""
    inputs = make_inputs(rows, 32, lengths, dtype, device)
    lse, plain = torch.ops.hia.latent_attention(**inputs)[1], reference_module.latent_attention_ref(**inputs)[1]
    exact = reference_module.latent_attention_ref(**analysed(inputs, torch.float32))[1]
    assert_close("lse", lse, exact, plain, dtype=torch.float32)
