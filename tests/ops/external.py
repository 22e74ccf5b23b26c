"""Stand-ins for other libraries' attention kernels: the real signatures, computed by the reference, on the CPU.

What a kernel leaves to chance is made to matter: results of sequences without keys or queries are NaN, and so is what
pads a log-sum-exp.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hia_kernels import cross_attention_with_lse, last_backend, use_backend
from hia_kernels.core import devices
from hia_kernels.ops.cross_attention import external
from hia_kernels.ops.cross_attention.reference import cross_attention_bwd_ref, cross_attention_with_lse_ref
from tests.inputs import inputs_of
from tests.install_peers import VERSIONS
from tests.ops.harness import assert_fresh

PEERS = Path(__file__).resolve().parents[2] / "build" / "peers"
OP = "cross_attention"
make_inputs = inputs_of(OP)
EVEN, RAGGED = ([6, 6, 6], [20, 20, 20]), ([7, 0, 12, 1, 3], [9, 30, 5, 0, 40])
PACKING = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
NAN = float("nan")


def peer(name: str) -> Path:
    """Return the folder of a downloaded package; skip the test where there is none."""
    folder = PEERS / f"{name}-{VERSIONS[name]}"
    if not (folder / ".complete").exists():
        pytest.skip(f"NO WHEEL: {name} is not in build/peers (python tests/install_peers.py build/peers)")
    return folder


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Let CPU tensors pass for those of a GPU, in the rows of other libraries alone."""
    monkeypatch.setattr(devices, "not_cuda_reasons", lambda tensor: [])
    monkeypatch.setattr(external, "capability", lambda q: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)


def signature_in(path: Path, function: str) -> inspect.Signature:
    """Return a function's signature as its source says, without importing it; defaults are None."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            node.decorator_list, node.returns, node.body = [], None, [ast.Pass()]
            given = node.args
            for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs):
                argument.annotation = None
            given.defaults = [ast.Constant(None) for _ in given.defaults]
            given.kw_defaults = [default and ast.Constant(None) for default in given.kw_defaults]
            namespace: dict[str, Any] = {}
            exec(compile(ast.fix_missing_locations(ast.Module([node], [])), str(path), "exec"), namespace)
            return inspect.signature(namespace[function])
    raise LookupError(f"{path} has no function {function}")


def bound(signature: inspect.Signature, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with another one's signature, which hands over what was given, by name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(**signature.bind(*args, **kwargs).arguments)

    return call


def bound_to_schema(overload: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes what an operator of PyTorch does, and hands it over by name."""
    arguments = overload._schema.arguments
    names = [one.name for one in arguments if not one.kwarg_only]
    known = {one.name for one in arguments}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        assert set(given) <= known and len(args) <= len(names), f"no arguments of {overload}: {set(given) - known}"
        lacking = [one.name for one in arguments if one.name not in given and not one.has_default_value()]
        assert not lacking, f"{overload} needs {lacking}"
        return function(**given)

    return call


def forward(given: Mapping[str, Any], empty_lse: float = float("inf")) -> tuple[Tensor, Tensor]:
    """Attend; sequences without keys get NaN, and an lse that no reference has."""
    out, lse = cross_attention_with_lse_ref(
        *(given[name] for name in ("q", "k", "v", *PACKING)), given["softmax_scale"]
    )
    alone = external._without(given["cu_seqlens_k"], given["cu_seqlens_q"], out.shape[0])
    return out.masked_fill(alone[:, None, None], NAN), lse.masked_fill(alone, empty_lse)


def backward(given: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients; NaN for sequences without keys, or without queries."""
    names = ("dout", "dlse", "q", "k", "v", "out", "lse", *PACKING)
    dq, dk, dv = cross_attention_bwd_ref(*(given.get(name) for name in names), given["softmax_scale"])
    cu = (given["cu_seqlens_q"], given["cu_seqlens_k"])
    dq[external._without(cu[1], cu[0], dq.shape[0])] = NAN
    for grad in (dk, dv):
        grad[external._without(cu[0], cu[1], grad.shape[0])] = NAN
    return dq, dk, dv


def padded(lse: Tensor, cu_seqlens_q: Tensor, longest: int) -> Tensor:
    """Return [B, H, longest rounded up to 32], NaN beyond a sequence's queries."""
    starts = cu_seqlens_q.tolist()
    found = torch.full((len(starts) - 1, lse.shape[0], -(-longest // 32) * 32), NAN)
    for number, (first, last) in enumerate(pairwise(starts)):
        found[number, :, : last - first] = lse[:, first:last]
    return found


def packed(lse: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """Return [H, Tq] of a padded one."""
    starts = cu_seqlens_q.tolist()
    return torch.cat([lse[b, :, : starts[b + 1] - starts[b]] for b in range(len(starts) - 1)], dim=1)


def run(inputs, row, *, lse_gradient=False):
    """Return out, lse and the gradients of q, k, v by a row; all of them tensors of their own."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in "qkv"}
    seeded = torch.Generator().manual_seed(1)
    with use_backend(row):
        out, lse = cross_attention_with_lse(**{**inputs, **leaves})
        assert last_backend(OP) == row
        dout = torch.randn(out.shape, generator=seeded).to(out.dtype)
        given = (out, dout) if not lse_gradient else ((out, lse), (dout, torch.randn(lse.shape, generator=seeded)))
        grads = torch.autograd.grad(given[0], list(leaves.values()), given[1])
        assert last_backend(OP) == row
    assert_fresh(inputs, [out.detach(), lse.detach()], dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    return out.detach(), lse.detach(), *grads


def assert_as_reference(lengths, row, dtype=torch.float16, *, head_dim=32, lse_gradient=False, **longest):
    """Compare a row with the reference; ``longest``: larger max_seqlen than the lengths need."""
    inputs = {**make_inputs(*lengths, dtype, head_dim=head_dim), **longest}
    expected = run(inputs, "reference", lse_gradient=lse_gradient)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), run(inputs, row, lse_gradient=lse_gradient), expected):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")


def with_aten(monkeypatch, **kernels):
    """Put functions in the places of PyTorch's operators, called as their schemas say."""
    for name, function in kernels.items():
        overload = getattr(torch.ops.aten, name).default
        monkeypatch.setattr(torch.ops.aten, name, bound_to_schema(overload, function))


def efficient_kernels():
    def of(given):
        assert given["bias"] is None and given["dropout_p"] == 0 and given["custom_mask_type"] == 0
        names = {"query": "q", "key": "k", "value": "v"}
        found = {names.get(name, name): value for name, value in given.items()}
        return {**found, **{name: found[name][0] for name in "qkv"}, "softmax_scale": found["scale"]}

    def run_forward(**given):
        given = of(given)
        assert given["compute_log_sumexp"]
        out, lse = forward(given, empty_lse=0.0)
        lse = padded(lse, given["cu_seqlens_q"], given["max_seqlen_q"])
        seed = torch.zeros((), dtype=torch.int64)
        return out[None], lse, seed, seed, given["max_seqlen_q"], given["max_seqlen_k"]

    def run_backward(**given):
        splits = given.get("num_splits_key")
        assert splits == 1 or (splits is None and torch.are_deterministic_algorithms_enabled())
        for longest, rows in (("max_seqlen_q", "query"), ("max_seqlen_k", "key")):  # as attention_backward.cu does
            assert given[longest] <= given[rows].shape[1], f"Invalid {longest}"
        assert given["logsumexp"].shape[-1] % 32 == 0 and given["logsumexp"].isfinite().sum() > 0
        given = of(given)
        lse = packed(given["logsumexp"], given["cu_seqlens_q"])
        grads = backward({**given, "dout": given["grad_out_"][0], "out": given["out"][0], "lse": lse})
        return (*(grad[None] for grad in grads), torch.empty(0))

    return {"_efficient_attention_forward": run_forward, "_efficient_attention_backward": run_backward}
