"""Plain PyTorch in place of the registered ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

import hia_kernels
from hia_kernels.ops.inject_rows.reference import inject_rows_inplace_ref


def _inject_in_place(hidden: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, row_idx: Tensor) -> Tensor:
    inject_rows_inplace_ref(hidden, update, weight, bias, row_idx)
    return hidden


@contextmanager
def replacing_ops(functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Have the adapter's modules call these instead of the registered ops inside the block.

    A registered op is opaque to the compiler; what it may fuse must be plain PyTorch.
    """
    wanted = {**functions, "inject_rows_": _inject_in_place}
    before = {name: getattr(hia_kernels, name) for name in wanted}
    try:
        for name, function in wanted.items():
            setattr(hia_kernels, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(hia_kernels, name, function)
