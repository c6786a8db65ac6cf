"""The report's page: it needs nothing but itself, and a real browser shows it without a fault."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raydata_llm.job_report import JobReport
from raydata_llm.report_charts import time_label, time_marks, value_marks
from tests.raydata_llm.job_fakes import finished_job

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium on this machine (apt-get install chromium)")

# Run in the page: what a reader would see go wrong.
PROBE = """
<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message || event.target.src)), true);
addEventListener("load", () => {
  const box = element => element.getBoundingClientRect();
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")];
    texts.forEach((one, index) => texts.slice(index + 1).forEach(other => {
      const a = box(one), b = box(other);
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
        faults.push("labels overlap: " + one.textContent + " and " + other.textContent);
    }));
    for (const text of texts)
      if (box(text).right > innerWidth || box(text).left < 0) faults.push("cut off: " + text.textContent);
  }
  if (document.documentElement.scrollWidth > innerWidth) faults.push("the page is wider than the window");
  const svg = document.querySelector("svg.chart"), at = box(svg);
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: at.left + at.width * .6, clientY: at.top + 20}));
  const tip = document.getElementById("tip");
  document.body.dataset.probe = JSON.stringify({
    faults, charts: document.querySelectorAll("svg.chart").length, tip: tip.textContent,
    tipShown: getComputedStyle(tip).visibility, page: getComputedStyle(document.body).backgroundColor,
    drawn: [...document.querySelectorAll("path.line")].every(path => path.getTotalLength() > 100),
    requests: performance.getEntriesByType("resource").length,
  });
});
</script>
"""


def in_browser(report: JobReport, folder: Path, *options: str) -> dict[str, Any]:
    """What the probe sees of the report in headless Chromium."""
    page = folder / "page.html"
    page.write_text(report.to_html().replace("<body>", f"<body>{PROBE}", 1))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile", *options]
    dump = [*command, "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    run = subprocess.run(dump, capture_output=True, text=True, timeout=120)
    found = re.search(r'data-probe="([^"]*)"', run.stdout)
    assert found is not None, run.stderr[-2000:]
    probe: dict[str, Any] = json.loads(unescape(found[1]))
    return probe


@needs_browser
@pytest.mark.parametrize(("num_replicas", "width"), [(1, 1280), (16, 1280), (16, 420)])
def test_a_browser_shows_it_without_a_fault(num_replicas: int, width: int, tmp_path: Path) -> None:
    probe = in_browser(finished_job(num_replicas), tmp_path, f"--window-size={width},1400")
    assert probe["faults"] == []
    assert probe["charts"] == 6 and probe["drawn"] and probe["requests"] == 0
    assert probe["tipShown"] == "visible" and "output tokens/s" in probe["tip"]


@needs_browser
def test_it_follows_the_readers_dark_mode(tmp_path: Path) -> None:
    report = finished_job(1, seconds=80)
    light = in_browser(report, tmp_path)
    dark = in_browser(report, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert light["page"] == "rgb(246, 247, 249)" and dark["page"] == "rgb(15, 17, 21)"


class Outside(HTMLParser):
    """Collects whatever a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        loading = {"src", "href", "data", "srcset", "action"}
        self.found += [f"{tag} {name}={value}" for name, value in attributes if name in loading]
        self.found += [tag] * (tag in {"link", "iframe", "object", "embed", "base"})


def test_it_loads_nothing() -> None:
    page = finished_job(3).to_html()
    outside = Outside()
    outside.feed(page)
    assert outside.found == [] and "url(" not in page and "@import" not in page


def test_what_rows_say_cannot_become_markup() -> None:
    hostile = "<script>alert(1)</script><img src=x>"
    page = finished_job(1, note=hostile).to_html()
    assert hostile not in page and "&lt;script&gt;alert(1)" in page


def test_a_page_of_many_engines_stays_small() -> None:
    assert len(finished_job(64, seconds=120).to_html()) < 500_000


@pytest.mark.parametrize("highest", [0.003, 0.9, 1, 7, 42, 999, 1010, 71_900, 3.2e6])
def test_value_axes_have_a_few_round_ticks_that_hold_all(highest: float) -> None:
    marks = value_marks(highest)
    assert marks[0] == 0 and marks[-1] >= highest * 0.999 and 3 <= len(marks) <= 7
    assert marks[-1] <= 1.5 * highest, "no chart is mostly empty"


@pytest.mark.parametrize("seconds", [0.4, 3, 59, 61, 300, 3599, 8000, 90_000, 1_000_000])
def test_time_axes_have_a_few_round_ticks(seconds: float) -> None:
    marks = time_marks(seconds)
    assert 2 <= len(marks) <= 8 and marks[-1] <= seconds
    assert len({time_label(mark) for mark in marks}) == len(marks)
    steps = {round(later - sooner, 6) for sooner, later in pairwise(marks)}
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0"), (0.5, "0.5s"), (90, "1m 30s"), (5400, "1h 30m"), (172800, "2d")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert time_label(seconds) == text
