"""A copy of the working tree whose csrc/ is compiled with sanitizers; the checkout's own extension stays as it is."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tests.faults.trees import EXTENSION, project_files

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "sanitize"
TREE, REPORTS = FOLDER / "tree", FOLDER / "reports"
BROKEN = FOLDER / "broken.so"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g")
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")  # the last so that C++ exceptions are intercepted
FILL = 255  # four bytes, or two, or eight, of it are a NaN
LARGEST_FILL = 2**30  # bytes


class CannotSanitize(RuntimeError):
    """There is no compiler with sanitizers, or something does not compile."""


def compiler() -> list[str]:
    """Return the C++ compiler that setuptools takes.

    Raises:
        CannotSanitize: it is missing, or can't link a program with the sanitizers.
    """
    found = shlex.split(os.environ.get("CXX") or "") or ["g++" if shutil.which("g++") else "c++"]
    if shutil.which(found[0]) is None:
        raise CannotSanitize(f"a C++ compiler is needed, got no {found[0]}; install g++, or name one with CXX=")
    with tempfile.TemporaryDirectory(prefix="hia-sanitize-") as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n", encoding="utf-8")
        command = [*found, *SANITIZERS, str(source), "-o", str(source.with_suffix(""))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not preloaded(found):
        raise CannotSanitize(
            f"{found[0]} must have AddressSanitizer and UndefinedBehaviorSanitizer as shared libraries, as GCC has: "
            f"libasan and libubsan; got: {done.stderr.strip()[-300:] or 'no ' + ', '.join(LIBRARIES)}"
        )
    return found


def preloaded(command: list[str]) -> list[str]:
    """Return the sanitizers' libraries, which must be loaded before Python; none if one is missing."""
    found = [
        subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in LIBRARIES
    ]
    return [str(Path(name).resolve()) for name in found] if all(Path(name).is_absolute() for name in found) else []


def copy_tree() -> None:
    """Bring the copy up to date: what did not change keeps its time, and is not compiled again."""
    wanted = [path for path in project_files(ROOT) if not path.match(EXTENSION)]
    kept = {TREE / path for path in wanted}
    for path in [path for path in TREE.rglob("*") if path.is_file() and path.suffix in (".py", ".cpp", ".h")]:
        if path not in kept and "build" not in path.relative_to(TREE).parts:
            path.unlink()
    for path in wanted:
        target = TREE / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists() or target.read_bytes() != (ROOT / path).read_bytes():
            shutil.copyfile(ROOT / path, target)


def environment() -> dict[str, str]:
    """Return the environment in which the copy is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIA_", "TRITON_INTERPRET"))}
    paths = [str(TREE), str(TREE / "python")]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def sanitized(command: list[str], reports: Path) -> dict[str, str]:
    """Return the environment in which a Python runs under the sanitizers.

    New memory is filled with bytes of which floats are NaN. Leaks are Python's and PyTorch's, which end without giving
    everything back.

    Args:
        command: of the compiler.
        reports: what their files' names begin with; the process's number follows.
    """
    libraries = preloaded(command)
    fill = f"max_malloc_fill_size={LARGEST_FILL}:malloc_fill_byte={FILL}:max_free_fill_size={LARGEST_FILL}"
    return {
        **environment(),
        "PYTHONPATH": os.pathsep.join([str(TREE / "tests" / "sanitize" / "start"), environment()["PYTHONPATH"]]),
        "LD_PRELOAD": " ".join(libraries),
        "UBSAN_LIBRARY": libraries[1],
        "UBSAN_REPORTS": str(reports),
        "ASAN_OPTIONS": f"detect_leaks=0:{fill}:free_fill_byte={FILL}:log_path={reports}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def compile_all(command: list[str]) -> None:
    """Compile the copy's csrc/, and the broken functions that are the control.

    Raises:
        CannotSanitize: something does not compile.
    """
    flags = " ".join(SANITIZERS)
    before = {**environment(), "CFLAGS": flags, "LDFLAGS": SANITIZERS[0]}
    _run([sys.executable, "setup.py", "build_ext", "--inplace"], before)
    if not list(TREE.glob(EXTENSION)):
        raise CannotSanitize(f"building csrc/ left no {EXTENSION} in {TREE}")
    from torch.utils import cpp_extension

    include = [f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
    standard = ["-std=c++20", "-O1", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    source = TREE / "tests" / "sanitize" / "broken.cpp"
    _run([*command, *SANITIZERS, *standard, *include, str(source), "-o", str(BROKEN), *libraries], environment())


def _run(command: list[str], variables: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=TREE, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise CannotSanitize(f"{shlex.join(command[:3])} ... must succeed, got: {(done.stdout + done.stderr)[-2000:]}")
