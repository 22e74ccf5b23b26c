"""FLOPs and peak live bytes of a forward pass, from the real modules under fake tensors.

Nothing is computed and no weight exists: a 13B prefill is followed in seconds on any machine. FLOPs come
from torch's ``FlopCounterMode``; bytes from :class:`LiveBytes`, which follows storages from the op that
allocates them to the moment Python lets go of them, the way a caching allocator sees them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hia.encoder import strips as tiling
from hia.encoder import workspace as arena
from hia.encoder.encoder import Encoder
from hia.layers import plan
from hia_kernels import use_backend
from hia_kernels.ops.conv_norm_act import native
from hia_kernels.ops.conv_norm_act.functional import packing_reasons

# CUDA's caching allocator hands out multiples of this
CUDA_GRANULE = 512
PACKED_ATTENTION = "hia::cross_attention"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages alive, and remembers the most there were.

    A storage counts from the op that first returns it until it is freed, so views and in-place ops add
    nothing and temporaries stop counting when their last reference goes. Workspace that a kernel allocates
    inside itself (cuBLAS, im2col) is not seen.

    Under fake tensors an op of the namespace ``hia`` is replaced by the plain PyTorch function behind it,
    run under this mode, so that what the implementation allocates inside the op counts too. An op all of
    whose inputs are real runs for real: token ids and index maps keep their values, so models may read them
    (masks, placeholder counts) as they do outside.

    Args:
        granule: bytes; every storage is rounded up to a multiple of it.
    """

    def __init__(self, granule: int = 1) -> None:
        super().__init__()
        self.granule = granule
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def track(self, *tensors: Tensor) -> None:
        """Start counting the storages of these tensors; those already counted are only measured again."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def track_module(self, module: nn.Module) -> None:
        """Count a module's parameters, buffers, and what else it holds, as ``prepare()`` leaves; shared ones once."""
        self.track(*module.parameters(), *module.buffers(), *held_beside(module))

    def _count(self, storage: torch.UntypedStorage) -> None:
        # a StorageImpl keeps one Python object for as long as it lives, so its identity is the storage's
        key = id(storage)
        size = -(-storage.nbytes() // self.granule) * self.granule
        if key not in self._sizes:
            weakref.finalize(storage, self._release, key).atexit = False
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        fake = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        implementation = _implementation(func, args) if fake else None
        if implementation is not None:
            with self:
                out = implementation(*args, **kwargs)
        elif inputs and not fake:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        self.track(*_tensors(out))
        return out


def _implementation(func: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The plain PyTorch function behind an op of ours; None for any other op, and where it can't run."""
    if getattr(func, "namespace", "") != "hia":
        return None
    from hia_kernels.core.backend import reference_implementation

    reference = reference_implementation(func)
    if reference is None or not func._schema.name.startswith(PACKED_ATTENTION):
        return reference
    packing = _even_packing(func, args)
    if packing is None:
        return None
    return lambda *_args, **_kwargs: reference(*packing)


def _even_packing(func: Any, args: tuple[Any, ...]) -> list[Any] | None:
    """The op's arguments with real values in cu_seqlens, which fake tensors lack and the reference reads.

    They follow from the shapes when all sequences are equally long, as a benchmark's are; otherwise None,
    and the op's fake, which allocates the output alone, has to do.
    """
    names = [argument.name for argument in func._schema.arguments]
    values = dict(zip(names, args, strict=False))
    for side, tensor in (("q", values["q"]), ("k", values["k"])):
        length, sequences = values[f"max_seqlen_{side}"], values[f"cu_seqlens_{side}"].shape[0] - 1
        if tensor.shape[0] != length * sequences:
            return None
        with unset_fake_temporarily():
            values[f"cu_seqlens_{side}"] = torch.tensor([length * b for b in range(sequences + 1)], dtype=torch.int32)
    return [values[name] for name in names]


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
    """Inside the block our adapter plans for this type of device, whatever its fake tensors say."""
    choose = plan.choose
    plan.choose = lambda part, forced, sizes, _device: choose(part, forced, sizes, device)
    try:
        yield
    finally:
        plan.choose = choose


@dataclass(frozen=True)
class Footprint:
    """What one forward pass costs.

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
    """Build modules and inputs inside: they get shapes and dtypes, but no memory and no values."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def real_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    """A tensor that has values inside :func:`fake_mode` too, for what the models read: token ids, maps, indices."""
    with unset_fake_temporarily():
        return torch.tensor(values, dtype=dtype)


def footprint(
    model: nn.Module, inputs: dict[str, Any], *, cuda: bool, count_flops: bool = True, granule: int | None = None
) -> Footprint:
    """Run ``model(**inputs)`` once and count. Call it inside :func:`fake_mode`.

    Args:
        model: built inside the same fake mode, in eval mode.
        inputs: its keyword arguments; their tensors count as alive throughout.
        cuda: take the turns of :class:`CudaKernels` and round to the CUDA allocator's granule.
        count_flops: False saves a fifth of the time, and ``flops`` is 0.
        granule: bytes; see :class:`LiveBytes`. None means the device's.
    """
    tracker = LiveBytes(granule or (CUDA_GRANULE if cuda else 1))
    tracker.track_module(model)
    weight_bytes = tracker.live
    tracker.track(*_tensors(inputs))
    if not cuda:
        tracker.live += kept_bytes(model, inputs.get("high_res_pixels", ()))
    counter = FlopCounterMode(display=False)
    # forced, or our encoder would lay fake weights out for oneDNN
    with torch.no_grad(), use_backend("reference"), ExitStack() as stack:
        stack.enter_context(tracker)
        if count_flops:
            stack.enter_context(counter)
        if cuda:
            stack.enter_context(CudaKernels())
            stack.enter_context(planning_for("cuda"))
        output = model(**inputs)
    del output
    by_op = counter.get_flop_counts().get("Global", {}) if count_flops else {}
    flops_by_op = {str(op): int(count) for op, count in by_op.items()}
    return Footprint(sum(flops_by_op.values()), flops_by_op, tracker.peak, weight_bytes)


def held_beside(module: nn.Module) -> list[Tensor]:
    """Tensors in the modules' attributes, in containers and dataclasses too, that no module has registered.

    Those on the meta device, which nothing but a frozen parameter's old self can be here, take no memory.
    """
    found = [tensor for part in module.modules() for value in vars(part).values() for tensor in _inside(value)]
    return [tensor for tensor in found if tensor.device.type != "meta"]


def kept_bytes(model: nn.Module, pixels: Sequence[Tensor]) -> int:
    """What a prepared encoder keeps on a CPU once it has run: a copy of every weight but the stem's, as the native
    kernels or oneDNN lay it out, and the memory of its activations. Fake weights are never packed."""
    total = 0
    for module in model.modules():
        prepared = module.current() if isinstance(module, Encoder) else None
        if prepared is None:
            continue
        convs = [conv for conv in prepared.steps if conv is not module.conv1]
        with unset_fake_temporarily():
            if packing_reasons(torch.zeros(16, 16, 1, 1, dtype=module.conv1.weight.dtype)):
                continue
            native_serves = [
                not native.unavailable_reasons() and not native.packing_unsupported_reasons(conv.weight)
                for conv in convs
            ]
        for conv, serves in zip(convs, native_serves, strict=True):
            points = native.POINTS if serves and native.is_winograd(conv.weight, conv.stride[0]) else 0
            total += conv.weight.nbytes * (points or 9) // 9
        if all(native_serves):
            total += max((_arena_bytes(module, image) for image in pixels), default=0)
    return total


def _arena_bytes(encoder: Encoder, image: Tensor) -> int:
    height, width = image.shape[:2]
    if tiling.head(encoder, height, width)[0]:
        return 0  # strips
    size = (1, *tiling.stem_size(encoder, height, width), encoder.conv1.out_channels)
    kept = tiling.arena_elements(encoder.units(), size) * encoder.conv1.weight.element_size()
    return kept if kept <= arena.LARGEST else 0


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.layout == torch.strided:  # oneDNN's own layouts have no storage to ask
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _inside(getattr(value, item.name, None))


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
