"""FLOPs and peak live bytes of a forward pass, from the real modules under fake tensors.

Nothing is computed and no weight exists: a 13B prefill is followed in seconds on any machine. FLOPs come from torch's
``FlopCounterMode``; bytes from :class:`bench.measure.memory.StorageMeter`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hia.encoder import memory, workspace
from hia.encoder.encoder import Encoder
from hia.layers import plan
from hia_kernels import use_backend
from hia_kernels.ops.conv_norm_act.packed import serving_layout

from .memory import StorageMeter, tensors_in

# CUDA's caching allocator hands out multiples of this
CUDA_GRANULE = 512


class CudaKernels(TorchFunctionMode):
    """Makes fake CPU tensors take the turns that CUDA tensors take, on a torch that has no CUDA.

    torch built without CUDA can't index a fake tensor whose device is cuda, so the prediction runs on fake
    CPU tensors, and the two places where PyTorch's eager code chooses by device are chosen here as on CUDA:

    - ``scaled_dot_product_attention``: the flash kernel without a mask, the memory-efficient one with a
      mask; on the CPU it would be a kernel that has no FLOP formula. fp32 has no flash kernel.
    - ``softmax(half, dtype=float32)``: one kernel on CUDA, a conversion and then a softmax on the CPU
      (and on both for bfloat16).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _cuda_attention(*args, **kwargs)
        if func is Tensor.softmax and args[0].dtype is torch.float16 and kwargs.get("dtype") is torch.float32:
            return torch.ops.aten._softmax(args[0], args[1] if len(args) > 1 else kwargs["dim"], True)
        return func(*args, **kwargs)


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and query.shape[1] != key.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    aten = torch.ops.aten
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def planning_for(device: str) -> Iterator[None]:
    """Make our adapter plan, strips too, for this type of device inside the block, whatever its fake tensors say."""
    choose, device_type_of = plan.choose, memory.device_type_of
    plan.choose = lambda part, forced, sizes, _device: choose(part, forced, sizes, device)
    memory.device_type_of = lambda weight: device
    try:
        yield
    finally:
        plan.choose, memory.device_type_of = choose, device_type_of


@dataclass(frozen=True)
class Footprint:
    """The cost of one forward pass.

    Attributes:
        flops: 2 per multiply-add, as FlopCounterMode counts: matrix products and convolutions alone,
            attention in full (a causal mask saves nothing).
        flops_by_op: the same by op.
        peak_bytes: most bytes alive at once, weights and inputs included.
        weight_bytes: parameters, buffers, and what the modules hold beside them.
    """

    flops: int
    flops_by_op: dict[str, int]
    peak_bytes: int
    weight_bytes: int


@contextmanager
def fake_mode() -> Iterator[FakeTensorMode]:
    """Build modules and inputs inside the block: they get shapes and dtypes, but no memory and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def real_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """Make a tensor with values, inside :func:`fake_mode` too: for what the models read (token ids, maps, indices)."""
    with unset_fake_temporarily():
        return torch.tensor(values, dtype=dtype)


def footprint(
    model: nn.Module, inputs: dict[str, Any], *, cuda: bool, count_flops: bool = True, granule: int | None = None
) -> Footprint:
    """Run ``model(**inputs)`` once and count. Call it inside :func:`fake_mode`.

    Args:
        model: built inside the same fake mode, in eval mode.
        inputs: its keyword arguments; their tensors count as alive throughout.
        cuda: take the turns of :class:`CudaKernels`, round to the CUDA allocator's granule, and let our ops allocate
            what their kernels do: their results.
        count_flops: False saves a fifth of the time, and ``flops`` is 0.
        granule: bytes; see :class:`StorageMeter`. None means the device's.
    """
    meter = StorageMeter(granule or (CUDA_GRANULE if cuda else 1), fused=cuda)
    meter.track(*model.parameters(), *model.buffers(), *held_beside(model))
    weight_bytes = meter.live
    meter.track(*tensors_in(inputs))
    counter = FlopCounterMode(display=False)

    def forward() -> None:
        # forced, or our encoder would lay fake weights out for oneDNN
        with torch.no_grad(), use_backend("reference"), ExitStack() as stack:
            if count_flops:
                stack.enter_context(counter)
            if cuda:
                stack.enter_context(CudaKernels())
                stack.enter_context(planning_for("cuda"))
            model(**inputs)

    peak = meter.measure(forward).peak + (0 if cuda else kept_bytes(model, inputs.get("high_res_pixels", ())))
    by_op = counter.get_flop_counts().get("Global", {}) if count_flops else {}
    flops_by_op = {str(op): int(count) for op, count in by_op.items()}
    return Footprint(sum(flops_by_op.values()), flops_by_op, peak, weight_bytes)


def held_beside(module: nn.Module) -> list[Tensor]:
    """List tensors in the modules' attributes, in containers and dataclasses too, that no module has registered.

    Those on the meta device, which nothing but a frozen parameter's old self can be here, take no memory.
    """
    found = [tensor for part in module.modules() for value in vars(part).values() for tensor in _inside(value)]
    return [tensor for tensor in found if tensor.device.type != "meta"]


def kept_bytes(model: nn.Module, pixels: Sequence[Tensor]) -> int:
    """Count what a folded encoder keeps on a CPU once it has run.

    That is a copy of every weight but the stem's, as the native kernels or oneDNN lay it out, and the memory of its
    activations. Fake weights are never packed.
    """
    total = 0
    for module in model.modules():
        folded = module.current() if isinstance(module, Encoder) else None
        if folded is None:
            continue
        convs = [conv for conv in folded.convs if conv is not module.conv1]
        with unset_fake_temporarily():
            layouts = [serving_layout(conv.weight) for conv in convs]
        packed = [(layout, conv) for layout, conv in zip(layouts, convs, strict=True) if layout is not None]
        total += sum(layout.nbytes(conv.weight, conv.stride[0]) for layout, conv in packed)
        if len(packed) == len(convs) and all(layout.writes_out for layout, _ in packed):
            total += max((_workspace_bytes(module, image) for image in pixels), default=0)
    return total


def _workspace_bytes(encoder: Encoder, image: Tensor) -> int:
    height, width = image.shape[:2]
    if memory.head(encoder, height, width)[0]:
        return 0  # strips
    size = (1, *memory.stem_size(encoder, height, width), encoder.conv1.out_channels)
    kept = memory.workspace_elements(encoder.units(), size) * encoder.conv1.weight.element_size()
    return kept if kept <= workspace.LARGEST else 0


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.layout == torch.strided:  # oneDNN's own layouts have no storage to ask
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _inside(getattr(value, item.name, None))
