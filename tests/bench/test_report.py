"""The report: numbers, Markdown, pictures, and the page opened in Chromium. All records here are made up."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench import __main__ as bench
from bench import plotting
from bench.records.files import RESULTS
from bench.records.record import Measurement, write_records
from bench.report import cli, sections
from bench.report import data as report_data
from bench.report.speedup import speedups

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
        "protocol": {
            "dtype": "bf16",
            "attention": ["sdpa"],
            "card_gb": 32.0,
            "unit": "flops",
            "images_per_sample": 2,
            "text_tokens": 60,
            "host": {"name": "a host"},
        },
        "rows": [
            row,
            {**row, "method": "baseline", "fits": False, "paper_memory_gb": None, "paper_out_of_memory": True},
        ],
    }
    (folder / "table3.json").write_text(json.dumps(table3))
    judged = {**ENVIRONMENT, "command": "python -m bench targets", "commit": "fedcba9876543210", "dirty": False}
    write_records(folder / "targets.json", [measurement("encode", "px896", environment=judged)], targets=TARGETS)
    return tmp_path / "results"


def run(*arguments) -> int:
    return bench.main(["report", *map(str, arguments)])


@pytest.fixture
def written(results, tmp_path):
    assert run("--results", results, "--out", tmp_path / "out") == 0
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


def test_speedups_list_what_is_lost_beside_what_is_won():
    """The fastest peer counts, in each case anew."""
    (one,) = speedups([r for r in records() if r.op == "stem"])
    assert one.cases == 3
    assert one.against["eager"] == (pytest.approx(2.0), 3)
    assert one.against["compile"] == (pytest.approx(0.5), 3)
    assert (one.ratio, one.verdict, one.fastest) == (pytest.approx(0.5), "slower", ("compile",))
    assert len(one.slower) == 3
    assert "flash_attn" not in one.against, "a failure is no number"
    assert one.percent_of_roofline == pytest.approx(5.0), "ours takes 2 ms in the middle of the three cases"
    mixed = [
        measurement(case=case, provider=name, p50=p50)
        for case, times in {"a": (1.0, 2.0, 4.0), "b": (1.0, 8.0, 0.5)}.items()
        for name, p50 in zip(("hia", "eager", "compile"), times, strict=True)
    ]
    (one,) = speedups(mixed)
    assert one.ratio == pytest.approx(1.0), "the geometric mean of 2 and a half"
    assert (one.verdict, one.fastest, one.slower) == ("even", ("eager", "compile"), ("b",))


def test_what_is_ours_or_reads_less_is_no_peer():
    shrunk = {"resolution": 896, "resolution_seen": 336}
    rows = [measurement(), measurement(provider="hia-cpu", p50=0.5), measurement(provider="textbook", p50=0.5)]
    assert speedups(rows) == []
    (one,) = speedups(
        [*rows, measurement(provider="eager", p50=3.0), measurement(provider="plain", p50=0.1, extra=shrunk)]
    )
    assert one.ratio == pytest.approx(3.0) and one.slower == ()
    assert set(one.against) == {"eager"} and set(one.beside) == {"hia-cpu", "textbook", "plain"}


def test_a_workload_that_was_measured_for_a_target_is_taken_from_that_run(results):
    found = report_data.load(results / "made-up-cpu")
    found.records.append(measurement("encode", "px896", p50=99.0))
    assert [r.p50_ms for r in found.measured if r.op == "encode"] == [1.0]
    assert len([r for r in found.measured if r.op == "stem"]) == len([r for r in records() if r.op == "stem"])


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
    others = [change for change in changes if change.now.provider != "hia"]
    mine = [
        report_data.Change(measurement(p50=change.now.p50_ms), change.before_ms, change.certain) for change in others
    ]
    section = sections.changes(report_data.Results("cpu", changes=[*changes[:1], *mine, *others]))
    (table,) = section.parts
    assert [str(row[0]) for row in table.rows] == ["slower", "slower", "faster"]
    assert str(table.rows[1][2]) == "within the noise"
    assert "1 of 4 measurements of ours that both records have are unchanged." in section.text
    assert "Over the 3 of other providers the median of now / before is 1.02." in section.text


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


def test_sections_print_command_device_and_commit(written):
    page = (written / "made-up-cpu.md").read_text()
    ours = (
        "python -m bench ops --device cpu · made-up CPU, 2 threads · 0123456789ab with uncommitted changes · 2026-01-01"
    )
    judged = "python -m bench targets · made-up CPU, 2 threads · fedcba987654 · 2026-01-01"
    for title in ("Verdicts", "Charts", "End to end", "Limits", "All measurements", "Not measured"):
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        assert f"<sub>`{ours}`</sub>" in section, title
    assert ours not in page.split("## Changes\n")[1].split("\n## ")[0], "nothing to compare with"
    assert f"<sub>`{judged}`</sub>" in page.split("## Targets\n")[1].split("\n## ")[0]
    assert "python -m bench table3 · made-up CPU" in page.split("## Table 3\n")[1]
    runs = page.split("## What was measured where\n")[1].split("\n## ")[0]
    line = "| python -m bench ops --device cpu | made-up CPU | 2 | ? | 0123456789ab with uncommitted changes |"
    assert f"{line} 2026-01-01 | {len(records())} |" in runs
    assert "| python -m bench targets | made-up CPU | 2 | ? | fedcba987654 | 2026-01-01 | 1 |" in runs


def test_markdown_tables(written):
    page = (written / "made-up-cpu.md").read_text()
    assert page.index("## Verdicts") < page.index("![Roofline]") < page.index("## Not measured")
    assert "| stem | op | 0.50 slower (compile; 5 % of roofline) |" in page
    assert "Of the rows, ours is: forward: even in 1, slower in 2." in page
    assert "| failed | output: <script>alert(1)</script> \\| rel-RMS" in page
    assert "| decode | 896px-2img-b1 | hia | fp32 | 80.0 | 1.00 | 12.5 | 2.00 |" in page
    assert "| 13b-448-2img | forward | fp32 | 1.00 (1.0) | **0.500 (1.0)** | 2.00 (1.0) | 10.0 |" in page
    for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE):
        assert len({line.count("|") - line.count("\\|") for line in block.splitlines()}) == 1, block


def test_targets_are_in_the_markdown(written):
    page = (written / "made-up-cpu.md").read_text().split("## Targets\n")[1].split("\n## ")[0]
    assert "1 met, 1 MISSED, 1 not measured." in page
    assert "| target | workload | ratio of | must be | measured | verdict | note |" in page
    assert "| encode-896 | encode px896 forward | their time / ours | >= 2.5 | 2.75 | met | hia 4 ms, " in page
    assert "| <= 0.25 | 0.50 | MISSED | hia 50 MB, eager_rgb 100 MB |" in page
    shown, folded = page.split("<details>")
    assert "| >= 1.3 | - | not measured | compile: a <b>made-up</b> \\| reason |" in folded
    assert "encode-2048-compile" not in shown


def test_targets_without_a_verdict_are_no_file_of_ours(results, capsys, tmp_path):
    path = results / "made-up-cpu" / "targets.json"
    stripped = [{name: value for name, value in TARGETS[0].items() if name != "verdict"}]
    write_records(path, [measurement()], targets=stripped)
    assert run("--results", results, "--out", tmp_path / "out") == 2
    assert re.search(r"each of .*targets.json's targets must have name, .*, got no verdict", capsys.readouterr().err)


def test_folders_of_a_command_stay_out():
    environment = {**ENVIRONMENT, "command": "python -m bench targets --add --out /home/me/results --only a"}
    assert report_data.source_line(environment).startswith("python -m bench targets --add --only a · made-up CPU")


def test_pictures(written):
    for name in ("speedup", "time", "roofline"):
        path = written / f"made-up-cpu-{name}.png"
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert f"({path.name})" in (written / "made-up-cpu.md").read_text()


def test_no_matplotlib_is_said_and_the_rest_is_written(results, tmp_path, monkeypatch, capsys):
    for module in (plotting, sections):
        monkeypatch.setattr(module, "unavailable", lambda: "matplotlib is not installed")
    assert run("--results", results, "--out", tmp_path / "out") == 0
    assert "no pictures: matplotlib is not installed" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "made-up-cpu.md"]


def test_a_report_is_written_outside_the_repository_unless_it_is_recorded(results, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "DOCS", tmp_path / "docs")
    assert cli.report.__defaults__[-2] == cli.OUT / "report", "out/ is ignored by git"
    assert run("--results", results, "--record") == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert run("--results", results, "--record") == 0
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}, "as often as one likes"


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
    assert page.scripts == 1, "a record's text must not open another"
    assert re.findall(r"https?://[^\"'\s]+", text) == []
    assert not re.search(r"@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(|sendBeacon|WebSocket", text)
    assert "default-src 'none'" in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text, "no other script may run"
    assert len(script.splitlines()) <= 20


def test_page_is_read_without_javascript(written):
    """It opens with the verdicts; what was not measured is folded; every median and target is in the text itself."""
    text = (written / "index.html").read_text()
    sections_of = re.findall(r'<section id="made-up-cpu-([^"]*)"', text)
    assert sections_of[:3] == ["verdicts", "runs", "charts"] and sections_of[-1] == "missing"
    assert '<td class="bad">0.50 slower<small>compile; 5 % of roofline</small></td>' in text
    assert text.count("<svg") == 5, "speedup, time, memory, roofline, Table 3"
    folded = "".join(re.findall(r"<details>.*?</details>", text, flags=re.DOTALL))
    for record in records():
        if record.status == "ok" and record.level == "op":
            assert f">{sections.number(record.p50_ms)}<small>" in folded
    assert "encode-2048-compile" in folded and "encode-896" not in folded
    assert "compile: a &lt;b&gt;made-up&lt;/b&gt; | reason" in folded
    assert "output: &lt;script&gt;alert(1)&lt;/script&gt;" in text and "output:" not in folded, (
        "failures are not folded"
    )


def test_charts_keep_their_labels_and_share_no_id(written):
    text = (written / "index.html").read_text()
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)
    figure, (axis,) = plotting.new_figure()
    axis.plot([1, 2], [0.125, 2.625], color=plotting.COLOURS[0])
    axis.set_yticks([0.125, 2.625], ["0.125", "2.625"])
    svg = plotting.inline_svg(figure, "a", "b")
    assert ">2.625</text>" in svg, "coordinates are rounded, labels are not"
    assert f"var(--{plotting.COLOURS[0][1:]})" in svg and "font-family" not in svg
    assert all(f"--{light[1:]}: {dark};" in plotting.colour_rules(dark=True) for light, dark in plotting.DARK.items())


def test_bad_input(results, tmp_path, capsys):
    assert run("--results", tmp_path / "nowhere") == 2
    assert "--results: must hold a device's folder with records, got none" in capsys.readouterr().err
    assert run("--results", results, "--device", "made-up-gpu") == 2
    assert "got 'made-up-gpu'; did you mean made-up-cpu?" in capsys.readouterr().err
    (results / "made-up-cpu" / "kernels.json").write_text("{")
    assert run("--results", results, "--out", tmp_path) == 2
    assert "kernels.json must be a JSON file" in capsys.readouterr().err


def test_committed_records_make_a_small_page(tmp_path):
    folders = [path.parent for path in RESULTS.glob("*/*.json") if path.name in report_data.FILES]
    if not folders:
        pytest.skip("no records are committed yet")
    devices = [report_data.load(folder) for folder in sorted(set(folders))]
    assert all(
        device.records == [*map(Measurement.from_dict, map(Measurement.to_dict, device.records))] for device in devices
    )
    cli.write_all(devices, tmp_path)
    assert (tmp_path / "index.html").stat().st_size < 300_000 * len(devices)


def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"NO BROWSER: none of {', '.join(BROWSERS)} on PATH; the page was not opened (apt install chromium)"
        )
    return found


def chromium(page, tmp_path, *what: str) -> tuple[str, str]:
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
        f"file://{page}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


def opened(page, tmp_path) -> tuple[str, str]:
    """The document after its scripts ran, and what the console said."""
    return chromium(page, tmp_path, "--dump-dom")


def photographed(page, theme: str, tmp_path) -> Image.Image:
    """The window as a reader sees it first, on a system with that theme."""
    path = tmp_path / "screenshot.png"
    _, console = chromium(
        page,
        tmp_path,
        f"--screenshot={path}",
        f"--window-size={SCREEN[0]},{SCREEN[1]}",
        f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}",
        "--hide-scrollbars",
        "--run-all-compositor-stages-before-draw",
    )
    assert console == ""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def column(dom: str, title: str, name: str) -> list[str]:
    """A column of the table with that label, as the page shows it."""
    table = re.search(rf'aria-label="{title}".*?<table>(.*?)</table>', dom, flags=re.DOTALL).group(1)
    heads = [re.sub("<.*?>", "", head) for head in re.findall(r"<th.*?>(.*?)</th>", table)]
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], flags=re.DOTALL)
    return [re.findall(r"<td.*?>(.*?)(?:<small>.*?)?</td>", row)[heads.index(name)] for row in rows]


def test_page_in_a_browser_sorts(written, tmp_path):
    dom, console = opened(written / "index.html", tmp_path)
    assert console == "", "the page's own script may run"
    assert dom.count("<th") == dom.count("<th><button") + dom.count("<thead") + len(
        re.findall("<th class[^>]*><button", dom)
    )
    whole = column(dom, "Whole models", "provider")
    assert whole == ["hia", "baseline"], "the records' order"
    page, title = written / "index.html", "stem: 9 medians"
    assert column(dom, title, "hia") == ["1.00", "2.00", "4.00"]
    for presses, order in ((1, ["4.00", "2.00", "1.00"]), (2, ["1.00", "2.00", "4.00"])):
        # a script of the test's own, which the page itself would not let run
        press = f"""<script>for (let i = 0; i < {presses}; i++)
            document.querySelector('[aria-label="{title}"]').querySelectorAll("th button")[3].click()</script>"""
        copy = tmp_path / f"pressed-{presses}.html"
        copy.write_text(re.sub("<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", press + "</body>"))
        dom, console = opened(copy, tmp_path)
        assert console == ""
        assert column(dom, title, "hia") == order
        assert f'aria-sort="{"descending" if presses == 1 else "ascending"}"' in dom
    copy.write_text(page.read_text().replace("</body>", "<script>document.title = 'stolen'</script></body>"))
    dom, console = opened(copy, tmp_path)
    assert "stolen</title>" not in dom and "Content Security Policy" in console


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_in_a_browser_is_painted(theme, written, tmp_path):
    """Not what it shows, but that it shows: a background, and ink of several colours from top to bottom."""
    picture = photographed(written / "index.html", theme, tmp_path)
    assert picture.size == SCREEN
    colours = sorted(picture.getcolors(maxcolors=2**24), reverse=True)
    assert len(colours) > 50, "anti-aliased text alone has more"
    shares = [count / (SCREEN[0] * SCREEN[1]) for count, _ in colours]
    assert 0.3 < shares[0] < 0.98, "one colour covers a page that is blank"
    assert (sum(colours[0][1]) > 600) is (theme == "light")
    accent = {"light": (11, 122, 117), "dark": (79, 209, 197)}[theme]
    assert accent in {colour for _, colour in colours}, "links have it"
    for top in range(0, SCREEN[1], 400):  # each quarter has something on it
        assert len(picture.crop((0, top, SCREEN[0], top + 400)).getcolors(maxcolors=2**24)) > 10
