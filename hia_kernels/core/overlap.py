"""Arguments that share memory with what an op writes: kernels read some rows after others were written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STRIDED = torch.strided


@dataclass(frozen=True)
class Written:
    """The argument that an op writes to, by its schema.

    Attributes:
        op: the op's name, for the message.
        name: of the argument.
        position: of the argument.
        readers: positions of the other tensors.
        packed: some may be in a layout of oneDNN, without an address, in memory of their own.
    """

    op: str
    name: str
    position: int
    readers: tuple[int, ...]
    packed: bool = False

    def check_writable(self, args: tuple[Any, ...]) -> None:
        """Check, before anything is written, that the written one's version can be raised afterwards.

        Raises:
            RuntimeError: it was made in inference mode, which is no longer on.
        """
        target = args[self.position]
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"hia::{self.op}: {self.name} must not be an inference tensor outside of inference mode; clone it"
            )

    def apart(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Copy the arguments whose memory reaches into that of the written one; the others stay what they are.

        Addresses are compared, not storages: two storages may lie in one buffer of another library. An argument between
        the written one's elements, as the other columns of a table, is copied too, which changes no result. Every call
        comes through here, so nothing is asked twice. All tensors are real: fake ones never reach an implementation.

        Raises:
            ValueError: the written one overlaps itself.
        """
        target = args[self.position]
        start = target.data_ptr()
        if target.is_contiguous():
            end = start + target.nbytes
        else:
            self._check(target)
            end = _end(start, target)
        for position in self.readers:
            one = args[position]
            if one is None or (self.packed and one.layout is not _STRIDED):
                continue
            address = one.data_ptr()
            if address >= end:
                continue
            if address < start and (address + one.nbytes if one.is_contiguous() else _end(address, one)) <= start:
                continue
            args = (*args[:position], one.clone(), *args[position + 1 :])
        return args

    def _check(self, tensor: Tensor) -> None:
        """Check that no two elements can be one in memory: every stride reaches over the smaller ones."""
        reach = 0
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride <= reach:
                raise ValueError(
                    f"hia::{self.op}: {self.name} must not overlap itself in memory, got shape {list(tensor.shape)} "
                    f"and strides {list(tensor.stride())}; clone it"
                )
            reach += (size - 1) * stride


def _end(address: int, tensor: Tensor) -> int:
    """Return the address behind the last element, whatever the strides."""
    reach = (
        0
        if tensor.numel() == 0
        else 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    )
    return address + reach * tensor.element_size()
