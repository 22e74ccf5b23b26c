"""The optional native extension and PyPI's page; everything else about the package is in pyproject.toml.

Nothing is compiled unless the caller asks: `python setup.py build_ext --inplace`, or HIA_BUILD_NATIVE=1 while
installing or building a wheel; what is asked for and fails is an error. torch is imported only then, never to work out
what installing requires.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REPOSITORY = "https://github.com/hia-kernels/hia-kernels"  # as pyproject.toml's [project.urls]
NAME = "hia_kernels._native"
STABLE_ABI = "0x020a000000000000"  # torch 2.10's: the extension runs with any later torch
PYTHON_ABI = "cp310"  # there is no Python in the extension: one wheel serves 3.10 and every later version
ASKED_BY_COMMAND = "build_ext" in sys.argv[1:]
YES, NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def asked_by_variable() -> bool:
    """Tell whether HIA_BUILD_NATIVE asks for the extension."""
    value = os.environ.get("HIA_BUILD_NATIVE", "")
    if value.strip().lower() not in YES + NO:
        raise SystemExit(f"hia-kernels: HIA_BUILD_NATIVE must be 1 or 0, got {value!r}")
    return value.strip().lower() in YES


def native_sources() -> list[str]:
    """List the extension's C++ sources, relative to the root, as setuptools wants them.

    CUDA sources are no part of it: torch's CUDAExtension links libraries that a CPU build of torch lacks.
    """
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cpp"))


def page_for_pypi() -> str:
    """Return README.md with absolute links: PyPI shows the page, and knows no file of the repository."""

    def absolute(match: re.Match) -> str:
        opening, is_image, target = match[0][: match.start("target") - match.start()], match["image"], match["target"]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{opening}{REPOSITORY}/{'raw' if is_image else 'blob'}/main/{target.removeprefix('./')})"

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r'(<img\b[^>]*\bsrc=")(?![a-z]+:)(?:\./)?', rf"\1{REPOSITORY}/raw/main/", text)
    return re.sub(r"(?P<image>!?)\[[^\[\]]*\]\((?P<target>[^()\s]+)\)", absolute, text)


def torch_extension_tools():
    """Import torch's build tools.

    Raises:
        SystemExit: torch is not installed where the build runs.
    """
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"hia-kernels: the native extension needs torch >= 2.10 in {sys.executable}, got: {error}; pip builds in "
            "an environment of its own unless told otherwise: install torch and setuptools, then run "
            "`HIA_BUILD_NATIVE=1 pip install --no-build-isolation ...`, or in a checkout "
            "`python setup.py build_ext --inplace`"
        ) from error
    return cpp_extension


class NativeBuild(build_ext):
    """Hand the sources to torch's own build command, which knows the compiler's flags and the include paths."""

    def run(self) -> None:
        if not self.extensions:
            return
        tools = torch_extension_tools()
        extension = tools.CppExtension(
            NAME,
            native_sources(),
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden"]},
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")),
            py_limited_api=True,  # it has no Python in it: torch loads it as a library of operators
        )
        self.distribution.ext_modules = [extension]

        build = tools.BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "force", "debug", "parallel"):
            setattr(build, option, getattr(self, option))
        build.ensure_finalized()
        build.run()


native = ASKED_BY_COMMAND or asked_by_variable()
if native and not native_sources():
    raise SystemExit(f"hia-kernels: the native extension is asked for, but {ROOT / 'csrc'} must hold .cpp sources")
setup(
    license_expression="Apache-2.0",  # here: setuptools before 77 refuses it in pyproject.toml
    license_files=["LICENSE"],
    long_description=page_for_pypi(),
    long_description_content_type="text/markdown",
    ext_modules=[Extension(NAME, native_sources())] if native else [],
    cmdclass={"build_ext": NativeBuild},
    options={"bdist_wheel": {"py_limited_api": PYTHON_ABI}} if native else {},
)
