"""Packed sequences: sequence ``b`` of a packed tensor is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import debug_enabled

# what an op reads its indices as, in every backend: kernels step through them by one element of this size
INDICES = {"cu_seqlens_q": torch.int32, "cu_seqlens_k": torch.int32, "row_idx": torch.int64}


def with_index(op: str, args: tuple[Any, ...], position: int, name: str) -> tuple[Any, ...]:
    """Make one argument contiguous and of its dtype in :data:`INDICES`; mostly it is, and nothing is copied.

    Raises:
        ValueError: a value that int32 can't hold, where values are checked.
    """
    index, dtype = args[position], INDICES[name]
    if index is None or (index.dtype == dtype and index.is_contiguous()):
        return args
    converted = index.to(dtype).contiguous()
    if dtype == torch.int32 and check_values_now(index) and not torch.equal(converted.long(), index.long()):
        raise ValueError(f"hia::{op}: {name} must be less than 2**31, got {int(index.max())}")
    return (*args[:position], converted, *args[position + 1 :])


def cu_seqlens_from_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return cumulative lengths with a leading zero: [B + 1] int32 (flash-attention's convention).

    Raises:
        ValueError: a negative length, or more than int32 can count.
    """
    if any(length < 0 for length in lengths):
        raise ValueError(f"cu_seqlens_from_lengths: lengths must not be negative, got {list(lengths)}")
    ends = list(accumulate(lengths, initial=0))
    if ends[-1] >= 2**31:
        raise ValueError(f"cu_seqlens_from_lengths: lengths must add up to less than 2**31, got {ends[-1]}")
    return to_device(torch.tensor(ends, dtype=torch.int32), torch.device(device))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the device; to a GPU through pinned memory, so that the host does not wait for the copy.

    Tracing and fake tensors leave pinning out: it is no part of a graph, and PyTorch has no fake of it.
    """
    crosses = tensor.device.type == "cpu" and device.type == "cuda"
    if crosses and not torch.compiler.is_compiling() and type(tensor) is Tensor and not is_in_torch_dispatch_mode():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def check_values_now(tensor: Tensor) -> bool:
    """Tell whether values are checked: reading them is free on the CPU, but makes the host wait for a device."""
    return tensor.device.type == "cpu" or debug_enabled()


def check_cu_seqlens(op: str, name: str, cu_seqlens: Tensor, total: int, max_seqlen: int | None) -> None:
    """Check the values of ``cu_seqlens``; skipped on devices unless ``HIA_DEBUG=1``.

    Raises:
        ValueError: it does not start at 0, decreases, does not end at ``total``, or a sequence is longer
            than ``max_seqlen``.
    """
    if not check_values_now(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"hia::{op}: {name} must start at 0, got {values[0]}")
    lengths = [end - start for start, end in pairwise(values)]
    for position, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"hia::{op}: {name} must not decrease, got {values[position]} then {values[position + 1]} "
                f"at position {position + 1}"
            )
    if values[-1] != total:
        raise ValueError(f"hia::{op}: {name} must end at the packed length {total}, got {values[-1]}")
    if max_seqlen is not None and lengths and max(lengths) > max_seqlen:
        raise ValueError(
            f"hia::{op}: {name.replace('cu_seqlens', 'max_seqlen')} must be at least the longest sequence "
            f"({max(lengths)}), got {max_seqlen}"
        )


def check_row_idx(op: str, name: str, row_idx: Tensor, rows: int, *, unique: bool) -> None:
    """Check the values of a row index; skipped on devices unless ``HIA_DEBUG=1``.

    Raises:
        ValueError: an index outside ``[0, rows)``, or, with ``unique``, one that occurs twice.
    """
    if row_idx.numel() == 0 or not check_values_now(row_idx):
        return
    low, high = int(row_idx.min()), int(row_idx.max())
    if low < 0 or high >= rows:
        raise ValueError(f"hia::{op}: {name} must be in [0, {rows}), got values from {low} to {high}")
    if unique and torch.unique(row_idx).numel() != row_idx.numel():
        raise ValueError(f"hia::{op}: {name} must not name a row twice, got {row_idx.numel()} indices with duplicates")
