"""The report's page in a real browser: layout, print, no scripts."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers.report_page import SCRIPT, browse, browser, shared_job


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return shared_job(tmp_path_factory.getbasetemp() / "report").page


pytestmark = pytest.mark.skipif(
    browser() is None, reason="no Chromium is installed (Debian: chromium)"
)

MEASURE = """<script>
const wide = [...document.querySelectorAll("td, th, dd, p, figure, nav, h1, h2, h3")]
  .filter(e => e.scrollWidth > e.clientWidth + 1);
document.title = [document.documentElement.scrollWidth, window.innerWidth,
  wide.map(e => e.tagName + " " + e.textContent.slice(0, 40)).join(", "),
  getComputedStyle(document.documentElement).backgroundColor].join("|");
</script></body>"""


def test_no_injected_script_runs_even_without_the_page_s_own_policy(page, tmp_path):
    unguarded = tmp_path / "unguarded.html"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    unguarded.write_text(text, encoding="utf-8")
    shown = browse(unguarded, tmp_path, "--dump-dom")
    assert "<title>gradproj report: " in shown
    assert "<title>owned" not in shown
    # Control: a script of our own does run there and changes the title.
    control = tmp_path / "control.html"
    control.write_text(text.replace("</body>", f"{SCRIPT}</body>"), encoding="utf-8")
    assert "<title>owned</title>" in browse(control, tmp_path, "--dump-dom")
    guarded = tmp_path / "guarded.html"
    guarded.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{SCRIPT}</body>"))
    assert "<title>owned</title>" not in browse(guarded, tmp_path, "--dump-dom")


@pytest.mark.parametrize("width", [1366, 900])
def test_nothing_is_wider_than_the_window_or_overflows_its_cell(page, tmp_path, width):
    measured = tmp_path / "measured.html"
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    measured.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    shown = browse(measured, tmp_path, "--dump-dom", width=width)
    title = re.search(r"<title>(.*?)</title>", shown)[1]
    scrolled, window, too_wide, background = title.split("|")
    assert int(scrolled) <= int(window) == width
    assert not too_wide
    assert background == "rgb(244, 245, 247)"


def test_screenshot_shows_dark_text_and_figures_on_a_light_background(page, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "shot.png"
    browse(page, tmp_path, f"--screenshot={path}", height=4000)
    picture = imread(path)[..., :3]
    assert picture.shape[:2] == (4000, 1366)
    assert picture.mean() > 0.85
    inked = (picture.min(axis=2) < 0.35).mean(axis=1)
    assert all(part.max() > 0.005 for part in np.array_split(inked, 8)), (
        "a part of the page is blank"
    )
    coloured = np.ptp(picture, axis=2) > 0.2
    assert coloured.mean() > 0.005  # the figures
    assert (picture[:, :20] > 0.9).all()  # nothing runs out of the margin
    assert (picture[:, -20:] > 0.9).all()


def test_printed_pages_hold_every_section(page, tmp_path):
    path = tmp_path / "report.pdf"
    browse(page, tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={path}")
    data = path.read_bytes()
    assert data.startswith(b"%PDF")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b(?!s)", data)) <= 30
    if shutil.which("pdftotext"):
        text = subprocess.run(
            ["pdftotext", "-layout", path, "-"], capture_output=True, check=True
        ).stdout
        for heading in (
            "The run",
            "Throughput",
            "Losses and norms",
            "Domains",
            "Outliers",
            "Queries",
        ):
            assert heading in text.decode()
        assert text.decode().count("rank") >= 4
