"""Converts matplotlib figures to the few SVG shapes that the page's template writes and escapes."""

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_PER_INCH = 72
"""Figures for the page have this dpi, so that a point is a CSS pixel."""
SOFT = "#5b6472"
"""Colour of labels: a contrast of 6 to 1 on white."""
_TAGS = ("path", "text")
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_SETTINGS: Any = {
    "font.size": 11,
    # Names of domains and layers are untrusted: a dollar sign must not start a formula.
    "text.parse_math": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Shape:
    """One SVG element: its tag, attributes and text."""

    tag: str
    attributes: dict[str, str]
    text: str


@dataclass(frozen=True)
class Drawing:
    """A figure for the page; screen readers read ``title`` and ``description``."""

    width: float
    height: float
    title: str
    description: str
    shapes: list[Shape]


@contextmanager
def default_settings() -> Iterator[None]:
    """Draw with matplotlib's defaults inside the block and restore the user's settings after it."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def figure_of(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in CSS pixels."""
    from matplotlib.figure import Figure

    size = (width / POINTS_PER_INCH, height / POINTS_PER_INCH)
    figure = Figure(figsize=size, dpi=POINTS_PER_INCH)
    figure.patch.set_visible(False)
    return figure


def axes_at(figure: "Figure", left: float, top: float, width: float, height: float) -> "Axes":
    """Add axes without frame and ticks at a place in pixels from the upper left."""
    whole_width, whole_height = figure.get_size_inches() * POINTS_PER_INCH
    bottom = whole_height - top - height
    size = (width / whole_width, height / whole_height)
    axes = figure.add_axes((left / whole_width, bottom / whole_height, *size))
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False, left=False, labelsize=11, labelcolor=SOFT, pad=8)
    axes.set_axisbelow(True)
    return axes


def drawing_of(figure: "Figure", title: str, description: str) -> Drawing:
    """Convert a figure, without metadata, ids, references, clipping and fonts.

    Without ids and dates, equal figures give equal bytes, and the figures of a page cannot refer to
    each other's parts. Artists must lie inside their axes, since nothing clips them.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written = io.StringIO()
    with warnings.catch_warnings():
        # The browser chooses the font, so a glyph that matplotlib's font lacks is no problem.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        FigureCanvasSVG(figure).print_svg(written)
    elements = ET.fromstring(written.getvalue()).iter()
    named = ((element.tag.rpartition("}")[2], element) for element in elements)
    chosen = [(tag, element) for tag, element in named if tag in _TAGS]
    shapes = [Shape(tag, _attributes(element), element.text or "") for tag, element in chosen]
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    return Drawing(float(width), float(height), title, description, shapes)


def _attributes(element: ET.Element) -> dict[str, str]:
    """Return the attributes, with styles as attributes and numbers of at most two decimals."""
    dropped = ["id", "style", "clip-path"]
    if element.get("transform", "").startswith("rotate(-0 "):
        dropped.append("transform")
    attributes = {k: v for k, v in element.attrib.items() if k not in dropped}
    for style in filter(None, element.get("style", "").split(";")):
        name, _, value = style.partition(":")
        if name.strip() != "font-family":
            attributes[name.strip()] = value.strip()
    return {k: _LONG_NUMBER.sub(_rounded, " ".join(v.split())) for k, v in attributes.items()}


def _rounded(match: re.Match) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")
