"""``hia::stem`` by the native extension: borders, pooling windows across threads, every pixel type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hia_kernels
from hia_kernels import stem
from hia_kernels.ops.stem import native
from hia_kernels.ops.stem.reference import stem_ref
from hia_kernels.testing import analysed, assert_close
from tests.inputs import inputs_of

OP = "stem"
make_inputs = inputs_of(OP)
F32 = torch.float32
REASONS = native.unavailable_reasons()
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))


@pytest.fixture(autouse=True)
def only_native():
    with hia_kernels.use_backend("native"):
        yield


def assert_forward_matches(inputs):
    exact, plain = stem_ref(**analysed(inputs, F32)), stem_ref(**inputs)
    out = stem(**inputs)
    assert hia_kernels.last_backend(OP) == "native"
    assert_close("out", out, exact, plain, dtype=F32)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_size(data):
    kernel, pool = data.draw(st.sampled_from([(7, 3), (7, 1), (3, 3), (3, 1)]))
    side = st.one_of(st.integers(kernel + 2 * (pool - 1), 61), st.sampled_from([113, 127, 251]))
    options = {"channels": data.draw(st.sampled_from([1, 3])), "out_channels": data.draw(st.sampled_from([32, 64, 96]))}
    options |= {"images": data.draw(st.sampled_from([0, 4])), "kernel": kernel, "pool": pool}
    options |= {"pixel_dtype": data.draw(st.sampled_from(native.PIXELS))}
    assert_forward_matches(make_inputs((data.draw(side), data.draw(side)), F32, **options))


@pytest.mark.parametrize("pool", [1, 3])
def test_neighbours_and_number_of_threads_change_no_bit(pool):
    inputs = make_inputs((150, 73), F32, images=3, out_channels=64, pool=pool)
    together = stem(**inputs)
    for image in range(3):
        own = {name: inputs[name][image : image + 1] for name in ("pixels", "window")}
        assert torch.equal(stem(**{**inputs, **own})[0], together[image])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(stem(**inputs), together)
    finally:
        torch.set_num_threads(threads)


def test_a_grey_image_is_three_equal_channels():
    """Sum the weights: to rounding, the result is that of three copies of the channel."""
    inputs = make_inputs((37, 52), F32, out_channels=32)
    exact = stem_ref(**analysed({**inputs, "pixels": inputs["pixels"].expand(-1, -1, -1, 3)}, F32))
    assert_close("out", stem(**inputs), exact, stem_ref(**inputs), dtype=F32)


def test_a_window_far_from_zero_keeps_its_bits():
    inputs = make_inputs((40, 33), F32, pixel_dtype=torch.uint16, out_channels=32)
    inputs["window"] = torch.tensor([[60_000.0, 60_010.0], [60_010.0, 60_000.0]])
    inputs["pixels"] = (inputs["pixels"].int() % 12 + 59_999).to(torch.uint16)
    assert_forward_matches(inputs)


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_stays_where_it_is(sign):
    inputs = make_inputs((40, 40), F32, images=1, pixel_dtype=F32, out_channels=32)
    inputs["pixels"][0, 20, 20] = sign * float("nan")
    exact = stem_ref(**inputs)
    assert torch.equal(stem(**inputs).isnan(), exact.isnan()) and exact.isnan().any()


def test_the_grey_border_is_exact():
    """Set one mean far from the others: the padding's part is then large, and a constant would miss it."""
    inputs = make_inputs((24, 29), F32, pool=1, out_channels=32)
    assert_forward_matches({**inputs, "mean": torch.tensor([0.9, 0.1, 0.3]), "std": torch.tensor([0.1, 0.5, 1.0])})


def test_a_negative_scale_and_a_zero_one():
    inputs = make_inputs((30, 33), F32, out_channels=32)
    inputs["scale"][:3] = torch.tensor([-1.0, 0.0, -0.25])
    assert_forward_matches(inputs)


def test_what_takes_which_backend():
    with hia_kernels.use_backend("auto"):
        for options, expected in (
            ({"out_channels": 64}, "native"),
            ({"out_channels": 20}, "cpu"),
            ({"out_channels": 64, "pixel_dtype": torch.float16}, "cpu"),
        ):
            stem(**make_inputs((33, 20), F32, **options))
            assert hia_kernels.last_backend(OP) == expected
    refused = [
        (make_inputs((33, 20), F32, out_channels=20), "output channels must be a multiple of 32, got 20"),
        (make_inputs((33, 20), torch.bfloat16, out_channels=32), "weights of bfloat16 are left to others"),
        (make_inputs((33, 20), F32, out_channels=32, pixel_dtype=torch.float16), "pixels of float16 are left to"),
    ]
    for inputs, reason in refused:
        with pytest.raises(NotImplementedError, match=f"native: {reason}"):
            stem(**inputs)


def test_native_function_checks_its_arguments():
    pixels, window = torch.zeros(1, 20, 20, 1, dtype=torch.uint8), torch.tensor([[0.0, 255.0]])
    weight, shift, out = torch.zeros(1, 98, 32), torch.zeros(32), torch.empty(1, 5, 5, 32)
    arguments = (pixels, window, weight, shift, shift, 0.5, 7, True, out)
    torch.ops.hia_native.stem(*arguments)
    broken = [
        (0, pixels.to(torch.float64), "pixels must be uint8, uint16 or float32"),
        (0, pixels[:, ::2], "pixels must be contiguous"),
        (1, window[0], "window must have 2 dimensions, got 1"),
        (2, weight[:, 1:].clone(), r"weight must have shape \[OC / 32, 98, 32\], got \[1, 97, 32\]"),
        (3, shift[1:], "inside must have 32 entries, got 31"),
        (8, out[:, 1:], r"out must have shape \[1, 5, 5, 32\], got \[1, 4, 5, 32\]"),
    ]
    for position, value, message in broken:
        changed = [*arguments[:position], value, *arguments[position + 1 :]]
        with pytest.raises(RuntimeError, match=f"hia::stem: {message}"):
            torch.ops.hia_native.stem(*changed)
