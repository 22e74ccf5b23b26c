"""Stand-ins for what a fake GPU has not: a clock, a count of its memory, values, processes of its own, compilers.

Inside :func:`rehearsing` the commands of ``make gpu`` run in this process on the fake device of
:mod:`bench.launches.device`, down to the launches of their kernels. Nothing is computed, so nothing is compared: what
the stand-ins take the place of is tested on the CPU.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..launches.device import Target
from ..launches.record import Recording, recorded

LAYERS = 4  # of the host: what the code does with one, it does with forty
Replacement = tuple[Any, str, Any]  # owner, attribute, stand-in


class Event:
    """A CUDA event on the host's clock."""

    def __init__(self, enable_timing: bool = False, **_options: Any) -> None:
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Return milliseconds, never 0."""
        return max(1e-3, (end._at - self._at) * 1e3)

    def synchronize(self) -> None:
        """Wait for nothing."""


def _cuda(target: Target) -> dict[str, Any]:
    """List what of ``torch.cuda`` the commands use beside what the fake device has already."""
    return {
        "Event": Event,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1,  # a peak of 0 would be no peak
        "reset_peak_memory_stats": lambda device=None: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "mem_get_info": lambda device=None: (target.memory, target.memory),
        "device": lambda device: nullcontext(),
    }


_MADE = (torch.tensor, torch.as_tensor, torch.arange, Tensor.to, Tensor.cuda)
_READ = (Tensor.tolist, Tensor.item, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__index__)


class Values(TorchFunctionMode):
    """Remembers the values of whole numbers on the fake device: lengths of sequences, rows, ids, and what follows."""

    def __init__(self) -> None:
        super().__init__()
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READ and args[0] in self._known:
            return func(self._known[args[0]])
        found = func(*args, **kwargs)
        made = found if isinstance(found, tuple) else (found,)
        if all(self._can_be_known(one) for one in made) and not any(one is leaf for one in made for leaf in args):
            values = self._values_of(func, args, kwargs)
            if values is not None:
                for one, value in zip(made, values if isinstance(found, tuple) else (values,), strict=True):
                    self._known[one] = value
        return found

    @staticmethod
    def _can_be_known(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_meta and not value.is_floating_point()

    def _values_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute on the CPU what follows from known values; None where some are not known."""
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not (leaves or func in _MADE) or any(leaf.is_meta and leaf not in self._known for leaf in leaves):
            return None

        def on_cpu(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._known.get(value, value)
            is_cuda = isinstance(value, str | torch.device) and str(value).startswith(("cuda", "meta"))
            return torch.device("cpu") if is_cuda else value

        args, kwargs = tree_map(on_cpu, (args, kwargs))
        return args[0] if func is Tensor.cuda else func(*args, **kwargs)


def _few_layers(spec: Any) -> Any:
    """Return a host whose shapes are those of the real one, with fewer layers."""
    text, vision = ({**one, "num_hidden_layers": LAYERS} for one in (spec.text, spec.vision))
    return dataclasses.replace(spec, text=text, vision=vision)


@contextmanager
def rehearsing(target: Target) -> Iterator[Recording]:
    """Run the commands of ``bench`` in this process on a fake device inside the block, and record their launches."""
    found: list[Recording] = []
    with ExitStack() as stack:
        cuda = [(torch.cuda, name, value) for name, value in _cuda(target).items()]
        stand_ins = (*cuda, *_no_values(), *_one_process(lambda: found[0]), *_few_repetitions(), *_hosts())
        for owner, name, value in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, value))
        found.append(stack.enter_context(recorded(target)))
        stack.enter_context(Values())
        yield found[0]


def _no_values() -> list[Replacement]:
    """List what compares values, or counts by PyTorch's fake tensors, which know no fake device."""
    from hia_kernels import testing

    from ..measure import accuracy, costs
    from ..smoke import run as smoke
    from ..table3 import rows
    from ..tune import race

    def expect(reference: Any, inputs: Any, names: Any, *, dtype: torch.dtype) -> testing.Expected:
        plain = testing.forward_backward(reference, inputs, names)
        return testing.Expected(plain, plain, dtype)

    return [
        (accuracy, "analysed", lambda inputs, dtype: inputs),
        (accuracy, "mismatch", lambda *args, **options: None),
        (accuracy, "rel_rms", lambda result, exact: 0.0),
        (race, "analysed", lambda inputs, dtype: inputs),
        (smoke, "same_bits", lambda a, b: a.shape == b.shape),
        (testing, "expect", expect),
        (testing, "mismatch", lambda *args, **options: None),
        (costs, "_count", lambda *args, **options: 2**60),  # more than what padding takes off
        (rows, "tracker_claim", lambda measured: rows.Claim("peaks", None, "nothing is allocated")),
    ]


def _one_process(found: Callable[[], Recording]) -> list[Replacement]:
    """List what starts processes, and what compiles in them; ``found`` returns the recording at work."""
    from ..measure.worker import Inline
    from ..ops import collect
    from ..profile import run as profile
    from ..smoke import run as smoke
    from ..table3 import run as table3
    from ..tune import ahead
    from ..tune import run as tune

    same = [
        (owner, name, value)
        for owner in (ahead, smoke)
        for name, value in (
            ("recorded", lambda target: nullcontext(found())),
            ("compile_all", lambda items, **options: {}),
        )
    ]
    return [
        *same,
        *((owner, "Isolated", Inline) for owner in (collect, tune, smoke)),
        (
            profile,
            "profile",
            lambda activities, **options: torch.profiler.profile(activities=activities[:1], **options),
        ),
        (table3, "run_in_subprocess", _in_this_process),
        (torch, "compile", lambda function=None, **options: function if function is not None else (lambda one: one)),
    ]


def _host_profile(activities: Any, **options: Any) -> Any:
    return torch.profiler.profile(activities=activities[:1], **options)


def _few_repetitions() -> list[Replacement]:
    """List what decides how often something is timed."""
    from ..measure.timing import Budget, CudaClock, interleaved
    from ..ops.session import Settings
    from ..tune import race, search

    def once(calls: Any, clock: Any, budget: Any, **options: Any) -> Any:
        return interleaved(calls, clock, Budget(0.0, at_least=1, at_most=1), **options)

    few = Budget(0.0, at_least=2, at_most=2)
    return [
        (race, "interleaved", once),
        (search, "interleaved", once),
        (Settings, "budget", lambda settings, entries: few),
        # one write takes the fake device no time, so it would take millions to last as long as a call is queued
        (CudaClock, "_fill", lambda clock, times: clock._cache.zero_()),
    ]


def _in_this_process(request: Any) -> Iterator[Any]:
    from ..table3 import prefill

    return prefill.run_requests(prefill.RunRequest.from_json(request.to_json()))


def _hosts() -> list[Replacement]:
    """List what makes hosts: of few layers, and without the one place of transformers that reads values, to compare the
    number of placeholders with that of features."""
    from transformers.models.llava import modeling_llava
    from transformers.models.llava_next import modeling_llava_next

    from ..end_to_end import run as end_to_end
    from ..table3.hosts import LLAVA_13B

    def placeholders(self: Any, input_ids: Any, inputs_embeds: Any, image_features: Any = None) -> Any:
        return (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(inputs_embeds)

    name = "get_placeholder_mask"
    models = (modeling_llava.LlavaModel, modeling_llava_next.LlavaNextModel)
    return [
        (end_to_end, "LLAVA_13B", _few_layers(LLAVA_13B)),
        *((model, name, placeholders) for model in models if hasattr(model, name)),
    ]
