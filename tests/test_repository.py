"""The house rules that a machine can check: direction of imports, sizes of files and functions, layout, packaging.

Each rule looks at the files it finds, so a new op or module is covered the moment it exists.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"hia_kernels": ROOT / "hia_kernels", "hia": ROOT / "python" / "hia", "bench": ROOT / "bench"}
OPS = sorted(path.name for path in (ROOT / "hia_kernels" / "ops").glob("*") if (path / "functional.py").exists())
EXPECTED_OPS = {
    "stem",
    "conv_norm_act",
    "condition_queries",
    "cross_attention",
    "norm_linear",
    "inject_rows",
    "row_softmax",
    "latent_attention",
    "linear",
    "head_linear",
}

OP_PARTS = [
    "hia_kernels/ops/{}/functional.py",
    "hia_kernels/ops/{}/reference.py",
    "hia_kernels/ops/{}/inputs.py",
    "hia_kernels/ops/{}/library.py",
    "bench/workloads/{}.py",
    "tests/ops/test_{}.py",
    "docs/{}.md",
]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
MAX_PUBLIC_PARAMETERS = 8

# who may import whom: everything points one way, bench, tests -> hia -> hia_kernels
OWN = {"hia_kernels", "hia", "bench", "tests"}
MAY_IMPORT = {"hia_kernels": {"hia_kernels"}, "hia": {"hia", "hia_kernels"}, "bench": {"bench", "hia", "hia_kernels"}}
COMMAND_LINE_MODULES = {"hia_kernels.info", "hia.cli"}
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@dataclass(frozen=True)
class Import:
    module: str  # absolute, relative dots resolved
    line: int
    lazy: bool  # inside a function


@dataclass(frozen=True)
class Source:
    path: Path
    module: str  # "hia.hosts.llava"; "" for a file outside the packages

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self))

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    @cached_property
    def imports(self) -> list[Import]:
        lazy = {id(node) for function in self.functions() for node in ast.walk(function)}
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = self._names_imported_from(node)
            else:
                continue
            found += [Import(name, node.lineno, id(node) in lazy) for name in names]
        return found

    def _names_imported_from(self, node: ast.ImportFrom) -> list[str]:
        """``from . import library`` in ``a.b`` may mean the module ``a.library``: one entry per imported name."""
        base = node.module or ""
        if node.level:
            parts = self.module.split(".")
            drop = node.level - (1 if self.path.name == "__init__.py" else 0)
            base = ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])
        return [f"{base}.{alias.name}" for alias in node.names]

    def where(self, line: int) -> str:
        return f"{self}:{line}"


def package_sources(package: str) -> list[Source]:
    folder = PACKAGES[package]
    sources = []
    for path in sorted(folder.rglob("*.py")):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        sources.append(Source(path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return sources


KERNELS, ADAPTER, BENCH = (package_sources(name) for name in PACKAGES)
LIBRARY = KERNELS + ADAPTER
TESTS = [Source(path, "") for path in sorted((ROOT / "tests").rglob("*.py"))]
EVERYTHING = LIBRARY + BENCH + TESTS + [Source(ROOT / "setup.py", "")]


def each(sources: list[Source]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("source", [pytest.param(source, id=str(source)) for source in sources])


def within(module: str, *parents: str) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("package", PACKAGES)
def test_package_exists(package):
    assert (PACKAGES[package] / "__init__.py").exists(), f"package {package} is missing at {PACKAGES[package]}"


def test_every_op_exists():
    missing = EXPECTED_OPS - set(OPS)
    assert not missing, f"hia_kernels/ops/ has no folder with a functional.py for: {sorted(missing)}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("pattern", OP_PARTS)
def test_op_has_every_part(op, pattern):
    path = pattern.format(op)
    assert (ROOT / path).exists(), f"op {op} has no {path}; see 'Add an op' in CONTRIBUTING.md"


def test_ops_folder_holds_only_ops():
    folders = {path.parent.name for path in (ROOT / "hia_kernels" / "ops").glob("*/*.py")}
    assert folders == set(OPS), f"hia_kernels/ops/ has folders without functional.py: {sorted(folders - set(OPS))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_and_prints_nothing(package):
    has_triton = importlib.util.find_spec("triton") is not None
    modules = [
        source.module
        for source in package_sources(package)
        if not source.module.endswith("__main__") and (has_triton or not source.path.name.startswith("triton_"))
    ]
    assert modules, f"package {package} holds no module"
    done = run_python(f"import importlib\nfor name in {modules!r}: importlib.import_module(name)")
    assert done.returncode == 0, f"importing the modules of {package} failed:\n{done.stderr[-3000:]}"
    assert not done.stdout, f"importing the modules of {package} printed: {done.stdout[:500]!r}"


def test_hia_kernels_imports_without_triton_and_without_the_adapter():
    done = run_python(
        "import sys; sys.modules['triton'] = None; import hia_kernels; "
        "print([name for name in sys.modules if name in ('transformers', 'hia', 'bench') "
        "or name.startswith('hia_kernels.') and name.endswith('.inputs')])"
    )
    assert done.returncode == 0, f"`import hia_kernels` needs triton:\n{done.stderr[-3000:]}"
    assert done.stdout.strip() == "[]", f"`import hia_kernels` also imported {done.stdout.strip()}"


def test_info_runs_without_triton():
    done = run_python(
        "import runpy, sys; sys.modules['triton'] = None; sys.argv = ['hia_kernels.info']; "
        "runpy.run_module('hia_kernels.info', run_name='__main__')",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, f"`python -m hia_kernels.info` fails without triton:\n{done.stderr[-3000:]}"
    missing = [op for op in OPS if op not in done.stdout]
    assert not missing, f"`python -m hia_kernels.info` does not mention {missing}"


@each(LIBRARY + BENCH)
def test_imports_follow_the_direction(source):
    allowed = MAY_IMPORT[source.module.split(".")[0]]
    wrong = [i for i in source.imports if within(i.module, *OWN) and i.module.split(".")[0] not in allowed]
    assert not wrong, f"{source.where(wrong[0].line)}: imports {wrong[0].module}, may import only {sorted(allowed)}"


@each(KERNELS)
def test_kernels_import_only_torch_triton_and_the_standard_library(source):
    for found in source.imports:
        top = found.module.split(".")[0]
        known = top in sys.stdlib_module_names or top in {"torch", "triton", "hia_kernels"}
        assert known, f"{source.where(found.line)}: imports {found.module}; only torch, triton and the standard library"
        lazy = found.lazy or source.path.name.startswith("triton_")
        assert top != "triton" or lazy, f"{source.where(found.line)}: import triton inside the function that needs it"


@each([source for source in KERNELS if within(source.module, *(f"hia_kernels.ops.{op}" for op in OPS))])
def test_an_op_imports_only_core_and_itself(source):
    own = ".".join(source.module.split(".")[:3])
    for found in source.imports:
        fine = not within(found.module, "hia_kernels") or within(found.module, "hia_kernels.core", own)
        assert fine, (
            f"{source.where(found.line)}: imports {found.module}; an op imports only hia_kernels.core and itself"
        )


@each([source for source in KERNELS if within(source.module, "hia_kernels.core")])
def test_core_imports_no_op(source):
    for found in source.imports:
        fine = not within(found.module, "hia_kernels") or within(found.module, "hia_kernels.core")
        assert fine, f"{source.where(found.line)}: imports {found.module}; core knows no op"


@each([source for source in KERNELS if source.path.name == "reference.py"])
def test_reference_imports_only_torch(source):
    for found in source.imports:
        top = found.module.split(".")[0]
        fine = top == "torch" or top in sys.stdlib_module_names
        assert fine, (
            f"{source.where(found.line)}: imports {found.module}; a reference imports torch and nothing of ours"
        )


@each([source for source in KERNELS if source.path.name == "inputs.py"])
def test_inputs_import_only_torch_and_core(source):
    for found in source.imports:
        top = found.module.split(".")[0]
        fine = top == "torch" or top in sys.stdlib_module_names or within(found.module, "hia_kernels.core")
        assert fine, f"{source.where(found.line)}: imports {found.module}; inputs.py imports torch and core"


@each(ADAPTER)
def test_adapter_holds_no_kernel(source):
    for found in source.imports:
        assert not within(found.module, "triton"), (
            f"{source.where(found.line)}: imports triton; kernels are hia_kernels'"
        )
        inside = re.match(r"hia_kernels\.ops\.\w+\.(library|reference|inputs|triton_\w+)\b", found.module)
        assert not inside, f"{source.where(found.line)}: imports {found.module}; call the op through its functional.py"


def is_kernel(function: ast.AST) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_of_code(function: ast.FunctionDef) -> int:
    """From ``def`` to the last line, less the docstring: a contract may be as long as it needs."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


@each(EVERYTHING)
def test_sizes(source):
    lines = len(source.text.splitlines())
    assert lines < MAX_FILE_LINES, f"{source}: {lines} lines, must stay under {MAX_FILE_LINES}"
    for function in source.functions():
        limit = MAX_KERNEL_LINES if is_kernel(function) else MAX_FUNCTION_LINES
        length = lines_of_code(function)
        assert length < limit, f"{source.where(function.lineno)}: {function.name} has {length} lines, limit {limit}"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_native_file_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines < MAX_FILE_LINES, f"{path.relative_to(ROOT)}: {lines} lines, must stay under {MAX_FILE_LINES}"


@each([source for source in KERNELS if source.path.name == "functional.py"])
def test_public_signatures_stay_short(source):
    for function in source.tree.body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            arguments = function.args
            count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
            where = source.where(function.lineno)
            limit = MAX_PUBLIC_PARAMETERS
            assert count <= limit, f"{where}: {function.name} has {count} parameters, at most {limit}"


@each([source for source in LIBRARY if source.module not in COMMAND_LINE_MODULES])
def test_library_code_does_not_print(source):
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            excused = "noqa: T201" in lines[node.lineno - 1]
            assert excused, f"{source.where(node.lineno)}: print( in library code; log, warn, or return the text"


@each(LIBRARY)
def test_nothing_is_unpickled(source):
    for found in source.imports:
        bad = found.module.split(".")[0] in UNPICKLERS or found.module == "torch.load"
        assert not bad, f"{source.where(found.line)}: imports {found.module}; only safetensors and JSON are loaded"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.jit.load"}:
            pytest.fail(f"{source.where(node.lineno)}: {ast.unparse(node)}; only safetensors and JSON are loaded")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            value = getattr(node.value, "value", None)
            assert value is False, f"{source.where(node.value.lineno)}: allow_pickle must be False"


@each([source for source in LIBRARY if source.path.name == "functional.py"])
def test_functional_does_not_assert(source):
    asserts = [node.lineno for node in ast.walk(source.tree) if isinstance(node, ast.Assert)]
    assert not asserts, f"{source.where(asserts[0])}: assert on user input; raise an error that names the argument"


@each(KERNELS)
def test_no_block_pointers(source):
    assert "make_block_ptr" not in source.text, f"{source}: make_block_ptr; use pointers and masks"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_setup_imports_torch_only_when_building():
    source = Source(ROOT / "setup.py", "")
    early = [found for found in source.imports if within(found.module, "torch") and not found.lazy]
    assert not early, f"setup.py:{early[0].line}: imports torch at module level"
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
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt: no pin of {requirement.name} for Python {python_version}"
        fits = requirement.specifier.contains(version)
        assert fits, f"constraints.txt: {requirement.name}=={version} is outside pyproject.toml's {requirement}"


def test_one_version_everywhere():
    version = project()["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), f"CHANGELOG.md lacks {version}"
    for package in PACKAGES:
        text = (PACKAGES[package] / "__init__.py").read_text(encoding="utf-8")
        for stated in re.findall(r'^__version__ = "(.+)"', text, flags=re.MULTILINE):
            assert stated == version, f"{package}/__init__.py: __version__ is {stated}, pyproject.toml says {version}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_named_in_the_docs_exist(page):
    assert (ROOT / page).exists(), f"{page} is missing"
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    named = {target for span in code for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", span)}
    missing = sorted(target for target in named if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE))
    assert not missing, f"{page} names make targets that the Makefile lacks: {missing}"
