"""Tests of what `pip install` gives: metadata, wheels, the source distribution, imports with little installed."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

from hia_kernels.core import native

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"hia_kernels": ROOT / "hia_kernels", "hia": ROOT / "python" / "hia"}
NEEDS_BUILD = pytest.mark.skipif(find_spec("build") is None, reason="NO BUILD: the package build is not installed")
TINY_EXTENSION = 'extern "C" int answer() { return 42; }\n'


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_setup_imports_torch_only_when_building():
    early = re.findall(r"^(?:import|from) torch\b.*", (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert not early, f"setup.py: imports torch at module level: {early}"
    requires = project()["build-system"]["requires"]
    names = [Requirement(text).name for text in requires]
    assert names == ["setuptools"], f"pyproject.toml: build-system.requires must be setuptools only, got {requires}"


def test_constraints_are_exact():
    loose = [str(pin) for pin in pins() if not re.fullmatch(r"==[\w.]+", str(pin.specifier))]
    assert not loose, f"constraints.txt: must be NAME==VERSION, got {loose}"


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_within_its_range(python_version):
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    pinned = {
        canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
        for pin in pins()
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    metadata = project()["project"]
    extras = metadata["optional-dependencies"]
    wanted = metadata["dependencies"] + [text for name in extras if name != "triton" for text in extras[name]]
    for requirement in map(Requirement, wanted):
        if requirement.name == metadata["name"]:  # an extra that contains others
            assert requirement.extras <= set(extras), f"pyproject.toml: {requirement} names an extra that is not there"
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt: no pin of {requirement.name} for Python {python_version}"
        fits = requirement.specifier.contains(version)
        assert fits, f"constraints.txt: {requirement.name}=={version} is outside pyproject.toml's {requirement}"


def test_one_version_everywhere():
    version = project()["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), f"CHANGELOG.md lacks {version}"
    for package, folder in PACKAGES.items():
        stated = re.findall(
            r'^__version__ = "(.+)"', (folder / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
        )
        assert stated == [version], f"{package}/__init__.py: __version__ is {stated}, pyproject.toml says {version}"


def test_setup_and_metadata_name_one_repository():
    stated = re.search(r'^REPOSITORY = "(.+?)"', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert stated and stated[1] == project()["project"]["urls"]["Repository"]


# ---- imports


def without(modules: list[str], code: str) -> subprocess.CompletedProcess:
    """Run Python code where the modules can't be imported, found or not."""
    block = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"{block}\n{code}"]
    return subprocess.run(command, env=environment, cwd=ROOT.parent, capture_output=True, text=True)


def test_hia_kernels_runs_with_torch_alone():
    others = ["numpy", "transformers", "safetensors", "PIL", "triton", "pydicom", "peft", "rich", "typer", "matplotlib"]
    done = without(
        others,
        "import torch, hia_kernels as hk, hia_kernels.info, hia_kernels.testing\n"
        "x, w = torch.randn(40, 16, requires_grad=True), torch.randn(8, 16)\n"
        "hk.linear(x, w).sum().backward()\n"
        "hk.conv_norm_act(torch.randn(1, 9, 9, 16), torch.randn(16, 16, 3, 3), torch.ones(16), torch.zeros(16))\n"
        "hia_kernels.info.main([])",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "transformers  not installed" in done.stdout or "transformers  broken" in done.stdout


@pytest.mark.parametrize("module", ["transformers", "safetensors", "numpy", "PIL"])
def test_hia_names_the_extra_that_is_missing(module):
    done = without([module], "import hia")
    last = done.stderr.strip().splitlines()[-1]
    package = "pillow" if module == "PIL" else module
    assert done.returncode == 1
    assert last.startswith("ModuleNotFoundError: hia needs") and "pip install 'hia-kernels[hia]'" in last
    assert f"without {package};" in last


# ---- what is built


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Copy what git would have, or what the source distribution has, and a library that lies about beside it."""
    copy = tmp_path_factory.mktemp("tree") / "hia-kernels"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "out", "*.egg-info", "__pycache__", ".*_cache", "*.so"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / "hia_kernels" / "_native.abi3.so").write_text("left from another build")
    return copy


def build(tree: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: text for name, text in os.environ.items() if name not in ("HIA_BUILD_NATIVE", "PYTHONPATH")}
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "."]
    return subprocess.run(command, cwd=tree, env={**environment, **variables}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory) -> Path:
    """Build the source distribution, and from it the wheel."""
    out = tmp_path_factory.mktemp("dist")
    done = build(tree, "--outdir", str(out))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return out


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode("utf-8"))


@NEEDS_BUILD
def test_the_wheel_is_python_alone_and_typed(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"hia_kernels/py.typed", "hia/py.typed"} <= names
    assert "hia_kernels/core/tuned/nvidia-h100-80gb-hbm3.json" in names, "what was measured is for users, too"
    assert not [name for name in names if name.endswith((".so", ".cpp")) or name.startswith(("bench/", "tests/"))]
    modules = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*.py")
    }
    assert modules <= names, f"the wheel lacks {sorted(modules - names)}"


@NEEDS_BUILD
def test_installing_needs_torch_alone(built):
    (wheel,) = built.glob("*.whl")
    metadata = metadata_of(wheel)
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    plain = [requirement.name for requirement in needed if requirement.marker is None]
    assert plain == ["torch"]
    with_hia = {one.name for one in needed if one.marker is not None and one.marker.evaluate({"extra": "hia"})}
    assert with_hia == {"transformers", "safetensors", "numpy", "pillow"}
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Keywords"] and metadata["Author"]


@NEEDS_BUILD
def test_links_of_the_page_on_pypi_are_absolute(built):
    (wheel,) = built.glob("*.whl")
    page = metadata_of(wheel).get_payload()
    links = re.findall(r"\]\(([^()\s]+)\)|\bsrc=\"([^\"]+)\"", page)
    targets = [target for pair in links for target in pair if target]
    assert len(targets) > 10
    relative = [target for target in targets if not target.startswith(("https://", "#"))]
    assert not relative, f"README.md's links must be absolute on PyPI, got {relative}"
    repository = project()["project"]["urls"]["Repository"]
    for kind, path in re.findall(rf"{repository}/(blob|raw)/main/([^)\s\"#]+)", page):
        assert (ROOT / path).exists(), f"README.md links {path}, which is not there"
        assert (kind == "raw") == path.endswith((".png", ".svg")), f"{path} must be linked as it is shown"


@NEEDS_BUILD
def test_the_source_distribution_holds_what_its_tests_need(tree, built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    files = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    made = re.compile(r"(^|/)(\.|build/|[^/]*\.egg-info/)|\.(so|py[cod])$")
    missing = sorted(name for name in files - names if not made.search(name))
    assert not missing, f"MANIFEST.in leaves out {missing[:20]}"
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@NEEDS_BUILD
def test_a_native_wheel_serves_every_python(tree, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("NO COMPILER: no wheel with native kernels is built")
    small = tmp_path / "small"
    shutil.copytree(tree, small, ignore=shutil.ignore_patterns("csrc", "tests", "bench", "docs", "*.egg-info"))
    (small / "csrc").mkdir()
    (small / "csrc" / "registration.cpp").write_text(TINY_EXTENSION)
    done = build(small, "--wheel", "--outdir", str(tmp_path), HIA_BUILD_NATIVE="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    *_, tags = parse_wheel_filename(wheel.name)
    (tag,) = tags
    for version in ((3, 10), (3, 11), (3, 12), (3, 13)):
        assert tag in set(cpython_tags(version, platforms=[tag.platform])), f"{wheel.name} is not for Python {version}"
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if name.endswith(".so")]
        assert library == "hia_kernels/_native.abi3.so"
        assert archive.read(library)[:4] == b"\x7fELF" or sys.platform != "linux"


def test_the_native_library_holds_no_python():
    found = native.library()
    if found is None:
        pytest.skip("NO NATIVE LIBRARY: csrc/ is not compiled")
    names = re.findall(rb"\0(_?Py[A-Z_]\w+)", found.read_bytes())
    assert not names, f"{found.name} serves one Python alone: it uses {sorted(set(names))[:5]}"


@NEEDS_BUILD
def test_a_native_build_without_sources_is_an_error(tree, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(tree, small, ignore=shutil.ignore_patterns("csrc", "tests", "bench", "docs", "*.egg-info"))
    done = build(small, "--wheel", "--outdir", str(tmp_path), HIA_BUILD_NATIVE="1")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "csrc must hold .cpp sources" in done.stdout + done.stderr


@NEEDS_BUILD
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("1", "the native extension needs torch >= 2.10"),
        ("yes please", "HIA_BUILD_NATIVE must be 1 or 0, got 'yes please'"),
    ],
)
def test_native_kernels_that_were_asked_for_and_fail_are_an_error(tree, tmp_path, asked, message):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    done = build(tree, "--wheel", "--outdir", str(tmp_path), HIA_BUILD_NATIVE=asked, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


@NEEDS_BUILD
def test_sources_that_do_not_compile_are_an_error(tree, tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("NO COMPILER: nothing is compiled")
    small = tmp_path / "small"
    shutil.copytree(tree, small, ignore=shutil.ignore_patterns("csrc", "tests", "bench", "docs", "*.egg-info"))
    (small / "csrc").mkdir()
    (small / "csrc" / "registration.cpp").write_text("this is no C++\n")
    done = build(small, "--wheel", "--outdir", str(tmp_path), HIA_BUILD_NATIVE="1")
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
