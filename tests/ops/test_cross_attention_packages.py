"""``hia::cross_attention`` by flash-attention and xformers: real signatures, behind which the reference computes."""

import importlib
import inspect
import sys
import types

import pytest
import torch

from hia_kernels import cross_attention_with_lse, use_backend
from hia_kernels.ops.cross_attention import external, flash_attn, xformers
from tests.ops import external as stand_in
from tests.ops.external import EVEN, OP, RAGGED, assert_as_reference, efficient_kernels, make_inputs, run

# flash-attention: 4 by the wheel, 2 and 3 by signatures read in their sources (flash_attn.py names them)


def of_flash(given):
    names = {"softmax_lse": "lse"}
    return {names.get(name, name): value for name, value in given.items()}


def flash_2():
    names = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
    namespace = {}
    exec(
        f"def forward(q, k, v, {names}, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),"
        " softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None): pass\n"
        f"def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, {names}, dropout_p, softmax_scale, causal,"
        " window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,"
        " zero_tensors=False): pass",
        namespace,
    )
    return inspect.signature(namespace["forward"]), inspect.signature(namespace["backward"])


def flash_3():
    namespace = {}
    exec(
        "def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,"
        " softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,"
        " window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,"
        " sm_margin=0, return_attn_probs=False): pass\n"
        "def backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,"
        " sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None,"
        " is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False,"
        " sm_margin=0): pass",
        namespace,
    )
    return inspect.signature(namespace["forward"]), inspect.signature(namespace["backward"])


def module_with(forward, backward, *, in_place, names):
    """Return a module whose functions have these signatures."""

    def run_forward(**given):
        assert given.get("return_attn_probs") or given.get("return_lse")
        assert all(x.stride(-1) == 1 and not x.requires_grad for x in (given["q"], given["k"], given["v"]))
        return stand_in.forward(given)

    def run_backward(**given):
        assert given["deterministic"] is True and not given.get("causal") and not given.get("dropout_p")
        grads = stand_in.backward(of_flash(given))
        if not in_place:
            return grads
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            given[name].copy_(grad)
        return torch.empty(0)

    functions = (stand_in.bound(forward, run_forward), stand_in.bound(backward, run_backward))
    return types.SimpleNamespace(**dict(zip(names, functions, strict=True)))


@pytest.fixture
def installed(monkeypatch):
    """Say which modules can be imported."""
    modules = {}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: modules.get(name) or real(name, *rest))
    caches = (flash_attn.problem_of, flash_attn._outdated)
    for cached in caches:
        cached.cache_clear()
    yield modules
    for cached in caches:
        cached.cache_clear()


def flash_modules(name):
    if name == "flash-attn 2":
        names = ("flash_attn_varlen_func", "_flash_attn_varlen_backward")
        return "flash_attn.flash_attn_interface", module_with(*flash_2(), in_place=True, names=names)
    if name == "flash-attn 3":
        names = ("flash_attn_varlen_func", "_flash_attn_backward")
        return "flash_attn_interface", module_with(*flash_3(), in_place=True, names=names)
    names = ("flash_attn_varlen_func", "_flash_attn_bwd")
    source = stand_in.peer("flash-attn-4") / "flash_attn" / "cute" / "interface.py"
    signatures = [stand_in.signature_in(source, one) for one in names]
    assert list(signatures[0].parameters)[3] == "qv", "called by keyword for the sake of this"
    return "flash_attn.cute.interface", module_with(*signatures, in_place=False, names=names)


@pytest.mark.parametrize("lengths", [EVEN, RAGGED], ids=["even", "ragged"])
@pytest.mark.parametrize("name", ["flash-attn 2", "flash-attn 3", "flash-attn 4"])
def test_flash_attn(name, lengths, installed, monkeypatch):
    stand_in.pretend_cuda(monkeypatch)
    module, functions = flash_modules(name)
    installed[module] = functions
    assert flash_attn._serving(OP, make_inputs([1], [1], torch.float16)["q"])[0].name == name
    assert_as_reference(lengths, "flash_attn")


def test_flash_attn_4_takes_a_gradient_of_lse(installed, monkeypatch):
    stand_in.pretend_cuda(monkeypatch)
    module, functions = flash_modules("flash-attn 4")
    installed[module] = functions
    assert_as_reference(RAGGED, "flash_attn", lse_gradient=True)


def test_flash_attn_2_refuses_a_gradient_of_lse(installed, monkeypatch):
    stand_in.pretend_cuda(monkeypatch)
    installed.update([flash_modules("flash-attn 2")])
    with pytest.raises(NotImplementedError, match="flash-attn 2: it takes no gradient of lse"):
        run(make_inputs(*EVEN, torch.float16), "flash_attn", lse_gradient=True)


def versions(head_dim, function=OP, capability=(9, 0), monkeypatch=None):
    monkeypatch.setattr(external, "capability", lambda q: capability)
    q = torch.empty(1, 1, head_dim, dtype=torch.float16, device="meta")
    version, reasons = flash_attn._serving(function, q)
    return version.name if version else "; ".join(reasons)


def test_the_version_of_flash_attn_follows_device_and_head_dim(monkeypatch):
    monkeypatch.setattr(flash_attn, "problem_of", lambda module: None)
    monkeypatch.setattr(flash_attn, "_outdated", lambda module, needed: None)
    found = {
        (major, head_dim, function): versions(head_dim, function, (major, 0), monkeypatch)
        for major in (8, 9, 10)
        for head_dim in (128, 192, 256)
        for function in (OP, f"{OP}_bwd")
    }
    assert {found[9, 128, OP], found[9, 256, OP], found[9, 192, f"{OP}_bwd"]} == {"flash-attn 3"}
    assert found[9, 256, f"{OP}_bwd"] == "flash-attn 4"  # 3 has no deterministic gradients there
    assert {found[8, size, function] for size in (128, 256) for function in (OP, f"{OP}_bwd")} == {"flash-attn 2"}
    assert found[10, 128, OP] == found[10, 256, OP] == "flash-attn 4"
    assert found[10, 192, OP] == "flash-attn 2"
    monkeypatch.setattr(flash_attn, "problem_of", lambda module: None if "cute" in module else "not here")
    text = versions(192, OP, (10, 0), monkeypatch)
    assert "flash-attn 4: head_dim must be at most 128, got 192" in text and "flash-attn 3 is for sm_9x" in text


def test_an_older_release_gives_way(installed, monkeypatch):
    """Leave out flash-attn 3 as it was at v2.8.3, without return_attn_probs, and take version 2 beside it."""
    stand_in.pretend_cuda(monkeypatch)

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None):
        raise AssertionError("called")

    older = types.SimpleNamespace(flash_attn_varlen_func=varlen)
    installed.update([("flash_attn_interface", older)])
    q = make_inputs([1], [1], torch.float16)["q"]
    version, reasons = flash_attn._serving(OP, q)
    assert version is None and reasons[0] == (
        "flash_attn_interface.flash_attn_varlen_func takes no return_attn_probs: another version than those that are "
        "known here"
    )
    installed.update([flash_modules("flash-attn 2")])
    flash_attn.problem_of.cache_clear()
    assert_as_reference(RAGGED, "flash_attn")


def test_a_package_that_is_broken_says_so(installed, monkeypatch):
    stand_in.pretend_cuda(monkeypatch)
    q = make_inputs([1], [1], torch.float16)["q"]

    def broken(name, *rest):
        if name == "flash_attn_interface":
            raise ImportError("undefined symbol: x\nmore")
        raise ModuleNotFoundError(f"No module named {name!r}", name="cutlass" if "cute" in name else "flash_attn")

    monkeypatch.setattr(importlib, "import_module", broken)
    version, reasons = flash_attn._serving(OP, q)
    assert version is None and reasons == [
        "flash_attn_interface is broken: ImportError: undefined symbol: x",
        "flash_attn.cute.interface is broken: no module cutlass",
        "the module flash_attn.flash_attn_interface is not installed",
    ]
    assert flash_attn.unavailable_reasons() == reasons
    with use_backend("flash_attn"), pytest.raises(NotImplementedError, match="no module cutlass"):
        cross_attention_with_lse(**make_inputs([3], [4], torch.float16))


# xformers: the real package around PyTorch's memory-efficient kernel


XFORMERS = {}  # its modules, which register operators when they are imported: once in a process


@pytest.fixture
def real_xformers(monkeypatch):
    monkeypatch.syspath_prepend(str(stand_in.peer("xformers")))
    sys.modules.update(XFORMERS)
    for cached in (flash_attn.problem_of, xformers._has):
        cached.cache_clear()
    fmha = importlib.import_module(xformers.MODULE)  # before there is a pretended device to look at
    stand_in.pretend_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for operator, name in ((fmha.cutlass.FwOp, "forward"), (fmha.cutlass.BwOp, "backward")):
        monkeypatch.setattr(operator, "SUPPORTED_DEVICES", {"cpu"})
        schema = getattr(torch.ops.aten, f"_efficient_attention_{name}").default
        kernel = stand_in.bound_to_schema(schema, efficient_kernels()[f"_efficient_attention_{name}"])
        monkeypatch.setattr(operator, "OPERATOR", staticmethod(kernel))
    yield fmha
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        XFORMERS[name] = sys.modules.pop(name)
    for cached in (flash_attn.problem_of, xformers._has):
        cached.cache_clear()


@pytest.mark.filterwarnings("ignore")  # its C++ half is made for another torch
@pytest.mark.parametrize("lengths", [EVEN, RAGGED, ([40, 33], [7, 9])], ids=["even", "ragged", "more-than-32"])
def test_xformers(lengths, real_xformers):
    assert xformers.unavailable_reasons() == []
    assert_as_reference(lengths, "xformers", head_dim=320)
    assert_as_reference(lengths, "xformers", max_seqlen_q=700, max_seqlen_k=5000)


@pytest.mark.filterwarnings("ignore")
def test_xformers_flash_operator(real_xformers, monkeypatch):
    """Take its flash operator up to head_dim 256, whose lse is packed; the gradients are the other one's."""
    calls = []

    def operator(q, k, v, cu_q, cu_k, seqused, max_q, max_k, p, scale, is_causal, **options):
        calls.append(options)
        assert seqused is None and p == 0 and not is_causal
        given = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "softmax_scale": scale}
        return *stand_in.forward({**given, "max_seqlen_q": max_q, "max_seqlen_k": max_k}), torch.empty(0)

    flash = real_xformers.flash.FwOp
    monkeypatch.setattr(flash, "OPERATOR", staticmethod(operator))
    monkeypatch.setattr(flash, "SUPPORTED_DEVICES", {"cpu"})
    monkeypatch.setattr(flash, "is_available", classmethod(lambda cls: True))
    assert_as_reference(RAGGED, "xformers", head_dim=256)
    assert len(calls) == 1
    assert xformers._operator(f"{OP}_bwd", torch.empty(1, 1, 256))[0] == "cutlass"


@pytest.mark.filterwarnings("ignore")
def test_xformers_on_newer_devices(real_xformers, monkeypatch):
    monkeypatch.setattr(external, "capability", lambda q: (10, 0))
    with use_backend("xformers"), pytest.raises(NotImplementedError, match="serves this call at head_dim 32 on sm_100"):
        cross_attention_with_lse(**make_inputs([3], [4], torch.float16))
