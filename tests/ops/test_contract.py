"""Contracts of the ops, where they are checked: called directly, of fake tensors, by the public function."""

import inspect

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hia_kernels
from hia_kernels import testing, use_backend
from hia_kernels.core import backend, registration
from hia_kernels.core.checks import FLOATS, Arg, Contract, like, statistics
from hia_kernels.ops import conv_norm_act
from tests.inputs import OPS, differentiable, inputs_of, small_inputs
from tests.ops.harness import leaves

F32 = torch.float32
INTO = ("inject_rows_", "row_softmax_")


class Recorded(TorchDispatchMode):
    """The calls of our ops in a block, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "hia":
            self.calls.setdefault(name, registration.bind(name, args, kwargs))
        return func(*args, **(kwargs or {}))


def inputs_of_call(op):
    inputs = small_inputs(op, F32)
    if op in ("conv_norm_act", "inject_rows", "norm_linear"):
        inputs = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return inputs


def recorded_calls():
    """Return one valid call of every function of the namespace, the gradients' and those of packed weights too."""
    with Recorded() as mode:
        for op in OPS:
            inputs = inputs_of_call(op)
            outs = getattr(hia_kernels, op)(**{**inputs, **leaves(op, inputs)})
            outs = outs if isinstance(outs, tuple) else (outs,)
            sum(out.float().sum() for out in outs).backward()
        hia_kernels.cross_attention(**inputs_of_call("cross_attention"))
        hia_kernels.inject_rows_(**inputs_of_call("inject_rows"))
        hia_kernels.row_softmax_(torch.randn(5, 7), 0.5)
        x, weight, ones = torch.randn(2, 5, 4, 32), torch.randn(32, 32, 3, 3), torch.ones(32)
        packed = conv_norm_act.pack_conv(weight, ones, ones)
        out = conv_norm_act.conv_norm_act_packed(x, packed, torch.ones(2, 5, 4, 32))
        conv_norm_act.conv_norm_act_packed_(out, x, packed)
        conv_norm_act.conv_norm_act_packed_out(out, x, packed)
    found = {name: detached(arguments) for name, arguments in mode.calls.items()}
    # without a GPU nothing packs a stem; its checks are the same on every device
    pixels, window, mean, std, weight, scale, shift, pool = small_inputs("stem", F32).values()
    taps = torch.ones(5, (weight.shape[2] + 1) ** 2, weight.shape[0])
    names = [argument.name for argument in torch.ops.hia.stem_packed.default._schema.arguments]
    values = (pixels, window, mean, std, taps, scale, shift, pool)
    return {**found, "stem_packed": dict(zip(names, values, strict=True))}


def detached(arguments):
    return {name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def functions():
    """Name every function of the namespace."""
    every = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for namespace, _, name in every if namespace == "hia" and name != "row_dot"}  # a test's op


CALLS = recorded_calls()


def spoilt(x):
    """Yield ways to make a tensor that no contract allows, with the error that each must be."""
    yield "rank", x[None].clone(), ValueError
    yield "dtype", x.to(torch.complex64), TypeError
    yield "layout", x.detach().to_sparse(), TypeError
    yield "device", torch.empty_like(x, device="meta"), ValueError
    for dim, size in enumerate(x.shape):
        for other in (size - 1, size + 1, 2 * size):
            longer = torch.cat([x, x, x], dim)
            yield f"size {dim}", longer.narrow(dim, 0, other).clone(), ValueError


def called_with_fakes(overload, arguments):
    """Return what a call of fake tensors raises, or None."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(x) if is_plain(x) else x for name, x in arguments.items()}
        return called(overload, fakes)


def is_plain(x):
    return isinstance(x, Tensor) and x.layout == torch.strided and x.device.type == "cpu"


def called(overload, arguments):
    """Return what a call raises, or None."""
    copies = {name: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for name, x in arguments.items()}
    try:
        overload(*copies.values())
    except Exception as error:
        return error
    return None


ONE_TENSOR = ("row_softmax", "row_softmax_")  # may be on any device
CUDA_ONLY = ("stem_packed",)
# sizes that nothing else knows: a longer argument is as good
FREE = {
    "condition_queries": {"hidden 0", "row_idx 0", "queries 0"},
    "condition_queries_bwd": {"hidden 0", "dout 1"},
    "head_linear": {"x 0", "x 2", "weight 1"},
    "inject_rows": {"hidden 0"},
    "inject_rows_": {"hidden 0"},
    "inject_rows_bwd": {"dout 0"},
    "latent_attention": {"q 1"},
    "linear": {"x 0"},
    "norm_linear": {"x 0", "row_idx 0"},
    "norm_linear_bwd": {"x 0"},
    "row_softmax": {"scores 0", "scores 1"},
    "row_softmax_": {"scores 0", "scores 1"},
    "stem": {"pixels 1", "pixels 2"},
    "stem_bwd": {"pixels 1", "pixels 2"},  # two sizes have one output's
    "stem_packed": {"pixels 1", "pixels 2"},
}
# what only values tell: fake tensors have none
PACKED_LENGTHS = {"q 0", "cu_seqlens_q 0", "cu_seqlens_k 0"}


def test_every_function_is_here():
    assert set(CALLS) == functions()


@pytest.mark.parametrize("kind", ["real", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_every_tensor_is_checked_at_the_op(name, kind):
    """Spoil one argument at a time: an error that names it, for real tensors and fake ones alike, and no result."""
    if kind == "real" and name in CUDA_ONLY:
        pytest.skip("no row for the CPU")
    overload, arguments = registration.overload(name), CALLS[name]
    call = called if kind == "real" else called_with_fakes
    assert call(overload, arguments) is None
    free = set()
    for key, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        for how, value, expected in spoilt(x):
            error = call(overload, {**arguments, key: value})
            if error is None and how == "device" and name in ONE_TENSOR:
                continue
            if error is None and how.startswith("size"):
                free.add(f"{key} {how[-1]}")
                continue
            where = f"{name}: {how} of {key}: {error!r}"
            assert isinstance(error, expected) and str(error).startswith(f"hia::{name}: "), where
            assert " must " in str(error) and ", got " in str(error), where
            assert how in ("device", "dtype") or how.startswith("size") or f" {key} must" in str(error), where
    assert free - FREE.get(name, set()) <= (PACKED_LENGTHS if kind == "fake" else set())


@pytest.mark.parametrize("name", CALLS)
def test_only_optional_tensors_may_be_none(name):
    overload, arguments = registration.overload(name), CALLS[name]
    for argument in overload._schema.arguments:
        if "Tensor" in str(argument.type):
            error = called(overload, {**arguments, argument.name: None})
            if str(argument.type) == "Optional[Tensor]":
                fits = error is None or name in CUDA_ONLY or (name, argument.name) == ("norm_linear_bwd", "row_idx")
                assert fits, (argument.name, error)
            else:
                assert isinstance(error, TypeError), (argument.name, error)
                assert str(error) == f"hia::{name}: {argument.name} must be a tensor, got NoneType"


def other_types(kind):
    """Yield values that an argument may not be, with what the error says of them."""
    tensor = "got a tensor; .item"
    values = {
        "Tensor": [(np.ones(3), "got ndarray"), ([1.0], "got list"), (None, "got NoneType"), (3, "got int")],
        "Optional[Tensor]": [(np.ones(3), "got ndarray"), (3, "got int")],
        "int": [
            (np.ones(2, int), "got ndarray"),
            (None, "got NoneType"),
            ("3", "got str"),
            (True, "got bool"),
            (1.0, "got float"),
            (torch.ones(()), tensor),
        ],
        "float": [
            (None, "got NoneType"),
            ("3", "got str"),
            (True, "got bool"),
            (torch.ones(()), tensor),
            (1j, "complex"),
        ],
        "bool": [(None, "got NoneType"), (1, "got int"), ("yes", "got str"), (torch.ones(()), tensor)],
        "str": [(None, "got NoneType"), (1, "got int"), (b"relu", "got bytes")],
        "List[int]": [
            (None, "got NoneType"),
            (7, "got int"),
            ("7", "got str"),
            (b"7", "got bytes"),
            ({7, 8}, "got set"),
            (torch.ones(2), tensor),
        ],
        "Optional[ScalarType]": [("float32", "got str"), (True, "got bool"), (6, "got int")],
    }
    return values[kind]


@pytest.mark.parametrize("op", [*OPS, "cross_attention_with_lse", *INTO])
def test_other_types_are_named(op):
    """Give every argument of a public function values of other types, none of which is converted without a word."""
    inputs = inputs_of_call({"cross_attention_with_lse": "cross_attention"}.get(op, op.rstrip("_")))
    function, schema = getattr(hia_kernels, op), registration.overload(op)._schema
    inputs = {name: value for name, value in inputs.items() if name in inspect.signature(function).parameters}
    kinds = {argument.name: str(argument.real_type) for argument in schema.arguments}
    for name in inputs:
        for value, got in other_types(kinds[name]):
            if value is None and inspect.signature(function).parameters[name].default is None:
                continue
            with pytest.raises(TypeError, match=f"^hia::{op}: {name} must be .*{got}"):
                function(**{**inputs, name: value})


@pytest.mark.parametrize(("wrong", "got"), [(True, "bool"), ("3", "str"), (1.0, "float")])
def test_a_sequence_names_its_entry(wrong, got):
    inputs = small_inputs("latent_attention", F32)
    with pytest.raises(TypeError, match=rf"^hia::latent_attention: lengths\[0\] must be an int, got {got}$"):
        hia_kernels.latent_attention(**{**inputs, "lengths": [wrong, *inputs["lengths"][1:]]})


def test_numpys_numbers_are_numbers():
    """Take what has a number's type: NumPy's integers and floats, and a tuple of lengths."""
    inputs = small_inputs("cross_attention", F32)
    others = {**inputs, "max_seqlen_q": np.int64(inputs["max_seqlen_q"]), "softmax_scale": np.float32(0.25)}
    expected = hia_kernels.cross_attention(**{**inputs, "softmax_scale": 0.25})
    assert torch.equal(hia_kernels.cross_attention(**others), expected)
    inputs = small_inputs("latent_attention", F32)
    others = {**inputs, "lengths": np.array(inputs["lengths"])}
    assert torch.equal(hia_kernels.latent_attention(**others), hia_kernels.latent_attention(**inputs))


VALUES = [
    ("norm_linear", {"eps": -1.0}, "eps must be finite and not negative, got -1.0"),
    ("norm_linear", {"eps": float("nan")}, "eps must be finite and not negative, got nan"),
    ("norm_linear", {"eps": float("inf")}, "eps must be finite and not negative, got inf"),
    ("stem", {"std": torch.tensor([0.2, 0.0, 0.2])}, r"std must be finite and positive, got \[0.2"),
    ("stem", {"std": torch.tensor([0.2, -0.1, 0.2])}, r"std must be finite and positive, got \[0.2"),
    ("stem", {"std": torch.tensor([0.2, float("nan"), 0.2])}, r"std must be finite and positive, got \[0.2"),
    ("stem", {"mean": torch.tensor([0.2, float("inf"), 0.2])}, r"mean must be finite, got \[0.2"),
    ("stem", {"mean": torch.tensor([0.2, float("nan"), 0.2])}, r"mean must be finite, got \[0.2"),
    ("conv_norm_act", {"activation": "silu"}, "activation must be 'none' or 'relu' or 'gelu', got 'silu'"),
    ("conv_norm_act", {"stride": 3}, "stride must be 1 or 2, got 3"),
    ("stem", {"pool": 2}, "pool must be 1 or 3, got 2"),
    ("cross_attention", {"max_seqlen_q": -1}, "max_seqlen_q must not be negative, got -1"),
    ("latent_attention", {"lengths": [-1, 1000]}, "lengths must be >= 0 and add up to latent's"),
    ("row_softmax", {"out_dtype": torch.int32}, "out_dtype must be None or torch.float32 or .* got torch.int32"),
]


@pytest.mark.parametrize(("op", "change", "message"), VALUES)
def test_other_values_are_named(op, change, message):
    arguments = {**small_inputs(op, F32), **change}
    for function in (getattr(hia_kernels, op), getattr(torch.ops.hia, op)):
        given = arguments if function is getattr(hia_kernels, op) else with_defaults(op, arguments)
        with pytest.raises(ValueError, match=f"^hia::{op}: {message}"):
            function(**given)


def with_defaults(op, arguments):
    """Return the arguments as the schema has them."""
    return {**arguments, "softmax_scale": 0.25} if op == "cross_attention" else arguments


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_remembered(op):
    """Call again with other dtypes and devices of the same shapes: each call is checked anew."""
    function, inputs = getattr(hia_kernels, op), inputs_of_call(op)
    first = function(**inputs)
    for name in differentiable(op):
        with pytest.raises(TypeError, match=f"^hia::{op}: .* must be"):
            function(**{**inputs, name: inputs[name].to(torch.complex64)})
        if op != "row_softmax":
            with pytest.raises(ValueError, match=f"^hia::{op}: .* must be on "):
                function(**{**inputs, name: inputs[name].to("meta")})
        torch.testing.assert_close(function(**inputs), first, rtol=0, atol=0)


def with_strides(x):
    """Yield the same values as they lie in a transposed tensor, in a column of a table, and where one is all."""
    if x.dim() > 1:
        yield x, x.mT.contiguous().mT
    yield x, torch.stack([x, x + 1], -1)[..., 0]
    one = x.flatten()[:1].clone()
    yield one.expand(x.shape).contiguous(), one.expand(x.shape)


ROWS = [(op, row.name) for op in OPS for row in backend.TABLES[op].backends if not row.unavailable_reasons()]
CONVOLUTIONS = ({"residual": True}, {}, {"activation": "gelu"}, {"stride": 2}, {"kernel": 1})


def wide_calls(op):
    """Return calls that every row of the op's table serves, the native kernels too."""
    if op == "conv_norm_act":
        return [inputs_of(op)((5, 4), F32, channels=(32, 32), **options) for options in CONVOLUTIONS]
    return [inputs_of(op)((20, 17), F32, out_channels=32) if op == "stem" else inputs_of_call(op)]


def results(op, row, inputs):
    """Run a row forward, and backward where it has the gradients of such a call."""
    wrt = differentiable(op)
    if (op, row) == ("conv_norm_act", "native") and (inputs["stride"], inputs["weight"].shape[-1]) != (1, 3):
        wrt = ()
    with use_backend(row):
        return testing.forward_backward(getattr(hia_kernels, op), inputs, wrt)


@pytest.mark.parametrize(("op", "row"), ROWS)
def test_strides_change_nothing(op, row):
    """Give every argument, one at a time, in other strides: values are read where they are, in every backend."""
    for inputs in wide_calls(op):
        for name, x in inputs.items():
            if not isinstance(x, Tensor) or not x.is_floating_point() or name == "window":
                continue
            for plain, strided in with_strides(x):
                assert torch.equal(plain, strided)
                got, expected = (results(op, row, {**inputs, name: value}) for value in (strided, plain))
                for result, value in expected.items():
                    close = torch.allclose(got[result], value, rtol=1e-4, atol=1e-4)
                    assert close, f"{result} changes with the strides of {name}, {strided.stride()}"


WITHOUT_GRADIENTS = (
    "inject_rows_",
    "row_softmax_",
    "conv_norm_act_packed",
    "conv_norm_act_packed_",
    "conv_norm_act_packed_out",
    "stem_packed",
)


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_gradients_are_not_lost(name):
    """Refuse a tensor that requires a gradient at the op itself, by name, under torch.func too; tangents likewise."""
    overload, arguments = registration.overload(name), CALLS[name]
    for key, x in arguments.items():
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
            continue

        def run(x, key=key):
            x = x * 1
            overload(*{**arguments, key: x}.values())
            return x.sum()

        message = f"^hia::{name}: {key} must not be part of a gradient graph, got requires_grad=True; use "
        for call in (lambda x: run(x.clone().requires_grad_()), torch.func.grad(run)):
            with pytest.raises(RuntimeError, match=message):
                call(x)
        with pytest.raises(NotImplementedError, match=f"^hia::{name}: forward-mode AD .* is not implemented"):
            torch.func.jvp(run, (x,), (torch.ones_like(x),))


class TestContract:
    X, Y = torch.ones(2, 3), torch.ones(3, 4)

    def test_shapes_are_bound_by_symbol(self):
        contract = Contract("op", x=Arg("A B", FLOATS), y=like("x", "B C"), z=like("x", "D", optional=True))
        assert contract({"x": self.X, "y": self.Y, "z": None}) == {"A": 2, "B": 3, "C": 4}
        contract = Contract("op", x=Arg("A B", FLOATS), y=like("x", "A C"))
        with pytest.raises(ValueError, match=r"^hia::op: y must have shape \[A, C\], got \[3, 4\]; A=2 is fixed by x$"):
            contract({"x": self.X, "y": self.Y})
        with pytest.raises(ValueError, match=r"^hia::op: x must have shape \[A, 2\], got \[2, 3\]$"):
            Contract("op", x=Arg("A 2", FLOATS))({"x": self.X})

    def test_dtypes_follow_another_argument(self):
        contract = Contract("op", x=Arg("A B", FLOATS), s=statistics("x", "B"))
        contract({"x": self.X.half(), "s": torch.ones(3)})
        contract({"x": self.X.double(), "s": torch.ones(3).double()})
        with pytest.raises(TypeError, match="^hia::op: s must be float32 beside x in float16, got float16$"):
            contract({"x": self.X.half(), "s": torch.ones(3).half()})
        with pytest.raises(TypeError, match="^hia::op: s must be float64 like x, got float32$"):
            contract({"x": self.X.double(), "s": torch.ones(3)})

    def test_devices(self):
        contract = Contract("op", x=like("y", "A B", optional=True), y=Arg("A B", FLOATS), z=like("y", "A B"))
        contract({"x": None, "y": self.X, "z": self.X})
        with pytest.raises(ValueError, match="^hia::op: z must be on cpu like y, got meta$"):
            contract({"x": None, "y": self.X, "z": self.X.to("meta")})
