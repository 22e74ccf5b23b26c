"""Loading the package again: an error that says what to do, and ops that go on as they were."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hia_kernels.core import native
from tests.inputs import OPS

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    *(f"hia_kernels.core.{name}" for name in ("backend", "call", "native", "registration", "transforms")),
    *(f"hia_kernels.ops.{op}.library" for op in OPS),
]
USE = """
import torch

def use():
    x, w = torch.randn(40, 1024, requires_grad=True), torch.randn(512, 1024, requires_grad=True)
    for name in ("auto", "reference"):
        with hia_kernels.use_backend(name):
            out = hia_kernels.linear(x, w)
        torch.testing.assert_close(out, x @ w.T, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], w.sum(0).expand(40, -1), rtol=1e-4, atol=1e-3)
    return hia_kernels.last_backend("linear")

def refused(function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as error:
        message = str(error)
        assert "must be loaded once in a process, got a second time" in message, message
        assert "start a new process" in message
        return message
    raise AssertionError("no error")
"""


def run(script, **environment):
    paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIA_", "PYTEST", "TRITON"))}
    command = [sys.executable, "-W", "error", "-c", script]
    environment = kept | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_no_module_registers_a_second_time_and_every_op_goes_on():
    printed = run(f"""
import importlib
import hia_kernels
from hia_kernels.core import backend
{USE}
use()
rows, kept = hia_kernels.core.backend.backend_names(), dict(backend.TABLES)
for name in {MODULES}:
    module = importlib.import_module(name)
    before = dict(vars(module))
    message = refused(importlib.reload, module)
    assert ("hia::" if "library" in name else name) in message, message
    changed = [key for key, value in before.items() if not key.startswith("__") and vars(module)[key] != value]
    assert not changed, (name, changed)
assert backend.TABLES == kept and backend.backend_names() == rows
importlib.reload(hia_kernels)
use()
print("done")
""")
    assert printed.strip() == "done"  # no warning either: PyTorch prints one where a kernel takes another's place


def test_an_import_after_sys_modules_was_emptied_is_refused():
    printed = run(f"""
import importlib, sys
import hia_kernels
{USE}
use()
for name in [name for name in sys.modules if name.partition(".")[0] == "hia_kernels"]:
    del sys.modules[name]
assert "hia_native::revision" in refused(importlib.import_module, "hia_kernels")
use()
print("done")
""")
    assert printed.strip() == "done"


@pytest.fixture
def copy(tmp_path):
    """Return another file with the extension's kernels."""
    if native.library() is None:
        pytest.skip("NO NATIVE EXTENSION: a second copy of it is not tested")
    return shutil.copy(native.library(), tmp_path / "_native_copy.so")


def test_a_copy_of_the_extension_is_loaded_once(copy):
    printed = run(f"""
import torch
torch.ops.load_library({str(copy)!r})
import hia_kernels
from hia_kernels.core import native
{USE}
assert native.unavailable_reasons() == ()
use()
assert torch.ops.loaded_libraries == {{{str(copy)!r}}}
print("done")
""")
    assert printed.strip() == "done"


def test_a_copy_of_another_revision_is_not_used(copy):
    run(f"""
import torch
torch.ops.load_library({str(copy)!r})
import hia_kernels
from hia_kernels.core import native
{USE}
loaded, native.REVISION = native.REVISION, 0
assert native.unavailable_reasons() == (
    f"this process has loaded an extension of revision {{loaded}}, not 0: load none by hand",
)
assert use() != "native"
""")
