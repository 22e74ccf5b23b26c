"""Results on disk, the page that shows them, and the command."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest

from bench.__main__ import main as bench
from bench.launches import compile as compiler
from bench.launches import document
from bench.launches.compile import Resources, compile_all, key_of, store, stored
from bench.launches.device import TARGETS
from bench.launches.workloads import record
from hia_kernels.core import triton_support

pytest.importorskip("triton", reason="NO TRITON: the compile tier is not tested")
pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(triton_support.interpreted(), reason="the interpreter tier runs in this process"),
]
FOUND = Resources(40, 0, 1024, ("wgmma",), (1, 0), False, 3)


@pytest.fixture(scope="module")
def launches():
    return list(record(TARGETS["sm_90"], ["row_softmax"]).launches)


@pytest.fixture
def compiled(monkeypatch):
    """Replace the compiler; return the list of what it is asked for."""
    asked = []

    def instead(items, jobs):
        asked.extend(items)
        return [(item, FOUND) for item in items]

    monkeypatch.setattr(compiler, "_compiled", instead)
    return asked


def test_a_result_is_kept(tmp_path, launches, compiled):
    items = [(launch, "sm_90") for launch in launches]
    assert compile_all([*items, *items], folder=tmp_path) == dict.fromkeys(items, FOUND)
    assert compiled == items
    assert compile_all(items, folder=tmp_path) == dict.fromkeys(items, FOUND)
    assert compiled == items, "compiled again"
    compile_all(items[:1], folder=tmp_path, fresh=True)
    assert compiled == [*items, items[0]]


def test_a_failure_is_not_kept(tmp_path, launches, monkeypatch):
    failed = Resources(error="out of memory")
    monkeypatch.setattr(compiler, "_compiled", lambda items, jobs: [(item, failed) for item in items])
    assert compile_all([(launches[0], "sm_90")], folder=tmp_path) == {(launches[0], "sm_90"): failed}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        json.dumps({"registers": 3}),
        json.dumps(asdict(FOUND) | {"more": 1}),
        json.dumps(asdict(FOUND) | {"matrix": 3}),
        json.dumps(asdict(FOUND) | {"registers": "many"}),
    ],
)
def test_a_damaged_entry_is_ignored(tmp_path, content, launches, compiled):
    item = (launches[0], "sm_90")
    key = key_of(launches[0], TARGETS["sm_90"])
    (tmp_path / f"{key}.json").write_text(content, encoding="utf-8")
    assert compile_all([item], folder=tmp_path) == {item: FOUND}
    assert compiled == [item] and stored(key, tmp_path) == FOUND


def test_what_is_stored_comes_back(tmp_path):
    store("key", FOUND, tmp_path / "new")
    assert stored("key", tmp_path / "new") == FOUND and stored("other", tmp_path / "new") is None
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["key.json"]


def test_the_key_covers_what_a_kernel_follows_from(launches, monkeypatch):
    launch, target = launches[0], TARGETS["sm_90"]
    warps = tuple((name, 2 * value if name == "num_warps" else value) for name, value in launch.options)
    constexprs = tuple((name, 2 * value if name == "BLOCK_N" else value) for name, value in launch.constexprs)
    types = tuple((name, "i64" if kind == "i32" else kind) for name, kind in launch.signature)
    changed = [
        launch,
        *launches[1:],
        replace(launch, options=warps),
        replace(launch, constexprs=constexprs),
        replace(launch, signature=types),
        replace(launch, attributes=()),
    ]
    keys = [key_of(each, target) for each in changed] + [key_of(launch, TARGETS["sm_80"])]
    monkeypatch.setattr(compiler, "REVISION", -1)
    keys.append(key_of(launch, target))
    monkeypatch.undo()
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    keys.append(key_of(launch, target))
    assert len(keys) == len(set(keys))


def test_the_key_follows_the_source_of_the_kernel_and_of_what_it_calls(launches, monkeypatch):
    from hia_kernels.core import triton_math
    from hia_kernels.ops.inject_rows.triton_fwd import _inject_rows_fused_kernel as kernel

    target = TARGETS["sm_90"]
    launch = next(each for each in record(target, ["inject_rows"]).launches if each.kernel == kernel.__name__)
    assert triton_math.dot.cache_key  # Triton's key of a caller holds the globals of a callee that has a key already
    kernel.hash = None
    before = key_of(launch, target)
    source = triton_math.dot.src
    try:
        triton_math.dot._unsafe_update_src(source + "\n    # changed")
        kernel.hash = None
        assert key_of(launch, target) != before
    finally:
        triton_math.dot._unsafe_update_src(source)
        kernel.hash = None
    assert key_of(launch, target) == before


def test_the_page_lists_these_launches(recording):
    """Compare rows, launches and targets; the page's numbers are of whoever ran the generator last."""
    recordings = [recording(target) for target in TARGETS]
    expected = [
        (kernel, described, str(warps), document.stages(row), tuple(t for t in TARGETS if t in row.launches))
        for (kernel, described, warps), row in document.rows(recordings).items()
    ]
    found = document.listed(document.PATH.read_text(encoding="utf-8"))
    assert found == expected, f"{document.PATH.name} is out of date: python -m bench launches --write"


def test_the_page_shows_the_most_that_a_row_takes(launches):
    more = replace(FOUND, registers=50, depth=0)
    assert document._cell([FOUND, more]) == "50 / 0 / 1.0 / wgmma / 3"
    assert document._cell([]) == "" and document._cell([Resources(error="no")]) == "does not compile"


def test_the_command_prints_problems_and_fails(tmp_path, launches, compiled, capsys, monkeypatch):
    arguments = ["--target", "sm_90", "--op", "row_softmax", "--cache", str(tmp_path)]
    assert bench(["launches", *arguments]) == 0
    assert "10 launches, 0 with problems" in capsys.readouterr().out.replace(str(len(launches)), "10", 1)
    monkeypatch.setattr(compiler, "stored", lambda key, folder: replace(FOUND, spilled=4))
    assert bench(["launches", *arguments]) == 1
    out = capsys.readouterr().out
    assert "_row_softmax_fwd_kernel on sm_90: spills 4 bytes;" in out and "launched by row_softmax 13b" in out


def test_the_command_lists_without_compiling(compiled, capsys):
    assert bench(["launches", "--target", "sm_80", "--op", "row_softmax", "--list"]) == 0
    assert "sm_80 _row_softmax_fwd_kernel fp32 bf16 BLOCK_R=4 BLOCK_N=1024 warps=4" in capsys.readouterr().out
    assert not compiled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs: must be at least 1, got 0"),
        (["--write", "--op", "stem"], "--write: must cover every op and target"),
        (["--target", "sm_9"], "--target: must be among sm_80, .* got 'sm_9'; did you mean sm_90"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert bench(["launches", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
