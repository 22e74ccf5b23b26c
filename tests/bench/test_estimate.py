"""``python -m bench estimate``: the figures of known shapes and kernels, by hand, and the page around them."""

from __future__ import annotations

import importlib.util
import json

import pytest

from bench.__main__ import main as bench
from bench.estimate import page
from bench.estimate.collect import Work, collect, known
from bench.estimate.compiled import Compiled, widest
from bench.estimate.measured import measured
from bench.estimate.model import DEVICES, estimate_s, kernels
from bench.estimate.occupancy import Occupancy, resident
from bench.estimate.steps import Step
from bench.launches.compile import Resources
from bench.launches.device import TARGETS
from bench.launches.record import Launch
from bench.records import files
from bench.records.record import write_records
from bench.workloads import Workload, workloads
from tests.bench.made_up import ENVIRONMENT, measurement

H100, H200 = DEVICES["h100"], DEVICES["h200"]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def workload(op: str, name: str) -> Workload:
    return next(one for one in workloads(op) if one.name == name)


def launch(kernel: str, warps: int = 4) -> Launch:
    return Launch("made.up", kernel, (), (), (), (("num_stages", 3), ("num_warps", warps)))


def step(name: str, programs: int = 0, nbytes: int = 0, flops: int | None = None, call: int | None = 0) -> Step:
    return Step(name, launch(name) if programs else None, programs, nbytes, flops, call, False)


def work(*steps: Step, call_flops: tuple[int, ...] = (0,), flops: int = 0, nbytes: int = 0) -> Work:
    return Work(workload("cross_attention", "13b-896:extract"), "forward", flops, nbytes, steps, call_flops)


def test_roofline_by_hand():
    """Compute bound: 3.03 TB/s moves 30.3 MB in 10 us, 784 TFLOP/s do 15.68 GFLOP in 20."""
    assert H100.roofline_s(15.68e9, 30.3e6) == pytest.approx(20e-6)
    assert H100.roofline_s(7.84e9, 60.6e6) == pytest.approx(20e-6)
    assert H200.roofline_s(7.9e9, 43e6) == pytest.approx(10e-6)


@pytest.mark.parametrize(
    ("registers", "shared_kib", "warps", "expected"),
    [
        pytest.param(128, 0, 4, 4, id="registers: 65536 / (128 x 128)"),
        pytest.param(129, 0, 4, 3, id="registers in eights: 65536 / (136 x 128)"),
        pytest.param(255, 0, 8, 1, id="one of eight warps"),
        pytest.param(32, 112, 4, 2, id="shared memory: 228 / (112 + 1)"),
        pytest.param(32, 113.5, 4, 1, id="a system's KiB each: 228 / (113.5 + 1)"),
        pytest.param(16, 0, 16, 4, id="threads: 2048 / 512"),
        pytest.param(16, 0, 1, 32, id="32 programs"),
        pytest.param(255, 0, 16, 0, id="does not fit"),
    ],
)
def test_resident_programs_by_hand(registers, shared_kib, warps, expected):
    assert resident(Resources(registers=registers, shared=int(shared_kib * 1024)), warps) == expected


@pytest.mark.parametrize(
    ("programs", "places", "waves", "fill"),
    [(132, 2, 0.5, 1.0), (66, 1, 0.5, 0.5), (198, 1, 1.5, 0.75), (264, 2, 1.0, 1.0), (133, 1, 133 / 132, 133 / 264)],
)
def test_waves_and_fill_by_hand(programs, places, waves, fill):
    found = Occupancy(programs, places)
    assert found.waves == pytest.approx(waves) and found.fill == pytest.approx(fill)


def test_widest_matrix_instruction():
    ptx = """
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1};
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1};
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1};
    """
    assert widest(ptx) == (64, 128, 16)
    assert widest("add.f32 %f1, %f1, %f2;") is None


def test_flops_go_to_launches_with_matrix_instructions():
    """20 GFLOP of a call, of which a library's product has 4: two launches share the rest, the pointwise has none."""
    wide = Compiled(Resources(registers=128), (64, 128, 16))
    found = {launch("scores"): wide, launch("values"): wide, launch("delta"): Compiled(Resources(registers=32), None)}
    steps = step("delta", 640), step("scores", 132), step("mm", flops=4 * 10**9), step("values", 66)
    listed = kernels(work(*steps, call_flops=(20 * 10**9,)), found)
    assert [one.flops for one in listed] == [0, 8e9, 4e9, 8e9]
    assert listed[1].instructions == pytest.approx(8e9 / 262144)
    assert listed[0].instructions is None and listed[2].occupancy is None
    assert listed[3].seconds(H100) == pytest.approx(2 * listed[1].seconds(H100))  # 66 programs fill half of the GPU


def test_estimate_by_hand():
    """30.3 MB take 10 us; 7.84 GFLOP take 10 us, and 20 in half the GPU; each kernel costs 2.5 us."""
    found = {launch("_a_kernel"): Compiled(Resources(registers=128), (64, 64, 16))}
    task = work(step("copy_", nbytes=30_300_000, call=None), step("_a_kernel", 66), call_flops=(7_840_000_000,))
    assert estimate_s(kernels(task, found), H100, 2.5e-6) == pytest.approx(35e-6)
    assert estimate_s(kernels(task, found), H100, 0) == pytest.approx(30e-6)


def record(case="13b-896:extract", p50=0.02, **more):
    options = {"roofline_ms": 0.01, "percent_of_roofline": 50.0, **more}
    found = measurement("cross_attention", case, p50=p50, **options).to_dict()
    return type(measurement()).from_dict({**found, "dtype": "bf16", "device": "cuda"})


def test_measured_are_ours_and_the_latest():
    folder = files.RESULTS / "made-up-gpu"
    later = {**ENVIRONMENT, "date": "2026-02-01", "commit": "fedcba9876543210"}
    write_records(folder / "a.json", [record(p50=0.03, environment=later)])
    write_records(folder / "b.json", [record(p50=0.02), record(case="13b-448-2img:extract", provider="eager")])
    (folder / "table3.json").write_text(json.dumps({"rows": []}))
    found = measured("made-up-gpu")
    assert {key: one.p50_ms for key, one in found.items()} == {("cross_attention", "13b-896:extract", "forward"): 0.03}
    assert measured("nowhere") == {}


def test_damaged_records_are_named():
    folder = files.RESULTS / "made-up-gpu"
    write_records(folder / "a.json", [record()])
    (folder / "a.json").write_text('{"format": 1, "environments": [], "records": [{}]}')
    with pytest.raises(files.BadFile, match=r"a\.json, record 0"):
        measured("made-up-gpu")


def test_page_has_a_figure_where_there_is_a_record_and_room_where_not():
    found = {launch("_a_kernel"): Compiled(Resources(registers=128, shared=1024), (64, 64, 16))}
    task = work(step("_a_kernel", 198), call_flops=(7_840_000_000,), flops=7_840_000_000, nbytes=10**6)
    known_h100 = {("cross_attention", "13b-896:extract", "forward"): record()}
    text = page.text([task], found, {H100: known_h100, H200: {}}, 2.5e-6, "Made up.")
    (line,) = [line for line in text.splitlines() if line.startswith("| 13b-896:extract")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == ["13b-896:extract", "forward", "7.84", "1.0", "1 + 0", "`_a_kernel`"]
    # 10 us over a fill of 198 / 264, and one launch
    assert cells[6:12] == ["128 / 1.0 / 4", "198", "4", "0.38", "0.75", "59,814 of 64x64x16"]
    assert cells[12:15] == ["10.0", "15.8", "20.0 (0123456789ab)"]
    assert cells[15:] == ["9.9", "15.7", ""]
    assert "measured / estimate 1.26 to 1.26, median 1.26 (rows: 1)" in text and "none yet" in text


@needs_triton
@pytest.mark.compile
def test_listed_kernels_of_a_workload():
    """Forward and backward of one attention, and products and copies of a library in ``linear``."""
    task = workload("cross_attention", "13b-448-2img:extract")
    forward, backward = collect([task], TARGETS["sm_90"], lambda *_: None)
    assert [one.name for one in forward.steps] == ["_cross_attention_fwd_kernel"]
    # two images of 256 queries and 196 keys, 40 heads of 128: 2 products, 2 FLOPs each
    assert forward.flops == 2 * 2 * 2 * 256 * 196 * 5120 and forward.call_flops == (forward.flops,)
    assert forward.steps[0].nbytes == forward.nbytes
    names = [one.name for one in backward.steps]
    assert "_cross_attention_bwd_dq_kernel" in names and "_cross_attention_fwd_kernel" not in names
    assert all(one.backward for one in backward.steps)
    product, _ = collect([workload("linear", "13b-448-2img:features")], TARGETS["sm_90"], lambda *_: None)
    assert [(one.name, one.flops) for one in product.steps] == [("addmm", 2 * 392 * 2048 * 5120)]


@needs_triton
@pytest.mark.compile
def test_encode_is_the_sum_of_its_convolutions():
    (found,) = collect([workload("encode", "px448")], TARGETS["sm_90"], lambda *_: None)
    assert sum(found.call_flops) == found.flops  # nothing is listed twice, and nothing is lost
    assert len(found.call_flops) == 53
    assert all(one.call is not None for one in found.steps)


@needs_triton
@pytest.mark.compile
def test_command_prints_a_table(capsys):
    arguments = ["estimate", "--op", "row_softmax", "--case", "13b-released-896", "--device", "h200"]
    assert bench([*arguments, "--bandwidth", "2", "--launch-us", "0", "--jobs", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("| 13b-released-896 | forward")]
    assert line.endswith("| 4.8 | 4.8 |  |")  # 9641984 bytes / 2 TB/s
    assert any(line.startswith("- H200: 2 TB/s, 790 TFLOP/s of bf16, as the options say") for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write", "--op", "stem"], "--write: must cover everything"),
        (["--tflops", "900"], "must be of one device, got two"),
        (["--op", "stemm"], "did you mean stem"),
        (["--device", "h300"], "--device: must be among h100, h200, got 'h300'"),
        (["--op", "stem", "--case", "13b-*"], "--case: must be"),
    ],
)
@needs_triton
def test_options(options, message, capsys):
    assert bench(["estimate", *options]) == 2
    assert message in capsys.readouterr().err


def test_measured_workloads_are_listed_beside_the_gpu_set():
    names = {(one.op, one.name) for one in known([("stem", "px2048-16bit")])}
    assert ("stem", "px2048-16bit") in names and ("stem", "px2048-16bit") not in {(o.op, o.name) for o in known()}
    assert ("encode", "px896") in names and not any(op.endswith("train_step") for op, _ in names)
