"""House rules that neither ruff nor import-linter checks: sizes, an op's parts, docstrings.

One test a rule, over every file there is; it lists all that break it. A new op or module is covered once it exists.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"hia_kernels": ROOT / "hia_kernels", "hia": ROOT / "python" / "hia", "bench": ROOT / "bench"}
OPS = sorted(path.parent.name for path in (ROOT / "hia_kernels" / "ops").glob("*/functional.py"))
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
    "hia_kernels/ops/{}/checks.py",
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

# A docstring says what a function does, or what a thing is. These words open half a sentence.
PREPOSITIONS = (
    "as at behind beside between by for from in inside into of on over since than through to under until with without"
)
QUESTIONS = "how if that what when where whether which while who whose why"
ALLOCATIONS = {
    f"torch.{name}"
    for name in ("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "linspace", "eye", "empty_strided")
}
OPENERS = {*PREPOSITIONS.split(" "), *QUESTIONS.split(" ")}


@dataclass(frozen=True)
class Source:
    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text, filename=str(self))))

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def docstrings(self) -> Iterator[tuple[int, str]]:
        """Yield line and text of the docstrings of the module, its classes and functions."""
        for node in self.nodes:
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield node.body[0].lineno, text


def sources(*folders: str) -> list[Source]:
    return [Source(path) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


LIBRARY = sources("hia_kernels", "python/hia")
EVERYTHING = [*LIBRARY, *sources("bench", "tests", "examples"), Source(ROOT / "setup.py")]


def assert_none(offenders: list[str], rule: str) -> None:
    if offenders:
        pytest.fail("\n  ".join([f"{rule}:", *offenders]), pytrace=False)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"} | environment
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_every_op_exists():
    assert_none(sorted(EXPECTED_OPS - set(OPS)), "hia_kernels/ops/ must have a folder with a functional.py for each op")


def test_every_op_has_every_part():
    paths = [pattern.format(op) for op in OPS for pattern in OP_PARTS]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert_none(missing, "an op must have every part under its name (see 'Add an op' in CONTRIBUTING.md)")


def test_the_folder_of_ops_holds_only_ops():
    folders = {path.parent.name for path in (ROOT / "hia_kernels" / "ops").glob("*/*.py")}
    assert_none(sorted(folders - set(OPS)), "a folder of hia_kernels/ops/ must be an op, with a functional.py")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_imports_and_prints_nothing(package):
    has_triton = importlib.util.find_spec("triton") is not None
    files = [path.relative_to(PACKAGES[package]) for path in sorted(PACKAGES[package].rglob("*.py"))]
    files = [path for path in files if path.stem != "__main__" and (has_triton or not path.stem.startswith("triton_"))]
    modules = [".".join([package, *path.with_suffix("").parts]).removesuffix(".__init__") for path in files]
    assert package in modules, f"{PACKAGES[package]} must be a package"
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


def test_files_are_short():
    files = {str(source): source.text for source in EVERYTHING}
    for path in (ROOT / "csrc").rglob("*.*"):
        files[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    lines = {name: len(text.splitlines()) for name, text in files.items()}
    assert any(name.startswith("csrc/") for name in lines)
    long = [f"{name}: {count} lines" for name, count in lines.items() if count >= MAX_FILE_LINES]
    assert_none(long, f"a file must stay under {MAX_FILE_LINES} lines")


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count from ``def`` to the last line, less the docstring: a contract may be as long as it needs."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


def test_functions_are_short():
    long = []
    for source in EVERYTHING:
        for function in source.functions():
            length, limit = lines_of_code(function), MAX_KERNEL_LINES if is_kernel(function) else MAX_FUNCTION_LINES
            if length >= limit:
                long.append(f"{source}:{function.lineno}: {function.name} has {length} lines, limit {limit}")
    assert_none(long, "a function must stay short")


def test_docstrings_do_not_open_in_the_middle_of_a_sentence():
    broken = [
        f"{source}:{line}: {text.splitlines()[0]}"
        for source in EVERYTHING
        for line, text in source.docstrings()
        if text.split()[0].rstrip(",:;.").lower() in OPENERS
    ]
    assert_none(broken, "a docstring must open with a verb, or with what the thing is")


def dtypeless(call: ast.Call) -> str | None:
    """Name what makes a tensor in the default dtype: PyTorch's function; None where a dtype is given."""
    name = ast.unparse(call.func)
    given = any(keyword.arg == "dtype" for keyword in call.keywords)
    return name if name in ALLOCATIONS and not given else None


def test_allocations_have_a_dtype():
    """Check that ``torch.set_default_dtype``, which a host's loader may have called, changes no buffer."""
    broken = [
        f"{source}:{node.lineno}: {name}"
        for source in LIBRARY
        for node in source.nodes
        if isinstance(node, ast.Call) and (name := dtypeless(node))
    ]
    assert_none(broken, "a new tensor must have a dtype of its own, not the process's default")


def unstated(call: ast.Call) -> str | None:
    """Name what a call of Triton leaves to a default that a variable or a version of Triton may change; or None."""
    given = {keyword.arg for keyword in call.keywords}
    if isinstance(call.func, ast.Subscript):  # kernel[grid](...)
        return None if "enable_fp_fusion" in given else "enable_fp_fusion of a launch"
    is_product = ast.unparse(call.func).startswith("tl.dot")
    return "input_precision of a product" if is_product and "input_precision" not in given else None


def test_kernels_state_their_arithmetic():
    """Check that no launch and no product takes its rounding from TRITON_DEFAULT_FP_FUSION, or TF32 by default."""
    files = [source for source in EVERYTHING if source.path.name.startswith("triton_")]
    calls = [(source, node) for source in files for node in source.nodes if isinstance(node, ast.Call)]
    launches = [node for _, node in calls if isinstance(node.func, ast.Subscript)]
    kernels = {ast.unparse(node.func.value) for node in launches}
    assert len(kernels) > 30 and all(name.endswith("_kernel") for name in kernels)
    broken = [f"{source}:{node.lineno}: {name}" for source, node in calls if (name := unstated(node))]
    assert_none(broken, "a kernel's arithmetic must be stated where it is launched, or multiplied")


@pytest.mark.parametrize(
    ("code", "left"),
    [
        ("_kernel[(1,)](x, num_warps=4)", "enable_fp_fusion of a launch"),
        ("_kernel[grid](**options)", "enable_fp_fusion of a launch"),
        ("_kernel[grid](x, **options, enable_fp_fusion=True)", None),
        ("tl.dot(a, b, acc)", "input_precision of a product"),
        ("tl.dot(a, b, acc, input_precision='ieee')", None),
        ("dot(a, b, acc)", None),
    ],
)
def test_what_a_call_leaves_to_defaults_is_found(code, left):
    call = ast.parse(code).body[0].value
    assert unstated(call) == left


def test_numpy_unpickles_nothing():
    loose = r"allow_pickle(?!\s*=\s*False\b)"
    broken = [f"{source}: {found}" for source in LIBRARY for found in re.findall(loose, source.text)]
    assert_none(broken, "allow_pickle must be False: only safetensors and JSON are loaded")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_named_in_the_docs_exist(page):
    assert (ROOT / page).exists(), f"{page} is missing"
    text = (ROOT / page).read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    named = {target for span in code for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", span)}
    missing = sorted(target for target in named if not re.search(rf"^{target}:", makefile, flags=re.MULTILINE))
    assert not missing, f"{page} names make targets that the Makefile lacks: {missing}"
