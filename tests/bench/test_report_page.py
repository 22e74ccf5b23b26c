"""The report's HTML page: what its text says, and opened in Chromium. All records here but the last are made up."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from bench import plotting
from bench.records.files import RESULTS
from bench.records.record import Measurement
from bench.report import cli, sections
from bench.report import data as report_data
from tests.bench.made_up import records

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREEN = (1280, 1600)


class Page(HTMLParser):
    """The addresses that a page loads, and its scripts."""

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
    """Open a page; return what is printed, and what the page's console said."""
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
