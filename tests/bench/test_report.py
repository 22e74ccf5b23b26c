"""The report: numbers, Markdown, pictures, and the page opened in Chromium. All records here are made up."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench.records.record import Measurement, read_records, write_records
from bench.report import data as report_data
from bench.report import html as report_html
from bench.report import markdown as report_markdown
from bench.report import run as report

ENVIRONMENT = {
    "device": "made-up CPU",
    "threads": 2,
    "commit": "0123456789abcdef",
    "dirty": True,
    "date": "2026-01-01",
    "command": "python -m bench ops --device cpu",
    "limits": {"bandwidth_gb_per_s": 20.0, "gemm_gflop_per_s": {"fp32": 500.0}},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROVIDERS = {"hia": 1.0, "eager": 2.0, "compile": 0.5}
TARGETS = [
    {
        "name": "encode-896",
        "kind": "speedup",
        "where": "encode px896 forward",
        "target": 2.5,
        "ratio": 2.75,
        "verdict": "met",
        "note": "hia 4 ms, eager 11 ms",
    },
    {
        "name": "stem-16bit-memory",
        "kind": "peak",
        "where": "stem px2048-16bit forward",
        "target": 0.25,
        "ratio": 0.5,
        "verdict": "MISSED",
        "note": "hia 50 MB, eager_rgb 100 MB",
    },
    {
        "name": "encode-2048-compile",
        "kind": "speedup",
        "where": "encode px2048 forward",
        "target": 1.3,
        "ratio": None,
        "verdict": "not measured",
        "note": "compile: a <b>made-up</b> | reason",
    },
]
SCREEN = (1280, 1600)


def measurement(op="stem", case="13b-448-2img", provider="hia", p50=1.0, **more) -> Measurement:
    fields = {
        "p20_ms": 0.9 * p50,
        "p50_ms": p50,
        "p80_ms": 1.1 * p50,
        "repeats": 9,
        "flops": 10**9,
        "bytes": 10**7,
        "roofline_ms": 0.1,
        "percent_of_roofline": 10 / p50,
        "peak_bytes": 10**6,
    }
    fields["environment"] = ENVIRONMENT
    return Measurement("op", op, case, provider, "forward", "fp32", "cpu", "ok", **{**fields, **more})


def records() -> list[Measurement]:
    found = [
        measurement(op, f"13b-{side}-2img", provider, factor * side / 448)
        for op in ("stem", "norm_linear")
        for side in (448, 896, 1792)
        for provider, factor in PROVIDERS.items()
    ]
    found.append(
        Measurement(
            "op",
            "stem",
            "13b-448-2img",
            "flash_attn",
            "forward",
            "fp32",
            "cpu",
            "failed",
            "output: <script>alert(1)</script> | rel-RMS 1.0 > 1e-6",
            environment=ENVIRONMENT,
        )
    )
    whole = {"host": "small", "resolution": 896, "batch": 1, "total_bytes": 2 * 10**9, "tokens_per_s": 12.5}
    found += [
        Measurement(
            "end_to_end",
            "decode",
            "896px-2img-b1",
            provider,
            "forward",
            "fp32",
            "cpu",
            "ok",
            None,
            70.0,
            80.0,
            90.0,
            repeats=3,
            peak_bytes=10**8,
            extra=whole,
            environment=ENVIRONMENT,
        )
        for provider in ("hia", "baseline")
    ]
    return found


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "made-up-cpu"
    all_of_them = records()
    write_records(folder / "kernels.json", [r for r in all_of_them if r.level == "op"])
    write_records(folder / "end_to_end.json", [r for r in all_of_them if r.level == "end_to_end"])
    row = {
        "resolution": 896,
        "method": "hia",
        "attention": "sdpa",
        "flops": 33 * 10**12,
        "memory_bytes": 29 * 10**9,
        "fits": True,
        "paper_flops_t": 16.8,
        "paper_memory_gb": 30.4,
        "paper_out_of_memory": False,
        "tokens": 1212,
    }
    table3 = {
        "environment": {**ENVIRONMENT, "command": "python -m bench table3"},
        "protocol": {"dtype": "bf16"},
        "rows": [
            row,
            {**row, "method": "baseline", "fits": False, "paper_memory_gb": None, "paper_out_of_memory": True},
        ],
    }
    (folder / "table3.json").write_text(json.dumps(table3))
    judged = {**ENVIRONMENT, "command": "python -m bench targets", "commit": "fedcba9876543210", "dirty": False}
    write_records(folder / "targets.json", [measurement("encode", "px896", environment=judged)], targets=TARGETS)
    return tmp_path / "results"


@pytest.fixture
def written(results, tmp_path):
    assert report.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("case", "side", "family"),
    [
        ("13b-896-2img-b4", 896, "13b-*-2img-b4"),
        ("13b-448-2img:features", 448, "13b-*-2img:features"),
        ("px1792", 1792, "*"),
        ("px-ragged", None, "px-ragged"),
        ("lite-4096", 4096, "lite-*"),
        ("896px-2img-b1", 896, "*-2img-b1"),
        ("px4096-b8", 4096, "*-b8"),
    ],
)
def test_side_and_family_of_a_case(case, side, family):
    record = measurement(case=case)
    assert report_data.side_of(record) == side
    assert report_data.family_of(record) == family


def test_standings_list_what_is_lost_beside_what_is_won():
    (one,) = report_data.standings([r for r in records() if r.op == "stem"])
    assert one.cases == 3
    assert one.against["eager"] == (pytest.approx(2.0), 3)
    assert one.against["compile"] == (pytest.approx(0.5), 3)
    assert len(one.slower) == 3
    assert "flash_attn" not in one.against, "a failure is no number"


def test_changes_have_regressions_and_wins_in_one_table():
    before = [measurement(provider=provider, p50=10.0) for provider in ("hia", "eager", "compile", "sdpa_math")]
    now = [
        measurement(provider="hia", p50=12.5),
        measurement(provider="eager", p50=5.0),
        measurement(provider="compile", p50=10.2),
        measurement(provider="sdpa_math", p50=11.0),
        measurement(provider="new", p50=1.0),
    ]
    changes = report_data.compare(now, before)
    assert [(c.now.provider, c.verdict, c.certain) for c in changes] == [
        ("hia", "slower", True),
        ("sdpa_math", "slower", False),
        ("compile", "unchanged", False),
        ("eager", "faster", True),
    ]
    _, rows = report_markdown.change_cells(changes)
    assert [row[0] for row in rows] == ["slower", "slower", "faster"]
    assert rows[1][-1] == "within the noise"


def test_previous_record_is_the_last_committed_one_that_differs(tmp_path):
    path = tmp_path / "results" / "cpu" / "kernels.json"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    for p50 in (4.0, 2.0):
        write_records(path, [measurement(p50=p50)])
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", f"{p50}"], check=True)
    found, origin = report_data.previous_records(path, None, root=tmp_path)
    assert found[0].p50_ms == 4.0, "committed as it is: what it replaced"
    assert origin.startswith("results/cpu/kernels.json of ")
    write_records(path, [measurement(p50=1.0)])
    assert report_data.previous_records(path, None, root=tmp_path)[0][0].p50_ms == 2.0, "changed: what is committed"
    with pytest.raises(ValueError, match="--previous: must be a revision of this repository, got 'nowhere'"):
        report_data.previous_records(path, "nowhere", root=tmp_path)


def test_a_file_that_is_new_has_no_previous_record(tmp_path):
    """The others are compared all the same, and what is new isn't a reason to stop."""
    folder = tmp_path / "results" / "cpu"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run([*git, "init", "-q"], check=True)
    write_records(folder / "kernels.json", [measurement(p50=4.0)])
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    write_records(folder / "kernels.json", [measurement(p50=2.0)])
    write_records(folder / "end_to_end.json", [r for r in records() if r.level == "end_to_end"])
    results = report_data.load(folder)
    report_data.add_changes(results, folder, "HEAD", root=tmp_path)
    assert [change.verdict for change in results.changes] == ["faster"]
    assert results.previous == f"results/cpu/kernels.json of {'HEAD'}"
    (folder / "kernels.json").unlink()
    results = report_data.load(folder)
    report_data.add_changes(results, folder, "HEAD", root=tmp_path)
    assert results.changes == []
    assert results.previous == "nothing: results/cpu/end_to_end.json is new since HEAD"


def test_ceilings_are_the_limits_that_the_runs_measured():
    """Not FLOPs over rooflines: a roofline counts the least FLOPs, a record the textbook's, here ten times as many."""
    from bench.report.plots import ceilings

    def measured(bandwidth, **rates):
        return {**ENVIRONMENT, "limits": {"bandwidth_gb_per_s": bandwidth, "gemm_gflop_per_s": rates}}

    rows = [
        measurement(flops=10**12, bytes=10**7, roofline_ms=200.0, environment=measured(20.0, fp32=500.0)),
        measurement(op="extract", environment=measured(25.0, fp32=450.0, bf16=900.0)),
        measurement(op="norm_linear", environment={"device": "made-up CPU"}),
    ]
    assert ceilings(rows) == [(pytest.approx(25e9), pytest.approx(500e9), "fp32")]
    assert ceilings(rows[2:]) == [], "no limit was measured"


def test_markdown_tables_print_command_device_and_commit(written):
    page = (written / "made-up-cpu.md").read_text()
    for title in (
        "Targets",
        "Ours beside the others",
        "Changes",
        "Furthest from the roofline",
        "Ops and composites",
        "End to end",
    ):
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        expected = title not in ("Changes", "Targets")  # nothing to compare with; a run of their own
        assert (
            "python -m bench ops --device cpu · made-up CPU, 2 threads · 0123456789 with uncommitted changes" in section
        ) is expected, title
    assert "python -m bench table3" in page.split("## Table 3\n")[1]
    assert (
        "python -m bench targets · made-up CPU, 2 threads · fedcba9876 · 2026-01-01"
        in page.split("## Targets\n")[1].split("\n## ")[0]
    )
    assert "| **failed**: output: <script>alert(1)</script> \\| rel-RMS" in page
    assert "| hia | fp32 | 80.0 | 1.00 | 12.5 | 2.00 |" in page
    widths = {line.count("|") - line.count("\\|") for line in page.split("## Ops")[1].splitlines() if line[:1] == "|"}
    assert len({width for width in widths if width > 10}) == 1


def test_targets_are_in_the_markdown(written):
    for name in ("made-up-cpu.md", "targets-made-up-cpu.md"):
        page = (written / name).read_text()
        assert "1 met, 1 MISSED, 1 not measured." in page
        assert "| target | workload | ratio of | must be | measured | verdict | note |" in page
        assert "| encode-896 | encode px896 forward | their time / ours | >= 2.5 | 2.75 | met | hia 4 ms, " in page
        assert "| <= 0.25 | 0.50 | MISSED | hia 50 MB, eager_rgb 100 MB |" in page
        assert "| >= 1.3 | - | not measured | compile: a <b>made-up</b> \\| reason |" in page


def test_targets_without_a_verdict_are_no_file_of_ours(results, capsys, tmp_path):
    path = results / "made-up-cpu" / "targets.json"
    stripped = [{name: value for name, value in TARGETS[0].items() if name != "verdict"}]
    write_records(path, [measurement()], targets=stripped)
    assert report.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"each of .*targets.json's targets must have name, .*, got no verdict", capsys.readouterr().err)


def test_pictures(written):
    for name in ("time", "roofline"):
        path = written / f"made-up-cpu-{name}.png"
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert f"({path.name})" in (written / "made-up-cpu.md").read_text()


def test_no_matplotlib_is_said_and_the_rest_is_written(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "plotting_unavailable", lambda: "matplotlib is not installed")
    assert report.main(["--results", str(results), "--out", str(tmp_path / "out")]) == 0
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["index.html", "made-up-cpu.md", "targets-made-up-cpu.md"]


class Page(HTMLParser):
    """What a page loads, and its text outside scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data") and value]


def test_page_is_self_contained(written):
    text = (written / "index.html").read_text()
    page = Page()
    page.feed(text)
    assert [url for url in page.loads if not url.startswith(("#", "data:"))] == []
    assert page.scripts == 2, "a record's text must not open another"
    assert re.findall(r"https?://[^\"'\s]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|sendBeacon|WebSocket", text)
    assert "default-src 'none'" in text


def test_bad_input(results, tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.parse(["--results", str(tmp_path / "nowhere")])
    assert "--results: must hold a device's folder with records, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.parse(["--results", str(results), "--device", "made-up-gpu"])
    assert "got 'made-up-gpu'; did you mean made-up-cpu?" in capsys.readouterr().err
    (results / "made-up-cpu" / "kernels.json").write_text("{")
    assert report.main(["--results", str(results), "--out", str(tmp_path)]) == 2
    assert "kernels.json must be a JSON file" in capsys.readouterr().err


def test_committed_records_make_a_page():
    folders = [path.parent for path in report.DEFAULT_RESULTS.glob("*/*.json") if path.name in report_data.FILES]
    if not folders:
        pytest.skip("no records are committed yet")
    devices = [report_data.load(folder) for folder in sorted(set(folders))]
    assert all(
        device.records == [*map(Measurement.from_dict, map(Measurement.to_dict, device.records))] for device in devices
    )
    report_html.render(devices)


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"NO BROWSER: none of {', '.join(BROWSERS)} on PATH; the page was not opened (apt install chromium)"
        )
    return found


def chromium(page, fragment: str, tmp_path, *what: str) -> tuple[str, str]:
    """What it prints, and what the page's console said."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=2000",
        *what,
        f"file://{page}#{fragment}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def opened(page, fragment: str, tmp_path) -> tuple[str, str]:
    """The document after its scripts ran, and what the console said."""
    return chromium(page, fragment, tmp_path, "--dump-dom")


def photographed(page, fragment: str, tmp_path) -> Image.Image:
    """The window as a reader sees it first."""
    path = tmp_path / "screenshot.png"
    size = f"--window-size={SCREEN[0]},{SCREEN[1]}"
    _, console = chromium(
        page,
        fragment,
        tmp_path,
        f"--screenshot={path}",
        size,
        "--hide-scrollbars",
        "--run-all-compositor-stages-before-draw",
    )
    assert console == ""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def cells(dom: str, table: str) -> list[list[str]]:
    body = re.search(rf'<table id="table-{table}"[^>]*>.*?<tbody>(.*?)</tbody>', dom, flags=re.DOTALL)
    rows = re.findall(r"<tr.*?>(.*?)</tr>", body.group(1), flags=re.DOTALL)
    return [re.findall(r"<td.*?>(.*?)</td>", row, flags=re.DOTALL) for row in rows]


def test_page_in_a_browser_filters_and_sorts(written, tmp_path):
    dom, console = opened(written / "index.html", "all.q=stem+13b&all.provider=hia&all.sort=-p50&theme=dark", tmp_path)
    assert console == ""
    assert 'data-ready="yes"' in dom
    assert 'data-theme="dark"' in dom
    rows = cells(dom, "all")
    assert [row[1] for row in rows] == ["13b-1792-2img", "13b-896-2img", "13b-448-2img"]
    assert {row[0] for row in rows} == {"stem"}
    assert {row[2] for row in rows} == {"hia"}
    assert 'aria-sort="descending"' in dom
    assert f"3 of {len(records())} rows" in dom
    for section in ("targets", "standing", "curves", "roofline", "memory", "table3", "changes", "all"):
        assert f'id="section-{section}"' in dom
    assert dom.count('class="chart"') >= 4
    assert "python -m bench table3 · made-up CPU" in dom
    assert "python -m bench targets · made-up CPU, 2 threads · fedcba9876 · 2026-01-01" in dom
    assert "1 met, 1 MISSED, 1 not measured, 0 no target." in dom
    targets = {row[0]: row for row in cells(dom, "targets")}
    assert targets["stem-16bit-memory"][1:] == [
        "stem px2048-16bit forward",
        "our peak memory / theirs",
        "&lt;= 0.25",
        "0.50",
        "MISSED",
        "hia 50 MB, eager_rgb 100 MB",
    ]
    assert targets["encode-2048-compile"][4:] == ["-", "not measured", "compile: a &lt;b&gt;made-up&lt;/b&gt; | reason"]

    dom, console = opened(written / "index.html", "all.status=failed", tmp_path)
    assert console == ""
    ((*_, note),) = cells(dom, "all")
    assert note.startswith("failed: output: ")
    assert "&lt;script&gt;alert(1)" in dom


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_in_a_browser_is_painted(theme, written, tmp_path):
    """Not what it shows, but that it shows: a background, and ink of several colours from top to bottom."""
    picture = photographed(written / "index.html", f"theme={theme}", tmp_path)
    assert picture.size == SCREEN
    colours = sorted(picture.getcolors(maxcolors=2**24), reverse=True)
    assert len(colours) > 50, "anti-aliased text alone has more"
    shares = [count / (SCREEN[0] * SCREEN[1]) for count, _ in colours]
    assert 0.3 < shares[0] < 0.98, "one colour covers a page that is blank"
    assert (sum(colours[0][1]) > 600) is (theme == "light")
    accent = {"light": (11, 122, 117), "dark": (79, 209, 197)}[theme]
    assert accent in {colour for _, colour in colours}, "links and our own marks have it"
    for top in range(0, SCREEN[1], 400):  # each quarter has something on it
        assert len(picture.crop((0, top, SCREEN[0], top + 400)).getcolors(maxcolors=2**24)) > 10


def test_records_survive_the_page(written, results):
    text = (written / "index.html").read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1))
    (device,) = data["devices"]
    assert len(device["rows"]) == len(records())
    stored = read_records(results / "made-up-cpu" / "kernels.json")
    assert [row["p50"] for row in device["rows"][: len(stored)]] == [record.p50_ms for record in stored]
