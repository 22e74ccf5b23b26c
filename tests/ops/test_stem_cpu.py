"""``hia::stem`` on the CPU: strips of rows, an exact border, summed weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia_kernels
from bench.measure.memory import peak_bytes
from hia_kernels import stem
from hia_kernels.ops.stem import cpu
from hia_kernels.ops.stem.reference import stem_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of
from tests.ops.harness import DTYPES, assert_matches, assert_repeatable

OP = "stem"
make_inputs = inputs_of(OP)


@pytest.fixture(autouse=True)
def backend():
    with hia_kernels.use_backend("cpu"):
        yield
    assert hia_kernels.last_backend(OP) == "cpu"


def assert_forward_matches(inputs, dtype=torch.float32):
    exact, plain = stem_ref(**analysed(inputs, dtype)), stem_ref(**inputs)
    assert_close("out", stem(**inputs), exact, plain, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "pool"), [(1, 3), (3, 1)])
def test_one_row_at_a_time(dtype, channels, pool, monkeypatch):
    """Make every row of the result a strip's first and last: halos, borders and pooling windows all show."""
    monkeypatch.setattr(cpu, "STRIP_BYTES", 1)
    assert_matches(OP, stem, stem_ref, make_inputs((37, 52), dtype, channels=channels, pool=pool), dtype)


def test_strips_do_not_show(monkeypatch):
    inputs = make_inputs((97, 41), torch.float32, images=1)
    whole = stem(**inputs)
    for size in (1, 20_000, 60_000):
        monkeypatch.setattr(cpu, "STRIP_BYTES", size)
        assert_close("out", stem(**inputs), stem_ref(**analysed(inputs, torch.float32)), whole, dtype=torch.float32)
    assert_repeatable(OP, stem, inputs)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_size(data):
    kernel, pool = data.draw(st.sampled_from([(7, 3), (7, 1), (3, 3), (3, 1)]))
    side = st.integers(kernel + 2 * (pool - 1), 61)
    pixel_dtype = data.draw(st.sampled_from([torch.uint8, torch.uint16, torch.float32, torch.float16]))
    options = {"channels": data.draw(st.sampled_from([1, 3])), "out_channels": data.draw(st.integers(1, 20))}
    size = data.draw(side), data.draw(side)
    outputs = options["out_channels"] * -(-size[0] // 4) * -(-size[1] // 4)
    options["images"] = -(-128 // outputs)  # the root mean square of fewer errors is a matter of luck
    options |= {"kernel": kernel, "pool": pool, "pixel_dtype": pixel_dtype}
    assert_forward_matches(make_inputs(size, torch.float32, **options))


def test_a_window_far_from_zero_keeps_its_bits():
    """Subtract low before anything is scaled: 65000 to 65100 of 16 bits."""
    inputs = make_inputs((23, 31), torch.float32, images=1, pixel_dtype=torch.uint16)
    inputs["pixels"] = (65000 + inputs["pixels"].int() % 101).to(torch.uint16)
    assert_forward_matches({**inputs, "window": torch.tensor([[65000.0, 65100.0]])})


def test_the_grey_border_is_exact():
    """Set one mean far from the others: the padding's part is then large, and a constant would miss it."""
    inputs = make_inputs((24, 29), torch.float32, pool=1)
    assert_forward_matches({**inputs, "mean": torch.tensor([0.9, 0.1, 0.3]), "std": torch.tensor([0.1, 0.5, 1.0])})


def test_nan_stays_where_it_is():
    inputs = make_inputs((40, 40), torch.float32, images=1, pixel_dtype=torch.float32)
    inputs["pixels"][0, 20, 20] = float("nan")
    exact = stem_ref(**inputs)
    assert torch.equal(stem(**inputs).isnan(), exact.isnan()) and exact.isnan().any()


def test_a_negative_scale_and_a_zero_one():
    inputs = make_inputs((30, 33), torch.float32)
    inputs["scale"][:3] = torch.tensor([-1.0, 0.0, -0.25])
    assert_matches(OP, stem, stem_ref, inputs, torch.float32)


def test_memory_is_the_result_and_a_strip():
    inputs = make_inputs((448, 448), torch.float32, images=1, pixel_dtype=torch.uint16, out_channels=64)
    ours, plain = (peak_bytes(lambda run=run: run(**inputs), "cpu") for run in (stem, stem_ref))
    result = 112 * 112 * 64 * 4
    assert ours < result + 4 * cpu.STRIP_BYTES < plain
    weight = inputs["weight"].requires_grad_()
    dout = torch.ones(1, 112, 112, 64)
    ours, plain = (
        peak_bytes(lambda run=run: torch.autograd.grad(run(**inputs), weight, dout), "cpu") for run in (stem, stem_ref)
    )
    assert ours < plain / 2


@pytest.mark.parametrize(("pool", "convolutions"), [(1, 0), (3, 1)])
def test_the_backward_computes_again_what_a_pool_hides(pool, convolutions, monkeypatch):
    """Read from the output where the ReLU passed, unless a pool hides it; nothing is kept with one."""
    inputs = make_inputs((33, 30), torch.float32, pool=pool)
    weight, kept = inputs["weight"].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        out = stem(**inputs)
    assert kept.count(out.shape) == (pool == 1)
    calls, convolved = [], cpu._convolved
    monkeypatch.setattr(cpu, "_convolved", lambda *args: calls.append(args) or convolved(*args))
    torch.autograd.grad(out.sum(), weight)
    assert len(calls) == convolutions


def test_gradients_do_not_depend_on_a_kept_output():
    """Recompute the output that the backward op lacks: the same numbers, all from one sum over taps."""
    inputs = make_inputs((31, 26), torch.float32, pool=1)
    dout = torch.randn(2, 16, 13, 8)
    mask = [False, True, True, True]
    for name, kept, computed in zip(
        ("dpixels", "dweight", "dscale", "dshift"),
        torch.ops.hia.stem_bwd(dout, *inputs.values(), mask, stem(**inputs)),
        torch.ops.hia.stem_bwd(dout, *inputs.values(), mask),
        strict=True,
    ):
        assert_close(name, kept, computed, computed, dtype=torch.float32)


@pytest.mark.parametrize("pool", [1, 3])
def test_gradients_along_the_grey_border(pool, monkeypatch):
    """Set the means far apart: the ones' part of the taps is large, and each row of a strip has its own padding."""
    inputs = make_inputs((25, 30), torch.float32, pool=pool)
    inputs |= {"mean": torch.tensor([0.9, 0.1, 0.3]), "std": torch.tensor([0.1, 0.5, 1.0])}
    assert_matches(OP, stem, stem_ref, inputs, torch.float32)
    monkeypatch.setattr(cpu, "STRIP_BYTES", 1)
    assert_matches(OP, stem, stem_ref, inputs, torch.float32)


def test_what_is_left_to_the_reference():
    stem(**make_inputs((16, 16), torch.float32))
    with pytest.raises(NotImplementedError, match="cpu: float64 is left to the reference"):
        stem(**make_inputs((16, 16), torch.float64))
    inputs = make_inputs((16, 16), torch.float32, pixel_dtype=torch.float32)
    pixels = inputs["pixels"].requires_grad_()
    out = stem(**inputs)
    with pytest.raises(NotImplementedError, match="cpu: the pixels' gradient is left to the reference"):
        torch.autograd.grad(out.sum(), pixels)
    with hia_kernels.use_backend("auto"):
        assert torch.autograd.grad(out.sum(), pixels)[0].any()
    stem(**inputs)
