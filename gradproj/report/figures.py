"""The page's pictures: throughput, distributions, matrices."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradproj.formatting import human_seconds, one_line
from gradproj.report.distributions import Histogram
from gradproj.report.number_format import digits, exponent_of, in_cell, minus, power
from gradproj.report.svg import (
    Drawing,
    Scale,
    colour,
    colour_limit,
    is_dark,
    round_numbers,
    scale_for,
)
from gradproj.report.throughput import Throughput

WIDTH = 1100.0
MOST_RANKS = 64
"""With more, the picture shows the fastest, the median and the slowest at each time."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_AXIS: dict[str, Any] = {"stroke": "#8a8f98", "stroke_width": 1}
_GRID: dict[str, Any] = {"stroke": "#e3e6ea", "stroke_width": 1}
_NAME = 25
_INK, _SOFT, _BLUE, _PALE = "#1d2330", "#5b6472", "#2f6297", "#b7cde3"
_SMALL: dict[str, Any] = {"font_size": 11, "fill": _SOFT}


# --- throughput ---


def throughput_chart(found: Throughput, ranks: Sequence[str]) -> Drawing:
    """Tokens a second of all ranks as a line; below it a strip for each rank, the darker the faster."""
    strips = [(f"rank {name}", values) for name, values in zip(ranks, found.by_rank, strict=True)]
    if len(strips) > MOST_RANKS:
        ordered = np.sort(found.by_rank, axis=0)
        strips = [
            ("fastest", ordered[-1]),
            ("median", ordered[len(ordered) // 2]),
            ("slowest", ordered[0]),
        ]
    each = 18 if len(strips) <= 16 else 9
    left, top, height = 150.0, 12.0, 190.0
    below = top + height + 34
    picture = Drawing(
        WIDTH,
        below + each * len(strips) + 30,
        "Throughput over time",
        f"Tokens a second of all ranks over the time of the job, and of each of {len(ranks)} ranks.",
    )
    most = max(float(found.total.max()), 1e-9)
    seconds = float(found.edges_s[-1])
    x, y = Scale(0, seconds, left, WIDTH - 20), Scale(0, 1.05 * most, top + height, top)
    _throughput_axes(picture, x, y, seconds)
    points = []
    for start, stop, value in zip(found.edges_s, found.edges_s[1:], found.total, strict=False):
        points += [(x(start), y(value)), (x(stop), y(value))]
    area = [(x(0), y(0)), *points, (x(seconds), y(0))]
    picture.path(area, fill=_PALE, fill_opacity=0.5, stroke="none")
    picture.path(points, fill="none", stroke=_BLUE, stroke_width=1.6)
    fastest = max(float(found.by_rank.max()), 1e-9)
    for number, (name, values) in enumerate(strips):
        row = below + each * number
        if each > 10 or number % 2 == 0:
            picture.text(
                left - 8, row + each * 0.75, one_line(name, 22), text_anchor="end", **_SMALL
            )
        _strip(picture, x, row, each - 2, found.edges_s, values / fastest)
    bottom = below + each * len(strips)
    picture.text(
        left, bottom + 16, f"a strip's colour: white 0, darkest {fastest:,.0f} tokens/s", **_SMALL
    )
    for place, idle in found.pauses:
        picture.line(x(place), top, x(place), bottom, stroke=_INK, stroke_dasharray="4 3")
        picture.text(x(place) + 4, top + 10, f"{human_seconds(idle)} idle", **_SMALL)
    return picture


def _throughput_axes(picture: Drawing, x: Scale, y: Scale, seconds: float) -> None:
    for value in round_numbers(0, y.high, 5):
        picture.line(x.first, y(value), x.last, y(value), **_GRID)
        picture.text(x.first - 8, y(value) + 4, f"{value:,.0f}", text_anchor="end", **_SMALL)
    unit, size = next(
        ((u, s) for u, s in (("d", 86400), ("h", 3600), ("min", 60)) if seconds > 3 * s), ("s", 1)
    )
    for value in round_numbers(0, seconds / size, 8):
        at = x(value * size)
        picture.line(at, y.first, at, y.first + 4, **_AXIS)
        picture.text(at, y.first + 17, f"{value:g} {unit}", text_anchor="middle", **_SMALL)
    picture.line(x.first, y.first, x.last, y.first, **_AXIS)
    middle = (y.first + y.last) / 2
    picture.text(
        30,
        middle,
        "tokens/s",
        transform=f"rotate(-90 30 {middle:.0f})",
        text_anchor="middle",
        **_SMALL,
    )


def _strip(
    picture: Drawing, x: Scale, top: float, height: float, edges: np.ndarray, shares: np.ndarray
) -> None:
    """A line of cells; neighbours of one colour are one."""
    shades = np.round(np.clip(shares, 0, 1) * 20).astype(int)
    picture.rect(
        x.first, top, x.last - x.first, height, fill="#ffffff", stroke="#d5d9df", stroke_width=0.5
    )
    starts = np.flatnonzero(np.diff(shades, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(shades)], strict=True):
        if shades[start]:
            a, b = x(edges[start]), x(edges[stop])
            picture.rect(a, top, b - a, height, fill=colour(shades[start] / 20))


# --- distributions ---


def histogram_chart(values: Histogram, title: str, unit: str, log: bool) -> Drawing:
    """Counts between the 0.1 % and the 99.9 % of the values, with the middle marked."""
    width, height, left, top = WIDTH / 2 - 20, 200.0, 60.0, 14.0
    picture = Drawing(
        width, height, title, f"Histogram of {values.n:,} documents: {title}, {unit}."
    )
    x = scale_for(values.quantile(0.001), values.quantile(0.999), left, width - 14, log)
    at = np.geomspace(x.low, x.high, 51) if log else np.linspace(x.low, x.high, 51)
    counts = values.between(at)
    y = Scale(0, max(float(counts.max()), 1.0), height - 44, top)
    for value in round_numbers(0, y.high, 4):
        picture.line(left, y(value), width - 14, y(value), **_GRID)
        picture.text(left - 6, y(value) + 4, f"{value:,.0f}", text_anchor="end", **_SMALL)
    for start, stop, n in zip(at, at[1:], counts, strict=False):
        picture.rect(x(start), y(n), x(stop) - x(start) - 0.6, y.first - y(n), fill=_BLUE)
    _value_axis(picture, x, y.first, f"{title}, {unit}")
    middle = values.quantile(0.5)
    picture.line(x(middle), top, x(middle), y.first, stroke=_INK, stroke_dasharray="3 3")
    side = "end" if x(middle) > width * 0.6 else "start"
    shift = -5 if side == "end" else 5
    picture.text(x(middle) + shift, top + 8, f"median {digits(middle)}", text_anchor=side, **_SMALL)
    return picture


def _value_axis(picture: Drawing, x: Scale, y: float, label: str) -> None:
    picture.line(x.first, y, x.last, y, **_AXIS)
    for value in x.ticks():
        picture.line(x(value), y, x(value), y + 4, **_AXIS)
        picture.text(x(value), y + 17, _tick(value), text_anchor="middle", **_SMALL)
    picture.text((x.first + x.last) / 2, y + 35, label, text_anchor="middle", **_SMALL)


def _tick(value: float) -> str:
    """``0.5``, ``20,000``, ``2e-07``."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:g}"


def boxes_chart(
    names: Sequence[str], panels: Sequence[tuple[str, bool, Sequence[Histogram]]], description: str
) -> Drawing:
    """A line for each group of documents, with a box of its quantiles in every panel.

    Args:
        names: of the groups.
        panels: ``(what and in which unit, logarithmic, a histogram for each group)``.
        description: for those who cannot see it.
    """
    left, gap, each, top = 200.0, 34.0, 22.0, 8.0
    width = (WIDTH - left - 14 - gap * (len(panels) - 1)) / len(panels)
    bottom = top + each * len(names)
    picture = Drawing(WIDTH, bottom + 46, "Distributions by domain", description)
    for number, name in enumerate(names):
        y = top + each * (number + 0.5)
        shown = one_line(name, _NAME)
        picture.text(
            left - 10,
            y + 4,
            shown,
            hover=one_line(name, 200),
            text_anchor="end",
            font_size=12,
            fill=_INK,
        )
    for place, (label, log, values) in enumerate(panels):
        first = left + place * (width + gap)
        ends = [(v.quantile(QUANTILES[0]), v.quantile(QUANTILES[-1])) for v in values if v.n]
        low, high = min((a for a, _ in ends), default=0.0), max((b for _, b in ends), default=1.0)
        x = scale_for(low, high, first, first + width, log)
        for value in x.ticks():
            picture.line(x(value), top, x(value), bottom, **_GRID)
        for number, histogram in enumerate(values):
            if histogram.n:
                _box(picture, x, top + each * (number + 0.5), histogram, names[number])
        _value_axis(picture, x, bottom, label)
    return picture


def _box(picture: Drawing, x: Scale, y: float, values: Histogram, name: str) -> None:
    at = [values.quantile(q) for q in QUANTILES]
    hover = f"{one_line(name, 60)}: " + ", ".join(
        f"{q:.0%} {digits(v)}" for q, v in zip(QUANTILES, at, strict=True)
    )
    picture.line(x(at[0]), y, x(at[4]), y, stroke=_BLUE, stroke_width=1.2)
    picture.rect(
        x(at[1]),
        y - 6,
        max(x(at[3]) - x(at[1]), 1),
        12,
        hover,
        fill=_PALE,
        stroke=_BLUE,
        stroke_width=1,
    )
    picture.line(x(at[2]), y - 6, x(at[2]), y + 6, stroke=_INK, stroke_width=2)


# --- matrices ---


def matrix_chart(title: str, names: Sequence[str], values: np.ndarray) -> tuple[Drawing, str]:
    """Cells with their numbers, coloured up to the largest off the diagonal; and the power of ten they are in."""
    n = len(names)
    exponent = exponent_of(values.ravel().tolist())
    numbers = values / 10.0**exponent
    limit = colour_limit(numbers)
    longest = max(len(one_line(name, 20)) for name in names)
    left, top = 200.0, 20 + 5.2 * longest
    cell = min(64.0, (WIDTH - left - 70) / n)
    height = min(cell, 34.0)
    picture = Drawing(
        left + cell * n + 70,
        top + height * n + 6,
        title,
        f"{title}: a matrix of {n} domains; the numbers are in its cells.",
    )
    size = min(12.0, cell / 3.1)
    for i, name in enumerate(names):
        shown = one_line(name, _NAME)
        y, x = top + height * (i + 0.5) + 4, left + cell * (i + 0.5)
        picture.text(
            left - 10,
            y,
            shown,
            hover=one_line(name, 200),
            text_anchor="end",
            font_size=12,
            fill=_INK,
        )
        turn = f"translate({x:.1f} {top - 8:.0f}) rotate(-40)"
        picture.text(0, 0, one_line(name, 20), transform=turn, font_size=12, fill=_INK)
    for (i, j), value in np.ndenumerate(numbers):
        share = value / limit
        x, y = left + cell * j, top + height * i
        pair = f"{one_line(names[i], 60)} × {one_line(names[j], 60)}: {digits(float(values[i, j]))}"
        picture.rect(x, y, cell - 1, height - 1, pair, fill=colour(share))
        text = minus(in_cell(float(value)))
        ink = "#ffffff" if is_dark(colour(share)) else _INK
        picture.text(
            x + cell / 2 - 0.5,
            y + height / 2 + size * 0.36,
            text,
            text_anchor="middle",
            font_size=round(size, 1),
            fill=ink,
        )
    return picture, power(exponent)
