"""Fixtures shared by all tests: devices, seeds, real data. ``tests/ops/conftest.py`` adds the poison."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import random
from pathlib import Path

import pytest
import torch

from hia_kernels.core import triton_interpreter, triton_support

DATA_VARIABLE = "HIA_TEST_DATA"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]
NO_GPU = "no CUDA device here: the gpu tier is not tested"

if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples in every run; HYPOTHESIS_PROFILE=random draws others and shrinks what fails.
    settings.register_profile("same", derandomize=True, deadline=None, database=None)
    settings.register_profile("random", deadline=None, print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

logging.getLogger("torch.__trace").propagate = False  # the compiler's own records would bury a failure's message


def pytest_configure() -> None:
    """Give each worker of pytest-xdist, and what it starts, its part of the processors."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        share = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(share)
        torch.set_num_threads(share)


def data_folder() -> Path:
    """Return the folder of real radiographs and tokenizers; it need not exist."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get(DATA_VARIABLE, default))


def _version(package: str) -> str:
    try:
        return getattr(importlib.import_module(package), "__version__", "?")
    except Exception as error:  # a broken optional package must not stop the tests that don't need it
        return f"none ({type(error).__name__})"


def pytest_report_header() -> list[str]:
    versions = ", ".join(f"{package} {_version(package)}" for package in ("torch", "triton", "transformers"))
    found = "found" if (data_folder() / "images").is_dir() else f"ABSENT, set {DATA_VARIABLE}; tests on it skip"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [f"versions: {versions}; GPU: {device}", f"real data: {data_folder()} ({found})"]


@pytest.hookimpl(tryfirst=True)  # -m chooses after this
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a GPU run the interpreter's tests too: splits, workspaces and routes that no heuristic takes by itself."""
    if torch.cuda.is_available() and not triton_support.interpreted():
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker("gpu")
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=NO_GPU)
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Return the device of the test; one that carries the gpu mark itself needs no run on the CPU."""
    on_cpu = request.param == "cpu"
    if on_cpu and request.node.get_closest_marker("gpu"):
        pytest.skip("a size for a GPU")
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Draw the same numbers in every run and any order of tests; turn TF32 off, so that fp32 means fp32."""
    random.seed(0)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def repaired_interpreter() -> None:
    """Repair Triton's interpreter for tests that import kernels themselves, as the ops' tables do before a call."""
    if triton_support.interpreted() and not triton_support.unavailable_reasons():
        triton_interpreter.repair()


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the launchers' own block sizes on every machine, never what was measured on this one."""
    monkeypatch.setenv("HIA_TUNED", "0")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real data; skip where there is none."""
    folder = data_folder()
    if not folder.is_dir():
        pytest.skip(f"NO REAL DATA: {folder} is no folder; name one with {DATA_VARIABLE}")
    return folder


@pytest.fixture(scope="session")
def radiographs(data_dir: Path) -> list[Path]:
    """Return real radiographs as image files, by name; skip where there are none."""
    found = sorted(path for path in (data_dir / "images").glob("*") if path.suffix in (".jpg", ".jpeg", ".png"))
    if not found:
        pytest.skip(f"NO RADIOGRAPHS: no .jpg or .png in {data_dir / 'images'}; {DATA_VARIABLE} names the data folder")
    return found
