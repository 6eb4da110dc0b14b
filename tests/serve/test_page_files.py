"""The page's files: nothing from outside, no HTML from strings, contrast by WCAG."""

import re
from importlib import resources

import pytest

pytest.importorskip("starlette")

from gradproj.serve.app import page_files

FILES = {
    file.name: file.read_text(encoding="utf-8")
    for file in resources.files("gradproj.serve").joinpath("page").iterdir()
}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}
NAMESPACE = "http://www.w3.org/2000/svg"
AA_TEXT, AA_EDGES = 4.5, 3.0
"""WCAG 2.2, success criteria 1.4.3 and 1.4.11."""


def test_every_file_is_served_and_loads_only_files_that_are():
    assert page_files().keys() == FILES.keys()
    for text in FILES.values():
        for name in re.findall(r'(?:from |href=|src=)"(?:\./|/page/)([^"]+)"', text):
            assert name in FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_address_outside_the_server(name):
    text = FILES[name].replace(NAMESPACE, "")
    assert not re.search(r"\b(?:https?|wss?|ftp):|url\(|@import|[\"'(]//", text)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_text_becomes_html_or_code(name):
    ways = r"innerHTML|outerHTML|insertAdjacent|document\.write|DOMParser|createContextual"
    ways += r"|\beval\b|new Function|srcdoc|javascript:|setAttribute\(.style|import\("
    assert not re.search(ways, SCRIPTS[name])


def themes():
    """Return the variables of the light and of the dark theme."""
    light, dark = re.findall(r":root[^{]*\{([^}]*)\}", FILES["style.css"])[:2]
    read = [dict(re.findall(r"--([\w-]+):\s*([^;]+);", block)) for block in (light, dark)]
    assert read[0].keys() == read[1].keys()
    return dict(zip(("light", "dark"), read, strict=True))


def rgb(value):
    if value.startswith("#"):
        return [int(value[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(x) for x in value.split()]


def luminance(colour):
    parts = [x / 255 for x in colour]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast(rgb("#767676"), rgb("#ffffff")) == pytest.approx(4.54, abs=0.005)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_and_edges_stand_out_from_what_is_behind_them(theme):
    colours = themes()[theme]
    grounds = {name: rgb(colours[name]) for name in ("paper", "panel")}
    for ground in list(grounds.values()):
        for sign in ("positive", "negative"):  # the darkest shade behind a token or a number
            alpha = float(colours["most-shade"])
            mixed = zip(rgb(colours[sign]), ground, strict=True)
            shade = [alpha * a + (1 - alpha) * b for a, b in mixed]
            assert contrast(rgb(colours["ink"]), shade) >= AA_TEXT
        for name in ("ink", "soft", "accent", "bad"):
            assert contrast(rgb(colours[name]), ground) >= AA_TEXT, name
        assert contrast(rgb(colours["edge"]), ground) >= AA_EDGES
    assert contrast(rgb(colours["on-accent"]), rgb(colours["accent"])) >= AA_TEXT
    assert contrast(rgb(colours["ink"]), rgb(colours["line"])) >= AA_TEXT  # shared passages
