"""The optional native extension; everything else about the package is in pyproject.toml.

Nothing is built unless csrc/ holds sources and the caller asks: `python setup.py build_ext --inplace`, or
HIA_BUILD_NATIVE=1 while installing. torch is imported only then, never to work out what installing requires.
"""

import os
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NAME = "hia_kernels._native"
STABLE_ABI = "0x020a000000000000"  # torch 2.10's: the extension runs with any later torch
ASKED_BY_COMMAND = "build_ext" in sys.argv[1:]
ASKED_BY_VARIABLE = os.environ.get("HIA_BUILD_NATIVE") == "1"


def native_sources() -> list[str]:
    """Every C++ and CUDA source below csrc/, relative to the root, as setuptools wants them."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c*") if is_source(path))


def is_source(path: Path) -> bool:
    return path.suffix in {".cpp", ".cu"}


def torch_extension_tools():
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(
            f"hia-kernels: the native extension needs torch >= 2.10 in {sys.executable}, got: {error}; "
            "install torch first, then run `python setup.py build_ext --inplace` or "
            "`HIA_BUILD_NATIVE=1 pip install --no-build-isolation -e .`"
        ) from error
    return cpp_extension


class NativeBuild(build_ext):
    """Hands the sources to torch's own build command, which knows nvcc and the include paths."""

    def run(self) -> None:
        if not self.extensions:
            if ASKED_BY_COMMAND:
                self.announce("hia-kernels: csrc/ holds no .cpp or .cu source, there is nothing to build", level=2)
            return
        try:
            self._build()
        except Exception as error:
            if ASKED_BY_COMMAND:
                raise
            # the package works without the extension, so an install goes on without it
            self.extensions = self.distribution.ext_modules = []
            warnings.warn(f"hia-kernels: native extension not built: {error}", stacklevel=2)

    def _build(self) -> None:
        tools = torch_extension_tools()
        has_nvcc = tools.CUDA_HOME is not None
        sources = [source for source in native_sources() if has_nvcc or not source.endswith(".cu")]
        make = tools.CUDAExtension if any(source.endswith(".cu") for source in sources) else tools.CppExtension
        extension = make(
            NAME,
            sources,
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden"], "nvcc": ["-O3"]},
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")),
            py_limited_api=True,  # it has no Python in it: torch loads it as a library of operators
        )
        self.distribution.ext_modules = [extension]

        build = tools.BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "force", "debug", "parallel"):
            setattr(build, option, getattr(self, option))
        build.ensure_finalized()
        build.run()


asked = ASKED_BY_COMMAND or ASKED_BY_VARIABLE
setup(
    license="Apache-2.0",
    ext_modules=[Extension(NAME, native_sources())] if asked and native_sources() else [],
    cmdclass={"build_ext": NativeBuild},
)
