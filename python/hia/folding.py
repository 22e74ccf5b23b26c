"""Units that keep folded weights beside their parameters: made when asked, or by themselves where calls repeat.

Weights that are trained change before every call, so folding them would cost more than it saves. Those that were the
same in two calls of inference will most likely be the same in a third: the second call folds them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hia_kernels.core.backend import AUTO, requested_backend

from .free_memory import free_bytes
from .unit import Unit, is_sharded
from .versions import WeightVersion, weight_version_of


class FoldedWeights(Protocol):
    """Result of folding, as units keep it."""

    @property
    def version(self) -> WeightVersion:
        """Return that of the weights it was made from."""

    @property
    def nbytes(self) -> int:
        """Count the bytes it occupies."""


Folded = TypeVar("Folded", bound=FoldedWeights)
Sample = dict[tuple[torch.device, torch.dtype], Tensor]  # elements of weights, [n]
SAMPLED = 256  # elements of a weight that are compared
_folding = threading.Lock()  # a thread that comes while another one folds runs without


class FoldingUnit(Unit, Generic[Folded]):
    """A unit whose calls without gradients can use folded weights, which are in no state_dict and no copy.

    Attributes:
        auto_fold: whether weights fold by themselves; :meth:`set_auto_fold` changes it.
    """

    auto_fold = True
    _folded: Folded | None = None
    _sample: Sample | None = None  # of weights that folded by themselves
    _noted: WeightVersion | None = None  # of the weights of an earlier call
    _refused: WeightVersion | None = None  # of weights for which memory is short

    def __getstate__(self) -> dict[str, Any]:
        """Leave folded weights out of copies: they belong to other parameters, and packed ones can't be copied."""
        return {**self.__dict__, "_folded": None, "_sample": None, "_noted": None, "_refused": None}

    def weights(self) -> list[Tensor]:
        """List all that folded weights are made from."""
        raise NotImplementedError

    def folding_bytes(self) -> int:
        """Count the bytes that folding takes at its peak."""
        raise NotImplementedError

    def _made(self) -> Folded:
        """Fold the present weights."""
        raise NotImplementedError

    def folded_modules(self) -> Iterable[nn.Module]:
        """List the modules whose weights are folded, with all that may compute or move these."""
        return self.modules()

    def weight_version(self) -> WeightVersion:
        """Name the present state of all that folded weights are made from."""
        return weight_version_of(self.weights())

    def fold_weights(self) -> Folded:
        """Fold the weights for inference: exact to rounding, beside the parameters.

        Used where no gradient is recorded, until a parameter changes.

        Raises:
            NotImplementedError: the weights are sharded or offloaded.
        """
        self.check_in_place("fold_weights")
        made = self._fold()
        self._drop()
        self._folded = made
        return made

    def unfold_weights(self) -> None:
        """Drop folded weights; none fold by themselves any more until :meth:`set_auto_fold` says so."""
        self.auto_fold = False
        self._drop()

    def set_auto_fold(self, auto_fold: bool) -> None:
        """Choose whether weights fold by themselves from the second call on, in eval mode without gradients.

        Args:
            auto_fold: False also drops what was folded so; what :meth:`fold_weights` made stays.

        Raises:
            ValueError: neither True nor False.
        """
        if not isinstance(auto_fold, bool):
            raise ValueError(f"hia: auto_fold must be True or False, got {auto_fold!r}")
        self.auto_fold, self._noted, self._refused = auto_fold, None, None
        if not auto_fold and self._sample is not None:
            self._drop()

    def train(self, mode: bool = True) -> FoldingUnit[Folded]:
        """Set the mode; training needs the memory of weights that folded by themselves for other things."""
        super().train(mode)
        if mode:
            self._noted = None
            if self._sample is not None:
                self._drop()
        return self

    def current(self) -> Folded | None:
        """Return the folded weights; drop them once a parameter has changed, with a warning if they were asked for.

        What folded by itself is not seen where a call is traced or transformed, which works without.
        """
        folded = self._folded
        if folded is None or torch.compiler.is_compiling():
            return folded
        if self._sample is not None and _is_transformed():
            return None
        if folded.version == self.weight_version():
            return folded
        if self._sample is None:
            warnings.warn(
                "hia: parameters have changed since fold_weights(), so what it made is dropped; "
                "call fold_weights() again",
                stacklevel=2,
            )
        self._drop()
        return None

    def count_call(self, pays: bool = True, *, checked: bool = False, at_once: bool = False) -> Folded | None:
        """Take note of a call of inference; fold if there was another one with the same weights.

        Args:
            pays: whether the call could use folded weights.
            checked: whether :func:`drop_changed` has just looked at this unit.
            at_once: fold in the first call: it can't do without.

        Returns:
            The folded weights, if there are any now. Those that folded by themselves are dropped where a sample of
            the parameters is not what it was.
        """
        folded, off = self.current(), torch.is_grad_enabled() or _is_watched()
        if folded is not None:
            if off or self._sample is None or checked or _same_bits(sample_of(self.weights()), self._sample):
                return folded
            self._drop()
        if off or not pays or not self._may_fold():
            return None
        version = self.weight_version()
        if at_once or self._noted == version:
            return self._fold_unasked(version)
        self._noted = version
        return None

    def folding_state(self) -> str:
        """Say whether weights are folded, and why."""
        if self.current() is not None:
            return "folded by fold_weights()" if self._sample is None else "folded by themselves"
        return "not folded yet" if self.auto_fold else "not folded, auto_fold is False"

    def _may_fold(self) -> bool:
        """Tell whether weights may fold by themselves now: they are plain, whole, and stay in place between calls."""
        if not self.auto_fold or self.training or requested_backend() != AUTO:  # weights are packed for one backend
            return False
        return all(map(_is_in_place, self.weights())) and not any(map(_moves_weights, self.folded_modules()))

    def _fold_unasked(self, version: WeightVersion) -> Folded | None:
        if version == self._refused or not _folding.acquire(blocking=False):
            return None
        try:
            if self._folded is None:
                free = free_bytes(self.weights()[0].device)
                if free is not None and free < 2 * self.folding_bytes():
                    self._refused = version
                    return None
                made, sample = self._fold(), sample_of(self.weights())
                self._wait()  # before a call on another stream finds them
                self._sample, self._folded = sample, made
        except RuntimeError as error:  # a call that works without must not fail
            self._refused = version
            warnings.warn(f"hia: weights did not fold by themselves and stay as they are: {error}", stacklevel=2)
        finally:
            _folding.release()
        return self._folded

    def _fold(self) -> Folded:
        device = self.weights()[0].device.type
        # weights outlive an inference mode, and autocast would round them
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            return self._made()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FoldingUnit[Folded]:
        """Cast or move the weights; what folded by itself of the old ones goes with them."""
        super()._apply(fn, recurse)
        if self._sample is not None:
            self._drop()
        return self

    def _wait(self) -> None:
        """Wait for the device: folded weights come and go unasked, and other streams know nothing of it."""
        device = self.weights()[0].device
        if device.type == "cuda" and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(device)

    def _drop(self) -> None:
        if self._sample is not None:
            self._wait()
        self._folded = self._sample = self._noted = None


def sample_of(weights: Iterable[Tensor]) -> Sample:
    """Copy evenly spaced elements of each weight, to notice what versions don't count: writes through ``.data``."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        if weight.numel():
            groups.setdefault((weight.device, weight.dtype), []).append(_spaced(weight.detach()))
    with torch.inference_mode(False):
        return {key: torch.cat(elements) for key, elements in groups.items()}


def _spaced(weight: Tensor) -> Tensor:
    """Return at most 2 * SAMPLED elements, [n], the first among them; a view where the weight lies densely.

    The step is odd, or it would meet a few columns of a matrix alone.
    """
    step = max(1, weight.numel() // SAMPLED) | 1
    span = 1 + sum((side - 1) * stride for side, stride in zip(weight.shape, weight.stride(), strict=True))
    if span != weight.numel():
        return weight.reshape(-1)[::step]
    return weight.as_strided((-(-weight.numel() // step),), (step,), weight.storage_offset())


def _same_bits(now: Sample, before: Sample) -> bool:
    """Compare bit by bit, since NaN is no change; on a GPU the host waits for the answer."""
    if now.keys() != before.keys():
        return False
    return all(torch.equal(x.view(torch.uint8), before[key].view(torch.uint8)) for key, x in now.items())


def _joined(samples: Iterable[Sample]) -> Sample:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for sample in samples:
        for key, elements in sample.items():
            groups.setdefault(key, []).append(elements)
    return {key: torch.cat(elements) for key, elements in groups.items()}


def drop_changed(units: Iterable[FoldingUnit[Any]]) -> None:
    """Drop what folded by itself of weights that were written to unseen: the host waits for a GPU once for all."""
    sampled = [(unit, unit._sample) for unit in units if unit._sample is not None]
    if not sampled or torch.is_grad_enabled() or _is_watched():
        return
    everything = sample_of(weight for unit, _ in sampled for weight in unit.weights())
    if _same_bits(everything, _joined(sample for _, sample in sampled)):
        return
    for unit, sample in sampled:
        if not _same_bits(sample_of(unit.weights()), sample):
            unit._drop()


def _is_watched() -> bool:
    """Tell whether something looks on at every op and must not see another one, or keeps what it sees."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing or _is_transformed()


def _is_transformed() -> bool:
    """Tell whether ops are traced, counted, faked, or run by a transform of torch.func."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def _is_in_place(weight: Tensor) -> bool:
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return plain and not (weight.is_meta or weight.is_inference() or is_sharded(weight))


def _moves_weights(module: nn.Module) -> bool:
    """Tell whether weights may be elsewhere between calls (accelerate, FSDP), or are computed in each."""
    managed = hasattr(module, "_hf_hook") or getattr(module, "_is_fsdp_managed_module", False)
    return managed or parametrize.is_parametrized(module)
