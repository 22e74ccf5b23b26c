"""Fixtures of the compile tier: launches recorded once a session, compiled up front and in parallel."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from bench.launches.compile import Item, Resources, compile_all
from bench.launches.device import TARGETS
from bench.launches.record import Recording
from bench.launches.workloads import record_all

CHOSEN_VARIABLE = "HIA_COMPILE_TARGETS"
# targets whose launches are compiled; they are recorded for all
CHOSEN = tuple(os.environ.get(CHOSEN_VARIABLE, " ".join(TARGETS)).split())
if not set(CHOSEN) <= set(TARGETS):
    raise ValueError(f"{CHOSEN_VARIABLE} must be of {', '.join(TARGETS)}, got {' '.join(CHOSEN)!r}")
Recorder = Callable[[str], Recording]


@pytest.fixture(scope="session")
def recording() -> Recorder:
    """Return a function that records the launches of every op and composite on a target, once each."""
    kept: dict[str, Recording] = {}

    def of(target: str) -> Recording:
        if target not in kept:
            kept.update(record_all(list(TARGETS)))
        return kept[target]

    return of


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, recording: Recorder) -> dict[Item, Resources]:
    """Compile the launches that the chosen tests look at: those of their ops, on their targets."""
    params = [item.callspec.params for item in request.session.items if "results" in getattr(item, "fixturenames", ())]
    chosen = {(each["op"], each["target"]) for each in params}
    items = [
        (launch, target)
        for target in CHOSEN
        if any(name == target for _, name in chosen)
        for launch, uses in recording(target).launches.items()
        if any((workload.split(" ", 1)[0], target) in chosen for workload in uses.workloads)
    ]
    return compile_all(items)
