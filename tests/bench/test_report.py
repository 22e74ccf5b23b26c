"""The report: numbers, Markdown, pictures. All records here are made up."""

from __future__ import annotations

import re
import subprocess

import pytest

from bench import plotting
from bench.records.record import write_records
from bench.report import cli, sections
from bench.report import data as report_data
from bench.report.speedup import speedups
from tests.bench.made_up import ENVIRONMENT, TARGETS, measurement, records, run


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
    assert "In counts: forward 1 even, 2 slower." in page
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
    monkeypatch.setattr(cli, "OUT", tmp_path / "out")  # which git ignores
    assert run("--results", results) == 0
    assert (tmp_path / "out" / "report" / "index.html").exists() and not (tmp_path / "docs").exists()
    assert run("--results", results, "--record") == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}
    assert run("--results", results, "--record") == 0
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "docs").iterdir()}, "as often as one likes"


def test_bad_input(results, tmp_path, capsys):
    assert run("--results", tmp_path / "nowhere") == 2
    assert "--results: must hold a device's folder with records, got none" in capsys.readouterr().err
    assert run("--results", results, "--device", "made-up-gpu") == 2
    assert "got 'made-up-gpu'; did you mean made-up-cpu?" in capsys.readouterr().err
    (results / "made-up-cpu" / "kernels.json").write_text("{")
    assert run("--results", results, "--out", tmp_path) == 2
    assert "kernels.json must be a JSON file" in capsys.readouterr().err
