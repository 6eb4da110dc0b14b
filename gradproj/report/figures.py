"""Draws the page's figures with matplotlib, as SVG.

matplotlib is imported on use, since it is slow to import, and without pyplot.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradproj.formatting import human_seconds, one_line
from gradproj.report.distributions import Histogram
from gradproj.report.number_format import digits, exponent_of, in_cell, minus, power
from gradproj.report.svg import SOFT, Drawing, axes_at, default_settings, drawing_of, figure_of
from gradproj.report.throughput import Throughput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

WIDTH = 1100.0
MAX_RANKS = 64
"""With more ranks, the figure shows the fastest, the median and the slowest at each time."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_INK, _BLUE, _PALE, _GRID = "#1d2330", "#2f6297", "#b7cde3", "#e3e6ea"
_NEGATIVE, _POSITIVE = "#e08228", "#215c9e"
"""Colours of -1 and 1. The blue is darker, so that the sign shows in greyscale too."""
NAME_CHARACTERS = 25


def _round_ticks(axis: Any, most: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _value_axis(axes: "Axes", low: float, high: float, label: str, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if log:
        axes.set_xscale("log")
        subs = (1, 2, 5) if high < 1000 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    # 0.5, 20,000, 2e-07
    tick = FuncFormatter(lambda v, _: f"{v:,.0f}" if 1000 <= abs(v) < 1e6 else f"{v:g}")
    axes.xaxis.set_major_formatter(tick)
    axes.set_xlim(low, high)
    axes.set_xlabel(label, color=SOFT, fontsize=11)
    axes.spines["bottom"].set(visible=True, color="#8a8f98")


def value_range(least: float, most: float, log: bool) -> tuple[float, float]:
    """Return the ends of an axis, with some room where all values are equal.

    A logarithmic one ends eight decades below ``most``: a single zero would squeeze the rest.
    """
    if not log:
        return (least, most) if most > least else (least - 0.5, most + 0.5)
    least = max(least, most * 1e-8)
    return (least, most) if most > least > 0 else (max(least, 1e-30) / 2, max(most, 1e-30) * 2)


def coverage_chart(n_samples: int, missing: Sequence[tuple[int, int]]) -> Drawing:
    """Draw all sample ids from left to right, white where documents have not been computed."""
    with default_settings():
        figure = figure_of(WIDTH, 44)
        axes = axes_at(figure, 1, 1, WIDTH - 2, 24)
        axes.set(xlim=(0, n_samples), ylim=(0, 1))
        axes.barh(0.5, n_samples, 1, facecolor=_BLUE)
        # A gap narrower than a pixel would not be seen.
        least = 0.7 * n_samples / WIDTH
        gaps = [(start, max(stop - start, least)) for start, stop in _joined(missing, n_samples)]
        axes.broken_barh(gaps, (0.04, 0.92), facecolor="white")
        axes.barh(0.5, n_samples, 1, facecolor="none", edgecolor=_INK, linewidth=1)
        axes.set_yticks([])
        labels = [f"{i:,}" for i in (0, n_samples // 2, n_samples - 1)]
        axes.set_xticks([0, n_samples // 2 + 0.5, n_samples], labels)
        for label, side in zip(axes.get_xticklabels(), ("left", "center", "right"), strict=True):
            label.set(ha=side)
        axes.tick_params(pad=4)
        description = "A bar of all sample ids with gaps where rows are missing."
        return drawing_of(figure, "Completeness by sample id", description)


def _joined(ranges: Sequence[tuple[int, int]], n_samples: int) -> list[tuple[int, int]]:
    """Join ranges closer than half a pixel: an unfinished store of the Pile has thousands."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and start - joined[-1][1] < n_samples / WIDTH / 2:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def throughput_chart(speed: Throughput, ranks: Sequence[str]) -> Drawing:
    """Draw the tokens a second of all ranks, and below a strip for each rank, darker if faster."""
    strips = [(f"rank {name}", values) for name, values in zip(ranks, speed.by_rank, strict=True)]
    if len(strips) > MAX_RANKS:
        ordered = np.sort(speed.by_rank, axis=0)
        rows = (ordered[-1], ordered[len(ordered) // 2], ordered[0])
        strips = list(zip(("fastest", "median", "slowest"), rows, strict=True))
    each = 18 if len(strips) <= 16 else 9
    left, top, height = 150.0, 12.0, 190.0
    first_strip = top + height + 34
    seconds = float(speed.edges_s[-1])
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    unit, unit_s = next((each for each in units if seconds > 3 * each[1]), units[-1])
    fastest = max(float(speed.by_rank.max()), 1e-9)
    with default_settings():
        figure = figure_of(WIDTH, first_strip + each * len(strips) + 30)
        axes = axes_at(figure, left, top, WIDTH - 20 - left, height)
        axes.set(xlim=(0, seconds / unit_s), ylim=(0, 1.05 * max(float(speed.total.max()), 1e-9)))
        axes.stairs(speed.total, speed.edges_s / unit_s, fill=True, color=_PALE, alpha=0.5)
        axes.stairs(speed.total, speed.edges_s / unit_s, color=_BLUE, linewidth=1.6)
        _round_ticks(axes.yaxis, 5)
        _round_ticks(axes.xaxis, 8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {unit}")
        axes.grid(axis="y", color=_GRID, linewidth=1)
        axes.spines["bottom"].set(visible=True, color="#8a8f98")
        axes.set_ylabel("tokens/s", color=SOFT)
        axes.yaxis.set_label_coords(-115 / (WIDTH - 20 - left), 0.5)
        axes.set_zorder(1)  # lines of pauses go across the strips
        below = axes_at(figure, left, first_strip, WIDTH - 20 - left, each * len(strips))
        below.set(xlim=axes.get_xlim(), ylim=(len(strips), 0))
        for row, (_, values) in enumerate(strips):
            place = (row + 1 / each, 1 - 2 / each)
            _draw_strip(below, *place, speed.edges_s / unit_s, values / fastest)
        step = 1 if each > 10 else 2
        names = [one_line(name, 22) for name, _ in strips]
        below.set_yticks(np.arange(0.5, len(strips), step), names[::step])
        below.set_xticks([])
        label = f"a strip's colour: white 0, darkest {fastest:,.0f} tokens/s"
        below.set_xlabel(label, color=SOFT, loc="left")
        for place_s, idle_s in speed.pauses:
            x = place_s / unit_s
            end = 1 - (first_strip + each * len(strips) - top) / height
            axes.plot(
                [x, x], [1, end], transform=axes.get_xaxis_transform(), color=_INK, linewidth=1,
                dashes=(4, 3), clip_on=False,
            )  # fmt: skip
            axes.annotate(
                f"{human_seconds(idle_s)} idle", (x, 1), xycoords=axes.get_xaxis_transform(),
                xytext=(4, -10), textcoords="offset points", color=SOFT,
            )  # fmt: skip
        about = "Tokens a second of all ranks over the time of the job, and of each of"
        return drawing_of(figure, "Throughput over time", f"{about} {len(ranks)} ranks.")


def _draw_strip(
    axes: "Axes", top: float, height: float, edges: np.ndarray, shares: np.ndarray
) -> None:
    """Draw a row of cells; neighbours of one shade are one rectangle."""
    axes.barh(top + height / 2, edges[-1], height, facecolor="white", edgecolor="#d5d9df", lw=0.5)
    shades = np.round(np.clip(shares, 0, 1) * 20).astype(int)
    starts = np.flatnonzero(np.diff(shades, prepend=-1))
    stops = np.append(starts[1:], len(shades))
    shown = shades[starts] > 0
    spans = np.stack([edges[starts], edges[stops] - edges[starts]], axis=1)[shown]
    colours = diverging_colours()(0.5 + shades[starts][shown] / 40)
    axes.broken_barh(spans.tolist(), (top, height), facecolors=colours)


def histogram_chart(values: Histogram, title: str, unit: str, log: bool) -> Drawing:
    """Draw counts between the 0.1 % and the 99.9 % quantiles, with the median marked."""
    width, height, left, top = WIDTH / 2 - 20, 200.0, 60.0, 14.0
    low, high = value_range(values.quantile(0.001), values.quantile(0.999), log)
    edges = np.geomspace(low, high, 51) if log else np.linspace(low, high, 51)
    counts, median = values.between(edges), values.quantile(0.5)
    with default_settings():
        figure = figure_of(width, height)
        axes = axes_at(figure, left, top, width - 14 - left, height - 44 - top)
        _value_axis(axes, low, high, f"{title}, {unit}", log)
        axes.set_ylim(0, 1.12 * max(float(counts.max()), 1.0))  # room for the median's label
        _round_ticks(axes.yaxis, 4)
        axes.grid(axis="y", color=_GRID, linewidth=1)
        axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=_BLUE, ec="white", lw=0.6)
        axes.axvline(median, color=_INK, linewidth=1, dashes=(3, 3))
        on_the_left = axes.transLimits.transform((median, 0))[0] > 0.6
        if log:
            on_the_left = np.log(median / low) > 0.6 * np.log(high / low)
        axes.annotate(
            f"median {digits(median)}", (median, 1), xycoords=axes.get_xaxis_transform(),
            xytext=(-5 if on_the_left else 5, -8), textcoords="offset points",
            ha="right" if on_the_left else "left", color=SOFT,
        )  # fmt: skip
        return drawing_of(figure, title, f"Histogram of {values.n:,} documents: {title}, {unit}.")


def boxes_chart(
    names: Sequence[str], panels: Sequence[tuple[str, bool, Sequence[Histogram]]], description: str
) -> Drawing:
    """Draw a box of quantiles for each named group of documents and panel.

    A panel is ``(quantity and unit, logarithmic, a histogram for each group)``.
    """
    left, gap, each, top = 200.0, 34.0, 22.0, 8.0
    width = (WIDTH - left - 14 - gap * (len(panels) - 1)) / len(panels)
    with default_settings():
        figure = figure_of(WIDTH, top + each * len(names) + 46)
        for number, (label, log, groups) in enumerate(panels):
            axes = axes_at(figure, left + number * (width + gap), top, width, each * len(names))
            rows = [row for row, group in enumerate(groups) if group.n]
            at = np.array([[groups[row].quantile(q) for q in QUANTILES] for row in rows])
            low, high = value_range(at.min(initial=np.inf), at.max(initial=-np.inf), log)
            if not rows:
                low, high = 0.0, 1.0
            _value_axis(axes, low, high, label, log)
            axes.grid(axis="x", color=_GRID, linewidth=1)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks([])
            if rows:
                p5, p25, p50, p75, p95 = np.clip(at, low, high).T
                axes.hlines(rows, p5, p95, color=_BLUE, linewidth=1.2)
                axes.barh(rows, p75 - p25, 0.55, p25, facecolor=_PALE, edgecolor=_BLUE, zorder=3)
                ends = np.array(rows)
                axes.vlines(p50, ends - 0.27, ends + 0.27, color=_INK, linewidth=2, zorder=4)
        labels = [one_line(name, NAME_CHARACTERS) for name in names]
        figure.axes[0].set_yticks(range(len(names)), labels)
        figure.axes[0].tick_params(axis="y", labelsize=12, labelcolor=_INK)
        return drawing_of(figure, "Distributions by domain", description)


def matrix_chart(title: str, names: Sequence[str], values: np.ndarray) -> tuple[Drawing, str]:
    """Draw a matrix of domains; return also the power of ten that its numbers are in units of."""
    n = len(names)
    shown = [one_line(name, 20) for name in names]
    left, top = 200.0, 20 + 5.2 * max(map(len, shown))
    cell = min(64.0, (WIDTH - left - 70) / n)
    height = min(cell, 34.0)
    with default_settings():
        figure = figure_of(left + cell * n + 70, top + height * n + 6)
        axes = axes_at(figure, left, top, cell * n, height * n)
        exponent, _ = draw_matrix(axes, values, names, min(12.0, cell / 3.1))
        axes.tick_params(labelsize=12, labelcolor=_INK)
        about = f"{title}: a matrix of {n} domains; the numbers are in its cells."
        drawing = drawing_of(figure, title, about)
    return drawing, power(exponent)


# --- matrices ---


def diverging_colours() -> Any:
    """Return the colour map of matrices: orange below 0, white at 0, blue above."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("gradproj", [_NEGATIVE, "white", _POSITIVE])


def draw_matrix(
    axes: "Axes", values: np.ndarray, names: Sequence[str], font_size: float
) -> tuple[int, "QuadMesh"]:
    """Draw cells with their numbers; return the power of ten they are in and the cells."""
    exponent = exponent_of(values.ravel().tolist())
    numbers = values / 10.0**exponent
    limit, n = colour_limit(numbers), len(names)
    edges = np.arange(n + 1) - 0.5
    cells = axes.pcolormesh(
        edges, edges, numbers, cmap=diverging_colours(), vmin=-limit, vmax=limit,
        edgecolors="white", linewidth=1,
    )  # fmt: skip
    colours = cells.to_rgba(numbers)
    for (i, j), value in np.ndenumerate(numbers):
        ink = "white" if is_dark(colours[i, j]) else _INK
        text = axes.text(
            j, i, minus(in_cell(float(value))), ha="center", va="center", fontsize=font_size,
            color=ink,
        )  # fmt: skip
        # It fits its cell; measuring hundreds of texts takes seconds.
        text.set_in_layout(False)
    axes.set_ylim(n - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(n), [one_line(name, 20) for name in names],
        rotation=40, ha="left", va="baseline", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(range(n), [one_line(name, NAME_CHARACTERS) for name in names])
    axes.tick_params(top=False, left=False)
    axes.spines[:].set_visible(False)
    return exponent, cells


def is_dark(colour: np.ndarray) -> bool:
    """Return whether white text has a higher contrast (WCAG) than black on an RGB colour."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def colour_limit(matrix: np.ndarray) -> float:
    """Return the value at which the colours end: a little beyond the largest off the diagonal.

    The diagonal is far larger and would leave no colour for the rest. The limit is at least a
    fifth of the diagonal, so that small numbers do not look like large ones.
    """
    largest = float(np.abs(matrix).max(initial=0.0))
    off = float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).max(initial=0.0))
    return max(1.2 * off, 0.2 * largest) or 1.0
