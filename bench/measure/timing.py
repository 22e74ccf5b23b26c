"""Times of several calls, taken in turns, so that a drift of the machine hits all of them.

On CUDA a repetition is timed by events, behind writes that flush the L2 cache and keep the GPU busy while the call's
kernels are queued. On the CPU it is timed by ``perf_counter``; calls too short for the clock are repeated
within one repetition.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

NOISE = 0.15
SHORTEST_MS = 0.5  # a repetition on the CPU is at least this long
SLOW_MS = 200.0
CACHE_BYTES = 256 * 2**20  # more than any L2
MAX_AHEAD_MS = 50.0  # of writes before a call; a longer one is the host's to queue, and waits for it


class Clock(Protocol):
    """Milliseconds of one call."""

    def __call__(self, call: Callable[[], object], times: int) -> float:
        """Return milliseconds a call, over ``times`` calls."""


def cpu_clock(call: Callable[[], object], times: int) -> float:
    """Return wall-clock time; for a CUDA call, what it takes the CPU to queue it."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) * 1e3 / times


class CudaClock:
    """Time between two events on the current stream: the device's, as long as the host is ahead of it.

    What a call takes the host is in its ``dispatch`` rows, and in :meth:`queued_ms`. Where that is too long,
    the device waits for the host within the time, as it does for a user: :meth:`is_host_bound`.
    """

    def __init__(self) -> None:
        self._cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
        self._queued: WeakKeyDictionary[Callable[[], object], float] = WeakKeyDictionary()  # ms, the shortest so far
        self._fill_ms = self._time_of_fill()

    def _time_of_fill(self) -> float:
        """Time one of the writes that keep the device busy; the first ones warm up."""
        fills = 8
        return [self._between_events(lambda: self._fill(fills)) for _ in range(2)][-1] / fills

    def _fill(self, times: int) -> None:
        for _ in range(times):
            self._cache.zero_()

    @staticmethod
    def _between_events(work: Callable[[], object]) -> float:
        """Return the milliseconds between two events around some work, once the device is done with it."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def queued_ms(self, call: Callable[[], object]) -> float | None:
        """Return the shortest time that the host took to queue a call, milliseconds; None before it was timed."""
        return self._queued.get(call)

    def is_host_bound(self, call: Callable[[], object], times: int = 1) -> bool:
        """Tell whether the host needs so long to queue a call that its time is the host's too."""
        return self._ahead_ms(call, times) > MAX_AHEAD_MS

    def _ahead_ms(self, call: Callable[[], object], times: int) -> float:
        return 1.5 * times * self._queued.get(call, 0.0)

    def __call__(self, call: Callable[[], object], times: int) -> float:
        """Return the calls' mean; ``times`` is 1 where L2 must be cold.

        The writes before it flush L2, and last as long as the host needs to queue the calls: else a short kernel's time
        would be the host's. A call that is bound by the host has one write before it: more would hide a part of it.
        """
        ahead = 0.0 if self.is_host_bound(call, times) else self._ahead_ms(call, times)
        queued = 0.0

        def work() -> None:
            nonlocal queued
            begun = time.perf_counter()
            for _ in range(times):
                call()
            queued = (time.perf_counter() - begun) * 1e3 / times

        self._fill(1 + math.ceil(ahead / self._fill_ms))
        taken = self._between_events(work)
        self._queued[call] = min(queued, self._queued.get(call, queued))
        return taken / times


class DispatchClock:
    """CPU-side time of a call, the device idle before and its work not waited for."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __call__(self, call: Callable[[], object], times: int) -> float:
        """Return the mean of at most 100 calls: the device's queue must not fill."""
        synchronize(self._device)
        taken = cpu_clock(call, min(times, 100))
        synchronize(self._device)
        return taken


def synchronize(device: str) -> None:
    """Wait for the device; the CPU has nothing to wait for."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Repetitions of one call.

    Attributes:
        times_ms: in the order they were taken.
        error: what it raised, which ended them.
    """

    times_ms: list[float] = field(default_factory=list)
    error: Exception | None = None

    def percentile(self, percent: float) -> float:
        """Return a percentile by linear interpolation."""
        ordered = sorted(self.times_ms)
        place = (len(ordered) - 1) * percent / 100
        low, high = math.floor(place), math.ceil(place)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def noisy(self) -> bool:
        """Tell whether the medians of the first and second half differ by more than 15 % of the smaller."""
        half = len(self.times_ms) // 2
        if half == 0:
            return True
        first, second = statistics.median(self.times_ms[:half]), statistics.median(self.times_ms[half:])
        return abs(first - second) > NOISE * min(first, second)


@dataclass(frozen=True)
class Budget:
    """The time and the number of repetitions.

    Attributes:
        seconds: for all calls together.
        at_least: repetitions of each call, however long they take.
        at_most: repetitions of each call.
    """

    seconds: float
    at_least: int = 4
    at_most: int = 60


def interleaved(
    calls: dict[str, Callable[[], object]],
    clock: Clock,
    budget: Budget,
    *,
    shortest_ms: float = SHORTEST_MS,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Time the calls in turns: A B A B. One that raises is left out from then on.

    Args:
        calls: by name; each has run before.
        clock: how a repetition is timed.
        budget: when to stop; the end of a round.
        shortest_ms: shorter calls are repeated within a repetition until they take this long; 0 never.
        now: seconds.
    """
    started = now()
    found = {name: Samples() for name in calls}
    times = {name: _repeats(call, clock, shortest_ms, found[name]) for name, call in calls.items()}
    for done in range(min(len(one.times_ms) for one in found.values()), budget.at_most):
        if done >= budget.at_least and now() - started > budget.seconds:
            break
        for name, call in calls.items():
            if found[name].error is not None:
                continue
            try:
                found[name].times_ms.append(clock(call, times[name]))
            except Exception as error:
                found[name].error = error
    return found


def _repeats(call: Callable[[], object], clock: Clock, shortest_ms: float, samples: Samples) -> int:
    """Warm up, and return how many calls a repetition needs. A slow call has little to warm up and is called once."""
    try:
        one = clock(call, 1)
        if one < SLOW_MS:
            one = clock(call, 1)
        else:
            samples.times_ms.append(one)  # as good as any that follow, and they take long
    except Exception as error:
        samples.error = error
        return 1
    return max(1, min(1000, math.ceil(shortest_ms / max(one, 1e-4))))


class OutOfTime(BaseException):
    """Raised inside :func:`time_limit`; no ``Exception``, or a compiler would take it for a failure of its own."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End the block by :class:`OutOfTime` after that long, at the next line of Python.

    Without a limit, outside the main thread, and where the system has no such timer, it runs as long as it takes.
    """
    usable = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def expired(*_signal: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def exact_matmuls() -> Iterator[None]:
    """Turn TF32 off inside the block: fp32 means fp32, for every provider."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
