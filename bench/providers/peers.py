"""Other libraries' attention, convolutions as PyTorch users write them for speed, and the released code's steps."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hia.layers.adapter import HiAAdapter

from ..workloads import Inputs, LayerCase, Workload
from ..workloads.batched import packed, sequences

HALVES = (torch.float16, torch.bfloat16)
EPS = 1e-5


class Attention(ABC):
    """An attention that takes what :func:`hia_kernels.cross_attention` takes, by name."""

    ops = ("cross_attention",)
    module: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)
    max_head_dim = 1024

    def __init__(self, name: str) -> None:
        self.name = name

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Return limits known without trying."""
        if self.module is not None:
            if device != "cuda":
                return f"{self.module} runs on CUDA only"
            problem = import_problem(self.module)
            if problem is not None:
                return problem
        if dtype not in self.dtypes:
            return f"takes {' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)} only"
        head_dim = workload.shape.head_dim
        return f"head_dim {head_dim} is above its {self.max_head_dim}" if head_dim > self.max_head_dim else None

    def prepare(self, op: str, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
        """Return the function, and the inputs in its form."""
        return self, inputs

    @abstractmethod
    def __call__(self, **arguments: Any) -> Tensor:
        """Attend: [Tq, H, D]."""


def import_problem(module: str) -> str | None:
    """Say why a package can't be imported; None if it can. A broken one is a reason too."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        inside = missing == module or module.startswith(missing + ".")
        return f"{module} is not installed" if inside else f"{module} is broken: no module {missing}"
    except Exception as error:
        return f"{module} is broken: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


class Sdpa(Attention):
    """One backend of ``scaled_dot_product_attention``; ragged lengths one sequence after the other."""

    def __init__(self, name: str, kind: SDPBackend) -> None:
        super().__init__(name)
        self._kind = kind

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Refuse what is known; on CUDA torch itself refuses, which becomes a reason where it is called."""
        if device == "cpu" and self._kind not in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
            return "torch has this SDPA backend on CUDA only"
        return super().unavailable_reason(device, dtype, workload, mode)

    def __call__(self, **arguments: Any) -> Tensor:
        """Attend: [Tq, H, D]."""
        with sdpa_kernel(self._kind):
            return sdpa_packed(**arguments)


def sdpa_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attend by SDPA, whichever backend torch takes."""
    triples = sequences(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k))
    return packed([F.scaled_dot_product_attention(*triple, scale=softmax_scale) for triple in triples])


class FlashAttention(Attention):
    """flash-attention's varlen function: version 2, 3 or 4."""

    dtypes = HALVES

    def __init__(self, name: str, module: str, max_head_dim: int, *, takes_max_seqlen: bool = True) -> None:
        super().__init__(name)
        self.module, self.max_head_dim, self._takes_max = module, max_head_dim, takes_max_seqlen

    def __call__(self, **arguments: Any) -> Tensor:
        """Attend: [Tq, H, D]; some versions return more."""
        function = importlib.import_module(self.module).flash_attn_varlen_func
        if not self._takes_max:
            arguments = {name: value for name, value in arguments.items() if not name.startswith("max_seqlen")}
        out = function(**arguments)
        return out[0] if isinstance(out, tuple) else out


class Xformers(Attention):
    """xformers' memory-efficient attention with a block-diagonal bias, whichever of its operators takes it."""

    module = "xformers.ops"

    def prepare(self, op: str, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
        """Make the bias of lengths on the host: once, outside the timing."""
        fmha = importlib.import_module("xformers.ops.fmha")
        lengths = [inputs[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k")]
        bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths)
        if hasattr(bias, "to"):  # some versions make it on the CPU
            bias = bias.to(inputs["q"].device)

        def run(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **_packing: Any) -> Tensor:
            out = fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=softmax_scale)
            return out[0]

        return run, inputs

    def __call__(self, **arguments: Any) -> Tensor:
        """Attend: [Tq, H, D]."""
        function, arguments = self.prepare("cross_attention", arguments)
        return function(**arguments)


class Ffpa(Attention):
    """FFPA, for head_dims above 256; ragged lengths one sequence after the other."""

    module = "ffpa_attn"
    dtypes = HALVES

    def __init__(self, name: str, kernel: str) -> None:
        super().__init__(name)
        self._kernel = kernel

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Refuse calls that it hands to SDPA: they would be SDPA's times under its name."""
        reason = super().unavailable_reason(device, dtype, workload, mode)
        if reason is not None:
            return reason
        shape = workload.shape
        if shape.head_dim < 320:
            return f"hands head_dim {shape.head_dim}, below 320, to SDPA"
        short = min(shape.lengths_q + shape.lengths_k) < 512
        if short and self._kernel != "cutedsl":
            return "hands fewer than 512 queries or keys to SDPA"
        return "its cutedsl kernel is called forward only here" if mode not in ("forward", "dispatch") else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, **packing: Any) -> Tensor:
        """Attend: [Tq, H, D]."""
        function = importlib.import_module(self.module).ffpa_attn_func
        triples = sequences(q, k, v, tuple(packing.values()))
        return packed([function(*triple, scale=softmax_scale, forward_backend=self._kernel) for triple in triples])


ATTENTIONS: tuple[Attention, ...] = (
    Sdpa("sdpa_math", SDPBackend.MATH),
    Sdpa("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION),
    Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    FlashAttention("flash_attn_2", "flash_attn", 256),
    FlashAttention("flash_attn_3", "flash_attn_interface", 256),
    FlashAttention("flash_attn_4", "flash_attn.cute", 256, takes_max_seqlen=False),
    Xformers("xformers"),
    Ffpa("ffpa", "triton"),
    Ffpa("ffpa_cutedsl", "cutedsl"),
)


class ChannelsLast:
    """cuDNN's or oneDNN's convolution on channels-last tensors, the batch-norm folded into its weights.

    Args:
        name: of the provider.
        compiled: fused by torch.compile with what follows the convolution.
    """

    ops = ("stem", "conv_norm_act", "encode")

    def __init__(self, name: str, *, compiled: bool) -> None:
        self.name, self.compiled = name, compiled

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Refuse gradients: folded weights are for inference."""
        if mode not in ("forward", "dispatch"):
            return "its batch-norm is folded into the weights, for inference"
        if device == "cuda" and not torch.backends.cudnn.is_available():
            return "torch was built without cuDNN"
        return None

    def prepare(self, op: str, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
        """Return the op with its weights folded."""
        weight, scale, shift = inputs["weight"], inputs["scale"], inputs["shift"]
        folded = (weight.to(scale.dtype) * scale[:, None, None, None]).to(weight.dtype)
        fixed = {"weight": folded.contiguous(memory_format=torch.channels_last), "bias": shift.to(weight.dtype)}
        names = ("pixels", "window", "mean", "std") if op == "stem" else ("x", "residual", "stride")
        arguments = {name: inputs[name] for name in names} | fixed
        return (_folded_stem if op == "stem" else _folded_conv), arguments

    def encoder(self, step: Any) -> Callable[..., Any]:
        """Return the whole ResNet-50 with folded weights."""
        return FoldedEncoder(step.adapter)

    def images(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        """Return raw pixels, as ours gets them."""
        return {"images": inputs["images"], "windows": inputs["windows"]}


class EagerRgb:
    """The stem as an image pipeline has it: a float copy of three channels, normalised, then eager PyTorch, NCHW."""

    name = "eager_rgb"
    ops = ("stem",)

    def unavailable_reason(self, device: str, dtype: torch.dtype, workload: Workload, mode: str) -> str | None:
        """Return None: it runs everywhere."""
        return None

    def prepare(self, op: str, inputs: Inputs) -> tuple[Callable[..., Any], Inputs]:
        """Return the op with its copy, which is timed: it is what raw pixels make unnecessary."""
        names = ("pixels", "window", "mean", "std", "weight", "scale", "shift")
        return _rgb_stem, {name: inputs[name] for name in names} | {"running": _running(inputs)}


CONVOLUTIONS = (
    ChannelsLast("channels_last", compiled=False),
    ChannelsLast("channels_last_compile", compiled=True),
)


def _folded_stem(pixels: Tensor, window: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    low, high = window[:, :, None, None, None].unbind(1)
    x = (((pixels.float() - low) / (high - low)).clamp(0, 1) - mean) / std  # [N, H, W, 3]
    x = x.to(weight.dtype).permute(0, 3, 1, 2)  # channels last in memory
    y = F.relu(F.conv2d(x, weight, bias, stride=2, padding=weight.shape[-1] // 2))
    return F.max_pool2d(y, 3, stride=2, padding=1).permute(0, 2, 3, 1)


def _folded_conv(x: Tensor, residual: Tensor | None, stride: int, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=stride, padding=weight.shape[-1] // 2)
    y = y.permute(0, 2, 3, 1)
    return F.relu(y if residual is None else y + residual)


class FoldedEncoder(nn.Module):
    """Our ResNet-50's weights in plain, channels-last, folded convolutions."""

    def __init__(self, adapter: HiAAdapter) -> None:
        super().__init__()
        encoder = adapter.encoder
        self.mean, self.std = (
            torch.tensor(value, device=encoder.conv1.weight.device) for value in (encoder.image_mean, encoder.image_std)
        )
        self.stem = _fixed(encoder.conv1, encoder.bn1)
        self.blocks = nn.ModuleList()
        for stage in range(1, 5):
            for block in encoder.get_submodule(f"layer{stage}"):
                pairs = {name: _fixed(getattr(block, f"conv{name}"), getattr(block, f"bn{name}")) for name in "123"}
                if block.downsample is not None:
                    pairs["down"] = _fixed(*block.downsample)
                self.blocks.append(nn.ModuleDict({f"conv_{name}": conv for name, conv in pairs.items()}))

    def forward(self, images: Sequence[Tensor], windows: Tensor) -> tuple[Tensor, ...]:
        """Encode: one [H', W', C] per image."""
        return tuple(self._one(image[None], window[None]) for image, window in zip(images, windows, strict=True))

    def _one(self, pixels: Tensor, window: Tensor) -> Tensor:
        x = _folded_stem(pixels, window, self.mean, self.std, self.stem.weight, self.stem.bias).permute(0, 3, 1, 2)
        for block in self.blocks:
            y = F.relu(block["conv_1"](x))
            y = block["conv_3"](F.relu(block["conv_2"](y)))
            x = F.relu(y + (block["conv_down"](x) if "conv_down" in block else x))
        return x[0].permute(1, 2, 0)


def _fixed(conv: Any, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Fold the norm into the convolution, channels last, without gradients."""
    with torch.no_grad():
        scale, shift = conv.folded(norm)
        weight = (conv.weight.to(scale.dtype) * scale[:, None, None, None]).to(conv.weight.dtype)
        shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
        made = nn.Conv2d(*shape, device="meta")
        made.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        made.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
    return made


def released_op(workload: Workload, *, sdpa: bool) -> tuple[Callable[..., Any], Callable[[Inputs], Inputs]]:
    """Return an op as the released code does it, and what puts the inputs into its form.

    Convolutions are NCHW with an unfused batch-norm; attention is textbook and also returns its weights, unless
    ``sdpa``; keys and values are normalised once each; rows are written by concatenating the sequence again.
    """
    choose, prepare = RELEASED[workload.op]
    return choose(workload, sdpa), prepare


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _normalised(inputs: Inputs) -> Inputs:
    low, high = inputs["window"][:, :, None, None, None].unbind(1)
    x = (((inputs["pixels"].float() - low) / (high - low)).clamp(0, 1) - inputs["mean"]) / inputs["std"]
    x = x.to(inputs["weight"].dtype).permute(0, 3, 1, 2).contiguous()
    return {"x": x, "running": _running(inputs), **{name: inputs[name] for name in ("weight", "scale", "shift")}}


def _rgb_stem(
    pixels: Tensor,
    window: Tensor,
    mean: Tensor,
    std: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    running: tuple[Tensor, Tensor],
) -> Tensor:
    low, high = window[:, :, None, None, None].unbind(1)
    rgb = pixels.float().expand(*pixels.shape[:-1], 3).permute(0, 3, 1, 2).contiguous()
    x = ((rgb - low) / (high - low)).clamp(0, 1)
    x = (x - mean[:, None, None]) / std[:, None, None]
    return _released_stem(x.to(weight.dtype), running, weight, scale, shift)


def _running(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return statistics with which an eval-mode batch-norm scales by its weight alone."""
    return torch.zeros_like(inputs["scale"]), torch.full_like(inputs["scale"], 1 - EPS)


def _released_stem(x: Tensor, running: tuple[Tensor, Tensor], weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    y = F.conv2d(x, weight, stride=2, padding=weight.shape[-1] // 2)
    y = F.relu(F.batch_norm(y, *running, scale, shift, False, 0.0, EPS))
    return F.max_pool2d(y, 3, stride=2, padding=1).permute(0, 2, 3, 1)


def _channels_first(inputs: Inputs) -> Inputs:
    """Lay the same shapes over NCHW memory."""
    first = {
        name: inputs[name].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        for name in ("x", "residual")
        if inputs[name] is not None
    }
    kept = {name: inputs[name] for name in ("weight", "scale", "shift", "residual", "stride")}
    return {**kept, **first, "running": _running(inputs)}


def _released_conv(
    x: Tensor,
    running: tuple[Tensor, Tensor],
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    stride: int,
) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=weight.shape[-1] // 2)
    y = F.batch_norm(y, *running, scale, shift, False, 0.0, EPS)
    return F.relu(y if residual is None else y + residual.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _released_condition(hidden: Tensor, row_idx: Tensor, weight: Tensor, bias: Tensor, queries: Tensor) -> Tensor:
    return queries + F.linear(hidden[row_idx], weight, bias)[:, None]


def _weighted_attention(**arguments: Any) -> Tensor:
    """Attend with scores at the dtype, the heads' mean of the weights computed and thrown away, as there."""
    q, k, v, *packing, scale = arguments.values()
    outs = []
    for q_b, k_b, v_b in sequences(q, k, v, tuple(packing)):
        weights = torch.softmax((q_b * scale) @ k_b.mT, dim=-1)
        weights.mean(dim=1)
        outs.append(weights @ v_b)
    return packed(outs)


def _norm_once(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, row_idx: Tensor | None, eps: float
) -> Tensor:
    rows = x if row_idx is None else x[row_idx]
    return F.linear(F.layer_norm(rows, rows.shape[-1:], norm_weight, norm_bias, eps), weight, bias)


def _norm_twice(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor, row_idx: None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute keys and values, each from a norm of its own."""
    halves = zip(weight.chunk(2), bias.chunk(2), strict=True)
    keys, values = (_norm_once(x, norm_weight, norm_bias, w, b, None, eps) for w, b in halves)
    return keys, values


class _Concatenation:
    """The visual rows of each image, in a sequence put together again."""

    def __init__(self, case: LayerCase) -> None:
        self._case = case

    def __call__(self, hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor, row_idx: Tensor) -> Tensor:
        """Normalise and project: [T, C]."""
        case, samples, image = self._case, [], 0
        updates = F.linear(update, weight, bias).split(case.visual_tokens)
        for sample, images in enumerate(case.samples):
            one = hidden[sample * case.seq_len : (sample + 1) * case.seq_len]
            for position in range(len(images)):
                start = 1 + position * case.visual_tokens
                stop = start + case.visual_tokens
                one = torch.cat([one[:start], one[start:stop] + updates[image], one[stop:]])
                image += 1
            samples.append(one)
        return torch.cat(samples) if len(samples) > 1 else samples[0]


# the ops that the released code has steps for: the function, by workload and whether SDPA is allowed, and what puts the
# inputs into its form
RELEASED: dict[str, tuple[Callable[[Workload, bool], Callable[..., Any]], Callable[[Inputs], Inputs]]] = {
    "stem": (lambda _workload, _sdpa: _released_stem, _normalised),
    "conv_norm_act": (lambda _workload, _sdpa: _released_conv, _channels_first),
    "condition_queries": (lambda _workload, _sdpa: _released_condition, dict),
    "cross_attention": (lambda _workload, sdpa: sdpa_packed if sdpa else _weighted_attention, dict),
    "norm_linear": (lambda found, _sdpa: _norm_twice if found.role in ("features", "extracted") else _norm_once, dict),
    "linear": (lambda _workload, _sdpa: _linear, dict),
    "inject_rows": (lambda workload, _sdpa: _Concatenation(workload.case), dict),
}
