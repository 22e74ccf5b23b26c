"""``hia::cross_attention`` by other libraries' kernels: real signatures, behind which the reference computes."""

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from hia_kernels import cross_attention, cross_attention_with_lse, use_backend
from hia_kernels.core import determinism, tuning
from hia_kernels.ops.cross_attention import cudnn, external, library, measured, sdpa
from hia_kernels.ops.cross_attention.inputs import packing
from hia_kernels.ops.cross_attention.reference import cross_attention_ref
from tests.ops import external as stand_in
from tests.ops.external import EVEN, OP, RAGGED, assert_as_reference, efficient_kernels, make_inputs, run, with_aten
from tests.ops.harness import HALVES, assert_matches

ROWS = ("flash_attn", "cudnn", "sdpa_flash", "xformers", "sdpa_efficient")


# PyTorch's kernels


@pytest.fixture
def aten_flash(monkeypatch):
    def of(given):
        names = {"cum_seq_q": "cu_seqlens_q", "cum_seq_k": "cu_seqlens_k", "max_q": "max_seqlen_q"}
        names |= {"max_k": "max_seqlen_k", "query": "q", "key": "k", "value": "v", "scale": "softmax_scale"}
        assert not given["is_causal"] and given["dropout_p"] == 0
        return {names.get(name, name): value for name, value in given.items()}

    def forward(**given):
        out, lse = stand_in.forward(of(given))
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(**given):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        given = of(given)
        return stand_in.backward({**given, "dout": given["grad_out"], "lse": given["logsumexp"]})

    stand_in.pretend_cuda(monkeypatch)
    with_aten(monkeypatch, _flash_attention_forward=forward, _flash_attention_backward=backward)


@pytest.fixture
def aten_efficient(monkeypatch):
    stand_in.pretend_cuda(monkeypatch)
    with_aten(monkeypatch, **efficient_kernels())


@pytest.fixture
def aten_cudnn(monkeypatch):
    def of(given):
        q, k = given["query"], given["key"]
        assert all(x.dim() == 4 and x.stride(-1) == 1 for x in (q, k, given["value"]))
        assert given["attn_bias"] is None and not given["is_causal"] and given["dropout_p"] == 0
        lengths = [[x.shape[2]] * x.shape[0] for x in (q, k)]
        flat = {name: x.transpose(1, 2).flatten(0, 1) for name, x in zip("qkv", (q, k, given["value"]), strict=True)}
        return {**flat, **packing(*lengths), "softmax_scale": given["scale"]}, (q.shape, k.shape)

    def forward(**given):
        arguments, (shape, _) = of(given)
        out, lse = stand_in.forward(arguments)
        batch, _, length, _ = shape
        lse = lse.unflatten(1, (batch, length)).transpose(0, 1)[..., None]  # with an axis of 1, as some versions have
        rest = (torch.empty(0), torch.empty(0), 0, 0, torch.empty(0), torch.empty(0), torch.empty(0))
        return out.unflatten(0, (batch, length)).transpose(1, 2), lse, *rest

    def backward(**given):
        arguments, (shape, shape_k) = of(given)
        assert given["logsumexp"].shape == shape[:3] and given["max_q"] == shape[2] and given["max_k"] == shape_k[2]
        flat = {name: given[key].transpose(1, 2).flatten(0, 1) for name, key in (("dout", "grad_out"), ("out", "out"))}
        grads = stand_in.backward({**arguments, **flat, "lse": given["logsumexp"].transpose(0, 1).flatten(1)})
        return tuple(
            grad.unflatten(0, (size[0], size[2])).transpose(1, 2)
            for grad, size in zip(grads, (shape, shape_k, shape_k), strict=True)
        )

    stand_in.pretend_cuda(monkeypatch)
    names = ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
    with_aten(monkeypatch, **dict(zip(names, (forward, backward), strict=True)))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
def test_sdpa_flash(lengths, dtype, aten_flash):
    assert_as_reference(lengths, "sdpa_flash", dtype)
    assert_as_reference(lengths, "sdpa_flash", dtype, max_seqlen_q=700, max_seqlen_k=5000)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED, ([40, 33], [7, 9])], ids=["even", "ragged", "more-than-32"])
def test_sdpa_efficient(lengths, aten_efficient):
    assert_as_reference(lengths, "sdpa_efficient", head_dim=640)
    assert_as_reference(lengths, "sdpa_efficient", max_seqlen_q=700, max_seqlen_k=5000)


def test_cudnn(aten_cudnn):
    assert_as_reference(EVEN, "cudnn")
    with use_backend("cudnn"):
        for lengths in (RAGGED, ([6, 6], [5, 4]), ([6, 5], [4, 4])):
            with pytest.raises(NotImplementedError, match="cudnn: all sequences must have max_seqlen_q queries"):
                cross_attention_with_lse(**make_inputs(*lengths, torch.float16))


@pytest.mark.parametrize("row", ["sdpa_flash", "sdpa_efficient", "cudnn"])
def test_a_gradient_of_lse_is_refused(row, aten_flash, aten_efficient, aten_cudnn):
    with pytest.raises(NotImplementedError, match="it takes no gradient of lse"):
        run(make_inputs(*EVEN, torch.float16), row, lse_gradient=True)


def test_strict_determinism_ends_with_the_call():
    try:
        for state in ((False, False), (True, True), (True, False)):
            torch.use_deterministic_algorithms(state[0], warn_only=state[1])
            with pytest.raises(KeyError), determinism.strict():
                assert torch.are_deterministic_algorithms_enabled()
                assert not torch.is_deterministic_algorithms_warn_only_enabled()
                assert not torch.utils.deterministic.fill_uninitialized_memory
                raise KeyError
            assert torch.are_deterministic_algorithms_enabled() == state[0]
            assert torch.is_deterministic_algorithms_warn_only_enabled() == state[1]
            assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


# what they share


def test_reasons(monkeypatch):
    here = make_inputs([3], [4], torch.float16)
    for row in ROWS:
        assert library.BACKENDS.row(row).unsupported_reasons(OP, **here) == [
            "tensors must be on a CUDA device, got cpu"
        ]
    stand_in.pretend_cuda(monkeypatch, (7, 5))

    def reasons(row, *lengths, dtype=torch.float16, **options):
        head_dim = options.pop("head_dim", 32)
        given = {**make_inputs(*lengths, dtype, head_dim=head_dim), "softmax_scale": 0.1, **options}
        return library.BACKENDS.row(row).unsupported_reasons(OP, **given)

    for row in ROWS:
        assert reasons(row, [3], [4], dtype=torch.float32)[0] == "tensors must be float16 or bfloat16, got float32"
        for scale in (0.0, -0.1, float("nan"), float("inf")):
            text = f"softmax_scale must be above 0 and finite, got {scale}"
            assert text in reasons(row, [3], [4], softmax_scale=scale)
        for lengths in (([], []), ([0], [4]), ([4], [0])):
            assert "there must be queries and keys, got none" in reasons(row, *lengths)
    for row, limit in (("flash_attn", 256), ("cudnn", 128), ("sdpa_flash", 256)):
        assert f"head_dim must be at most {limit}, got 640" in reasons(row, [3], [4], head_dim=640)
    for row in ("cudnn", "sdpa_flash"):
        assert reasons(row, [3], [4]) == ["the device must be sm_80 or newer, got sm_75"]
    assert reasons("sdpa_efficient", [3], [4], head_dim=640) == []


def test_unreadable_tensors_are_copied():
    x = torch.randn(6, 4, 32, dtype=torch.float16)
    assert external.readable(x) is x and external.readable(x[:, :2]).data_ptr() == x.data_ptr()
    wide = torch.randn(6, 4, 40, dtype=torch.float16)
    for odd in (
        x.mT.contiguous().mT,
        wide[..., 1:33],
        torch.randn(6, 4 * 33).half()[:, :128].view(6, 4, 32),
        x[:1].expand(6, 4, 32),
    ):
        copied = external.readable(odd)
        assert copied.is_contiguous() and torch.equal(copied, odd) and copied.data_ptr() != odd.data_ptr()


def test_unavailable_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for row in ROWS:
        assert library.BACKENDS.row(row).unavailable_reasons() == ["no CUDA device that torch can see"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for row in ROWS:
        assert "built for AMD's" in library.BACKENDS.row(row).unavailable_reasons()[0]
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    assert cudnn.unavailable_reasons() == [] == sdpa.unavailable_reasons()
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert cudnn.unavailable_reasons() == ["torch.backends.cudnn.enabled is off"]
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert cudnn.unavailable_reasons() == ["this build of torch has no cuDNN"]


# what auto takes


def test_the_key_follows_buckets_of_sizes():
    inputs = make_inputs([200, 256, 3], [784, 700, 1], torch.bfloat16, heads=8, head_dim=64)
    assert measured.backend_key(OP, **inputs) == "fwd-b4-q256-k1024-h8-d64-bfloat16"
    assert measured.backend_key(f"{OP}_with_lse", **inputs) == measured.backend_key(OP, **inputs)
    assert measured.backend_key(f"{OP}_bwd", **inputs).startswith("bwd-b4-")


@pytest.fixture
def device_file(tmp_path, monkeypatch):
    """Write the fastest backends of a device that all tensors here are on."""
    caches = (tuning.stored_backends, tuning._ops_with_backends)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "_slug_of", lambda device: "fake-9000")
    monkeypatch.delenv("HIA_BACKEND", raising=False)

    def write(**backends):
        content = {"configurations": {}, "backends": {f"{OP}/{key}": name for key, name in backends.items()}}
        (tmp_path / "fake-9000.json").write_text(json.dumps(content))
        for cached in caches:
            cached.cache_clear()

    yield write
    for cached in caches:
        cached.cache_clear()


def chosen(function=OP, *lengths, **options):
    inputs = make_inputs(*(lengths or EVEN), torch.float16, **options)
    if function.endswith("_bwd"):
        out, lse = torch.zeros_like(inputs["q"]), torch.zeros(inputs["q"].shape[1::-1])
        inputs |= {"dout": out, "dlse": None, "out": out, "lse": lse}
    row, reasons = library.BACKENDS.find(function, inputs)
    return row.name, reasons


def test_auto_takes_what_was_measured(device_file, aten_flash, aten_efficient, aten_cudnn, monkeypatch):
    """Take it at its bucket alone, where it can serve; without a record, the table's order."""
    triton = library.BACKENDS.row("triton")
    monkeypatch.setattr(
        library.BACKENDS,
        "backends",
        [
            measured_row
            if measured_row is not triton
            else type(triton)("triton", triton.functions, slower_reasons=triton.slower_reasons)
            for measured_row in library.BACKENDS.backends
        ],
    )
    forward, backward = "fwd-b4-q8-k32-h2-d32-float16", "bwd-b4-q8-k32-h2-d32-float16"
    device_file()
    assert chosen() == ("triton", [])
    device_file(**{forward: "sdpa_efficient"})
    name, reasons = chosen()
    assert name == "sdpa_efficient" and f"triton: sdpa_efficient was faster at {forward}" in reasons
    assert chosen(f"{OP}_with_lse")[0] == "sdpa_efficient"
    assert chosen(f"{OP}_bwd")[0] == "triton" == chosen(OP, [9], [70])[0]
    device_file(**{forward: "triton", backward: "sdpa_flash"})
    assert chosen()[0] == "triton" and chosen(f"{OP}_bwd")[0] == "sdpa_flash"
    # cuDNN takes no ragged lengths; nobody's lengths of that bucket go wrong for it
    device_file(**{forward: "cudnn"})
    assert chosen()[0] == "cudnn" and chosen(OP, [6, 6, 5], [20, 20, 20])[0] == "triton"
    # and nothing makes auto take gradients in any order
    device_file(**{backward: "cudnn"})
    assert chosen(f"{OP}_bwd")[0] == "triton"
    # a package that is not here
    device_file(**{forward: "flash_attn"})
    assert chosen()[0] == "triton"


def test_without_triton_the_order_is_the_tables(aten_flash, aten_efficient, aten_cudnn, monkeypatch):
    monkeypatch.delenv("HIA_BACKEND", raising=False)
    monkeypatch.setattr(
        library.BACKENDS, "backends", [row for row in library.BACKENDS.backends if row.name != "triton"]
    )
    assert chosen()[0] == "cudnn" and chosen(OP, *RAGGED)[0] == "sdpa_flash"
    name, reasons = chosen(f"{OP}_bwd")
    assert name == "sdpa_flash" and "cudnn: its gradients are not deterministic" in reasons
    assert chosen(OP, head_dim=640)[0] == "sdpa_efficient"


def test_none_is_needed_to_import():
    code = "import sys, hia_kernels; print([m for m in ('flash_attn', 'xformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [([256, 256], [784, 784]), ([256, 0, 7, 256], [784, 30, 0, 961])], ids=["even", "ragged"]
)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 640])
@pytest.mark.parametrize("row", ROWS)
def test_on_a_gpu(row, head_dim, lengths):
    inputs = make_inputs(*lengths, torch.bfloat16, "cuda", heads=8, head_dim=head_dim)
    table = library.BACKENDS.row(row)
    reasons = table.unavailable_reasons() or table.unsupported_reasons(OP, **inputs)
    if reasons:
        pytest.skip("; ".join(reasons))
    with use_backend(row):
        assert_matches(OP, cross_attention, cross_attention_ref, inputs, torch.bfloat16)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("row", ["cudnn", "sdpa_flash", "sdpa_efficient"])
def test_pytorchs_own_operators_take_the_arguments(row, lengths):
    """Call the operators themselves with tensors without values: their shapes and dtypes are those of the contract."""
    if row == "cudnn" and lengths is RAGGED:
        pytest.skip("cuDNN takes even lengths")
    functions = library.BACKENDS.row(row).functions
    inputs = make_inputs(*lengths, torch.float16, head_dim=64).values()
    q, k, v, *rest = (x.to("meta") if isinstance(x, Tensor) else x for x in inputs)
    out, lse = functions[f"{OP}_with_lse"](q, k, v, *rest)
    assert lse.shape == q.shape[1::-1] and lse.dtype == torch.float32
    for one in (out, functions[OP](q, k, v, *rest)):
        assert (one.shape, one.dtype) == (q.shape, q.dtype)
    if row == "sdpa_efficient":
        return  # its backward has a meta function that lacks the argument `out` of its schema, in torch 2.13
    grads = functions[f"{OP}_bwd"](torch.empty_like(out), None, q, k, v, out, lse, *rest)
    assert [(grad.shape, grad.dtype) for grad in grads] == [(x.shape, x.dtype) for x in (q, k, v)]
