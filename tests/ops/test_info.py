"""``python -m hia_kernels.info``."""

import json
import subprocess
import sys

import pytest
import torch

import hia_kernels
from hia_kernels import info
from hia_kernels.core import backend

OPS = [
    "condition_queries",
    "conv_norm_act",
    "cross_attention",
    "head_linear",
    "inject_rows",
    "latent_attention",
    "linear",
    "norm_linear",
    "row_softmax",
    "stem",
]


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write packages that can be imported for the length of the test."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


def test_report_names_every_op_and_backend(monkeypatch):
    monkeypatch.setenv("HIA_BACKEND", "reference")
    for name in ("HIA_DEBUG", "HIA_CPU_ISA", "HIA_TUNED"):
        monkeypatch.delenv(name, raising=False)
    report = info.collect()
    assert list(report["ops"]) == OPS
    for reasons in report["ops"].values():
        assert reasons["reference"] == []
    assert {op: list(reasons) for op, reasons in report["ops"].items()} == {
        op: [row.name for row in table.backends] for op, table in backend.TABLES.items()
    }
    assert list(report["ops"]["stem"]) == ["triton", "native", "cpu", "reference"]
    assert report["ops"]["norm_linear"]["cublas"] == report["ops"]["norm_linear"]["triton"]
    assert report["ops"]["inject_rows"]["cublas"] == report["ops"]["inject_rows"]["triton"]
    if not torch.backends.cudnn.is_available():
        assert "this build of torch has no cuDNN" in report["ops"]["conv_norm_act"]["cudnn"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["hia-kernels"] == hia_kernels.__version__
    assert report["devices"]["cpu"]["threads"] == torch.get_num_threads()
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()
    assert report["environment"] == {
        "HIA_BACKEND": "reference",
        "HIA_DEBUG": None,
        "HIA_TUNED": None,
        "HIA_CPU_ISA": None,
        "in force": "backend reference, debug off, CPU ISA the best there is",
    }


def test_what_forcing_a_backend_means(monkeypatch):
    """List, for every name that a row has, the ops that obey and those that run auto."""
    found = info.collect()["forcing"]
    assert list(found) == list(backend.backend_names()[1:])
    for name, ops in found.items():
        assert sorted(ops["forced"] + ops["auto"]) == OPS
        assert ops["forced"] == [op for op in OPS if backend.TABLES[op].row(name)]
    assert found["reference"] == {"forced": OPS, "auto": [], "backward by auto": []}
    assert "row_softmax" in found["cpu"]["auto"] and "stem" in found["native"]["backward by auto"]
    lines = info._text(info.collect()).splitlines()
    assert "  reference     every op has it" in lines
    (line,) = (line for line in lines if line.startswith("  cpu           auto: "))
    assert line.endswith("row_softmax")
    monkeypatch.setenv("HIA_BACKEND", " CPU")
    assert info._in_force().startswith(f"backend cpu ({', '.join(found['cpu']['auto'])}: auto), debug off")


def test_reasons_come_from_the_table(monkeypatch):
    def broken_probe():
        raise OSError("no such library")

    rows = [
        backend.Backend("cuda", {}, unavailable_reasons=lambda: ["no CUDA device", "not compiled"]),
        backend.Backend("cpu", {}, unavailable_reasons=broken_probe),
        backend.Backend("reference", {}),
    ]
    reasons = info.op_backends(backend.BackendTable("stem", rows))
    assert reasons["cuda"] == ["no CUDA device", "not compiled"]
    assert reasons["cpu"] == ["broken: OSError: no such library"]
    assert reasons["reference"] == []
    monkeypatch.setitem(backend.TABLES, "stem", backend.BackendTable("stem", rows))
    assert "  cuda          no: no CUDA device; not compiled\n" in info._text(info.collect())


def test_a_broken_package_is_a_line(packages, monkeypatch):
    packages("flash_attn", "raise ImportError('undefined symbol: _ZN3c10\\nand more')")
    packages("xformers", "import surely_not_installed")
    packages("triton", "__version__ = '9.9'")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    versions = info.versions()
    assert versions["flash-attn"] == "broken: ImportError: undefined symbol: _ZN3c10"
    assert versions["xformers"] == "broken: ModuleNotFoundError: No module named 'surely_not_installed'"
    assert versions["triton"] == "9.9"
    assert versions["transformers"] == "not installed"


def test_an_unknown_backend_in_the_environment_is_a_line(monkeypatch):
    monkeypatch.setenv("HIA_BACKEND", "mps")
    report = info.collect()
    assert report["environment"]["HIA_BACKEND"] == "mps"
    assert report["environment"]["in force"].startswith("broken: ValueError: HIA_BACKEND must be one of auto, ")


def test_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(info, "__file__", str(tmp_path / "hia_kernels" / "info.py"))
    assert info.commit() is None
    (tmp_path / ".git").mkdir()  # a repository that git can't read
    assert info.commit() is None


def test_gpus_are_listed(monkeypatch):
    class Properties:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    report = info.collect()
    assert report["devices"]["cuda"] == [{"name": "Some GPU", "memory_gib": 80.0, "capability": "9.0"}]
    assert "cuda:0        Some GPU, 80.0 GiB, sm 9.0" in info._text(report)


def test_json_is_the_report(capsys):
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


# Whatever imports Triton meets an ImportError, as on a machine without it; no compiler is on the path.
WITHOUT_TRITON = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, hia_kernels
from hia_kernels import info
info.main([])
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
x = torch.ones(3, 16)
hia_kernels.norm_linear(x, x[0], x[0], x)
"""


def test_runs_without_triton_gpu_and_compiler(tmp_path):
    environment = {"PATH": str(tmp_path), "PYTHONPATH": ":".join(path for path in sys.path if path)}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIA_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "  triton        not installed\n" in done.stdout
    assert "  cuda          no device\n" in done.stdout
    available = [line for line in done.stdout.splitlines() if line.endswith(" available")]
    assert len(available) == len(OPS) and all("reference" in line for line in available)
