"""An inventory of the machine: packages, a CUDA compiler, sources to build, tests that can be imported."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..records.environment import REPOSITORY

NATIVE_SUFFIXES = {".cpp", ".cu"}
TEST_FOLDERS = ("tests/ops", "tests/hia")
OWN = ("bench", "hia", "hia_kernels", "tests")


def cuda_devices() -> list[str]:
    """List the names of the CUDA devices that torch sees."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def cuda_target() -> str | None:
    """Name the first device as recorded launches do; None where there is none, or of another kind."""
    import torch

    from ..launches.device import target_of

    return target_of(torch.cuda.get_device_capability(0)) if torch.cuda.is_available() else None


def missing(packages: Iterable[str]) -> list[str]:
    """List those that can't be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def find_nvcc() -> str | None:
    """Find the CUDA compiler where torch would look for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    beside = Path(home) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(beside) if beside.exists() else None)


def native_sources(root: Path = REPOSITORY) -> list[Path]:
    """List the C++ and CUDA sources of the native extension."""
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in NATIVE_SUFFIXES)


def build_skipped(nvcc: str | None, sources: Sequence[Path]) -> str | None:
    """Say why there is nothing to build; None if there is."""
    if not sources:
        return "csrc/ holds no .cpp or .cu source"
    if nvcc is None:
        return "no nvcc: neither on PATH nor below CUDA_HOME or /usr/local/cuda"
    return None if importlib.util.find_spec("setuptools") else "setuptools is not installed"


def unimportable_tests(root: Path = REPOSITORY, lacking: Callable[[Iterable[str]], list[str]] = missing) -> list[str]:
    """List the test files that import a package that isn't here, by themselves or through another file of the tests."""
    found = []
    for folder in TEST_FOLDERS:
        for path in sorted((root / folder).glob("test_*.py")):
            packages = sorted(_packages(path, root, set()) - {*OWN, *sys.stdlib_module_names})
            if lacking(packages):
                found.append(path.relative_to(root).as_posix())
    return found


def _packages(path: Path, root: Path, seen: set[Path]) -> set[str]:
    """List what a file of the tests imports on import."""
    seen.add(path)
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(root).parts[: -node.level] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names.update((base, *(f"{base}.{alias.name}" for alias in node.names)))
    found = {name.partition(".")[0] for name in names}
    for name in names:
        other = root.joinpath(*name.split(".")).with_suffix(".py")
        if name.startswith("tests.") and other.exists() and other not in seen:
            found |= _packages(other, root, seen)
    return found
