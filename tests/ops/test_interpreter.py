"""Triton's interpreter as a user starts it: ``HIA_BACKEND=triton TRITON_INTERPRET=1 python ...``, without pytest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hia_kernels.core import backend

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, warnings
from functools import partial
import hia_kernels, torch
from hia_kernels import testing
from hia_kernels.core import backend
from tests.inputs import differentiable, small_inputs
from tests.ops.test_routes import reference

warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of masked elements
served = {}
for op in backend.TABLES:
    inputs = small_inputs(op, torch.float32)
    expected = testing.expect(partial(reference, op), inputs, differentiable(op), dtype=torch.float32)
    expected.check(testing.forward_backward(getattr(hia_kernels, op), inputs, differentiable(op)))
    served[op] = hia_kernels.last_backend(op)

hidden, update, weight = torch.zeros(9, 16), torch.randn(3, 8), torch.randn(16, 8)
rows = torch.tensor([7, 0, 4])
expected = hia_kernels.inject_rows(hidden, update, weight, None, rows)
assert torch.equal(hia_kernels.inject_rows_(hidden, update, weight, None, rows), expected)
scores = torch.randn(5, 40)
expected = hia_kernels.row_softmax(scores, 0.5)[0]
hia_kernels.row_softmax_(scores, 0.5)
assert torch.equal(scores, expected)
print(json.dumps(served))
"""


@pytest.fixture
def run():
    """Return a function that runs a script as a user does, and returns what it prints."""
    pytest.importorskip("triton", reason="NO TRITON: its kernels are not tested")

    def python(script):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HIA_", "PYTEST"))}
        paths = os.pathsep.join((str(ROOT), str(ROOT / "python")))
        chosen = {"PYTHONPATH": paths, "HIA_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", script]
        done = subprocess.run(
            command, cwd=ROOT, env=kept | chosen, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return python


def test_every_op_runs_forward_and_backward_outside_pytest(run):
    served = json.loads(run(SCRIPT).splitlines()[-1])
    assert set(served) == set(backend.TABLES)
    for op, name in served.items():
        assert (name == "triton") == (backend.TABLES[op].row("triton") is not None), op


def test_without_the_interpreter_triton_is_left_as_it_is(run):
    run(
        "import os; os.environ['TRITON_INTERPRET'] = '0'\n"
        "from triton.runtime import interpreter\n"
        "from hia_kernels.core import triton_support\n"
        "before = interpreter._patch_lang_tensor\n"
        "triton_support.load('hia_kernels.ops.linear')\n"
        "assert interpreter._patch_lang_tensor is before\n"
        "os.environ['TRITON_INTERPRET'] = '1'\n"
        "triton_support.load('hia_kernels.ops.linear')\n"
        "assert interpreter._patch_lang_tensor is not before\n"
    )


def test_a_triton_that_is_mended_is_left_as_it_is(run):
    run(
        "import triton; triton.__version__ = '3.7.0+local'\n"
        "from triton.runtime import interpreter\n"
        "from hia_kernels.core import triton_interpreter\n"
        "before = interpreter._patch_lang_tensor\n"
        "triton_interpreter.repair()\n"
        "assert interpreter._patch_lang_tensor is before\n"
    )
