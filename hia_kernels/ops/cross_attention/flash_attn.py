"""``cross_attention`` by flash-attention's varlen kernels: version 3, 4 or 2, the first that is here and can serve.

All are called by keyword: their positional arguments differ (the fourth of version 4 is ``qv``). Signatures were read
in flash-attn 2.8.4 (``flash_attn/flash_attn_interface.py``), in ``hopper/flash_attn_interface.py`` of its repository,
and in flash-attn-4 4.0.0b36 (``flash_attn/cute/interface.py``).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...core.backend import BACKWARD
from . import external

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Version:
    """One of flash-attention's packages.

    Attributes:
        name: of the package.
        module: with its varlen functions.
        majors: of the compute capabilities that it is made for.
        forward: ``(module, q, k, v, **packing)`` -> out, lse.
        backward: ``(module, dout, dlse, q, k, v, out, lse, **packing)`` -> gradients.
        needed: functions of the module, with arguments that tell a release that serves from older ones.
        limit: ``(q, function)`` -> the largest head_dim.
        takes_dlse: whether a gradient of lse may arrive.
    """

    name: str
    module: str
    majors: tuple[int, ...]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    needed: tuple[tuple[str, tuple[str, ...]], ...]
    limit: Callable[[Tensor, str], int] = lambda q, function: MAX_HEAD_DIM
    takes_dlse: bool = False

    def reasons(self, function: str, q: Tensor, dlse: Tensor | None) -> list[str]:
        """List why it can't serve a call."""
        found, major, limit = [], external.capability(q)[0], self.limit(q, function)
        if major not in self.majors:
            found.append(f"{self.name} is for sm_{'x, sm_'.join(map(str, self.majors))}x")
        if q.shape[2] > limit:
            found.append(f"{self.name}: head_dim must be at most {limit}, got {q.shape[2]}")
        if dlse is not None and not self.takes_dlse:
            found.append(f"{self.name}: it takes no gradient of lse")
        if not found:
            problem = problem_of(self.module) or _outdated(self.module, self.needed)
            found += [] if problem is None else [problem]
        return found


def _forward_2(module: Any, q: Tensor, k: Tensor, v: Tensor, **packing: Any) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module.flash_attn_varlen_func(q=q, k=k, v=v, **packing, return_attn_probs=True)
    return out, lse


def _backward_2(
    module: Any, dout: Tensor, dlse: None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **packing: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    module._flash_attn_varlen_backward(
        dout=dout,
        q=q,
        k=k,
        v=v,
        out=out,
        softmax_lse=lse,
        dq=dq,
        dk=dk,
        dv=dv,
        **packing,
        dropout_p=0.0,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return dq, dk, dv


def _backward_3(
    module: Any, dout: Tensor, dlse: None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **packing: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    module._flash_attn_backward(**given, **packing, deterministic=True)
    return dq, dk, dv


def _forward_4(module: Any, q: Tensor, k: Tensor, v: Tensor, **packing: Any) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module.flash_attn_varlen_func(q=q, k=k, v=v, **packing, return_lse=True)
    return out, lse


def _backward_4(
    module: Any,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    **packing: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    given = {"dout": dout, "dlse": dlse, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    dq, dk, dv = module._flash_attn_bwd(**given, **packing, deterministic=True)
    return dq, dk, dv


def _limit_3(q: Tensor, function: str) -> int:
    """Return the largest head_dim: deterministic gradients are refused above 192 (hopper/flash_api.cpp)."""
    return 192 if function.endswith(BACKWARD) else MAX_HEAD_DIM


def _limit_4(q: Tensor, function: str) -> int:
    """Return the largest head_dim (``_validate_head_dims``); Blackwell takes 256 beside those up to 128."""
    return MAX_HEAD_DIM if external.capability(q)[0] == 9 or q.shape[2] == MAX_HEAD_DIM else 128


VARLEN = "flash_attn_varlen_func"
VERSIONS = (
    Version(
        "flash-attn 3",
        "flash_attn_interface",
        (9,),
        _forward_2,
        _backward_3,
        ((VARLEN, ("return_attn_probs",)), ("_flash_attn_backward", ("is_causal", "deterministic"))),
        _limit_3,
    ),
    Version(
        "flash-attn 4",
        "flash_attn.cute.interface",
        (9, 10, 11),
        _forward_4,
        _backward_4,
        ((VARLEN, ("max_seqlen_q", "return_lse")), ("_flash_attn_bwd", ("deterministic", "dlse", "max_seqlen_q"))),
        _limit_4,
        takes_dlse=True,
    ),
    Version(
        "flash-attn 2",
        "flash_attn.flash_attn_interface",
        (8, 9, 10, 12),
        _forward_2,
        _backward_2,
        (
            (VARLEN, ("return_attn_probs",)),
            ("_flash_attn_varlen_backward", ("window_size_left", "softcap", "deterministic")),
        ),
    ),
)


@cache
def problem_of(module: str) -> str | None:
    """Say why a module can't be imported; None if it can. A broken one is a reason too."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        own = missing == module or module.startswith(f"{missing}.")
        return f"the module {module} is not installed" if own else f"{module} is broken: no module {missing}"
    except Exception as error:  # whatever a compiled package raises on import
        return f"{module} is broken: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


@cache
def _outdated(module: str, needed: tuple[tuple[str, tuple[str, ...]], ...]) -> str | None:
    """Say which function of a module lacks an argument that is given to it; None if all is as it was read."""
    for function, names in needed:
        found = getattr(importlib.import_module(module), function, None)
        if found is None:
            return f"{module} has no {function}: another version than those that are known here"
        try:
            takes = inspect.signature(getattr(found, "_init_fn", found)).parameters  # of a registered operator
        except (TypeError, ValueError):  # compiled: it will say itself
            continue
        lacking = [name for name in names if name not in takes]
        if lacking and not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
            return f"{module}.{function} takes no {', '.join(lacking)}: another version than those that are known here"
    return None


def unavailable_reasons() -> list[str]:
    """Return why none of the versions is here."""
    found = external.unavailable_reasons()
    if found:
        return found
    problems = [problem_of(version.module) for version in VERSIONS]
    return [] if None in problems else [problem for problem in problems if problem is not None]


def unsupported_reasons(function: str, dlse: Tensor | None = None, **arguments: Any) -> list[str]:
    """Return why no version can serve a call."""
    found = external.unsupported_reasons(max_head_dim=MAX_HEAD_DIM, **arguments)
    return found or _serving(function, arguments["q"], dlse)[1]


def _serving(function: str, q: Tensor, dlse: Tensor | None = None) -> tuple[Version | None, list[str]]:
    reasons: list[str] = []
    for version in VERSIONS:
        found = version.reasons(function, q, dlse)
        if not found:
            return version, []
        reasons += found
    return None, reasons


def _named(q: Tensor, k: Tensor, packing: tuple[Any, ...]) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
    return dict(zip(names, (*external.within_rows(q, k, packing[:4]), packing[4]), strict=True))


def cross_attention_fwd(*args: Any) -> Tensor:
    """Return out [Tq, H, D], dtype of ``q``."""
    return cross_attention_with_lse_fwd(*args)[0]


def cross_attention_with_lse_fwd(q: Tensor, k: Tensor, v: Tensor, *packing: Any) -> tuple[Tensor, Tensor]:
    """Return out [Tq, H, D], lse [H, Tq] fp32."""
    version, reasons = _serving("cross_attention_with_lse", q)
    if version is None:
        raise NotImplementedError(f"hia::cross_attention: flash_attn: {'; '.join(reasons)}")
    triple = [external.readable(x).detach() for x in (q, k, v)]
    with torch.no_grad():  # the op's own autograd is around it
        out, lse = version.forward(importlib.import_module(version.module), *triple, **_named(q, k, packing))
    out, lse = out.contiguous(), lse.contiguous()
    external.mend_forward(out, lse, k, packing[:4])
    return out, lse


def cross_attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *packing: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v."""
    version, reasons = _serving("cross_attention_bwd", q, dlse)
    if version is None:
        raise NotImplementedError(f"hia::cross_attention: flash_attn: {'; '.join(reasons)}")
    dout, q, k, v, out = (external.readable(x).detach() for x in (dout, q, k, v, out))
    with torch.no_grad():
        module = importlib.import_module(version.module)
        grads = version.backward(module, dout, dlse, q, k, v, out, lse.contiguous(), **_named(q, k, packing))
    dq, dk, dv = (grad.contiguous() for grad in grads)
    external.mend_backward((dq, dk, dv), packing[:4])
    return dq, dk, dv
