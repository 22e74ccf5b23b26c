"""Versions of weights: what was made from weights is theirs as long as their version is the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

WeightVersion = tuple[Any, ...]  # compared as a whole


def weight_version_of(tensors: Iterable[Tensor]) -> WeightVersion:
    """Name the present state of some tensors: it changes when one of them is written to, replaced, cast or moved.

    A write through ``parameter.data`` is the exception: PyTorch doesn't count those.
    """
    return tuple([(_address(x), x._version, x.dtype, x.device) for x in tensors])


def _address(tensor: Tensor) -> int:
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:  # fake ones are of a class of their own
        return tensor.data_ptr()
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


def has_training_norm(module: nn.Module) -> bool:
    """Tell whether any batch-norm of a module takes the statistics of what it is given."""
    if module.training and isinstance(module, _BatchNorm):
        return True
    return any(has_training_norm(child) for child in module._modules.values() if child is not None)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """List a module's parameters and buffers, in one order; one that two names share comes twice.

    Every call with folded weights asks: ``parameters()`` and ``buffers()`` take several times as long.
    """
    found: list[Tensor] = []
    _collect(module, found)
    return found


def _collect(module: nn.Module, found: list[Tensor]) -> None:
    for tensors in (module._parameters, module._buffers):
        if tensors:
            found.extend(tensor for tensor in tensors.values() if tensor is not None)
    for child in module._modules.values():
        if child is not None:
            _collect(child, found)
