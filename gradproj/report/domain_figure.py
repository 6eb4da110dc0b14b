"""Draws the PNG of ``domains``: facts of each domain and the two matrices."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN
from gradproj.formatting import one_line
from gradproj.report.domain_summary import DomainFacts
from gradproj.report.figures import NAME_CHARACTERS, draw_matrix
from gradproj.report.number_format import digits, power
from gradproj.report.svg import default_settings
from gradproj.storage.results import write_result

MAX_DRAWN_DOMAINS = 40
"""Domains in the PNG, those with the most rows: more cells cannot be read."""
MAX_DOMAINS_BESIDE = 10
"""Matrices of more domains stand below each other."""
_BARS = {
    "n_rows": "documents with a row",
    "loss": "loss, nats per target token",
    "grad_norm": "mean norm of the rows",
    "effective_rank": "effective rank",
}


def draw_domains(facts: DomainFacts, path: Path) -> None:
    """Write a PNG with the facts of each domain and the two matrices."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = facts.largest(MAX_DRAWN_DOMAINS)
    n, names = len(shown), [facts.matrix.names[i] for i in shown]
    side, bars = max(2.6, 0.42 * n), 0.28 * n + 1.1
    beside = n <= MAX_DOMAINS_BESIDE
    width = 2 * side + 6.4 if beside else max(11.0, side + 4.6)
    heights = [bars, side + 2.0] if beside else [bars, side + 2.0, side + 2.0]
    left_out = len(facts.matrix.names) - n
    rest = f" ({left_out} without rows or with fewer are left out)" if left_out else ""
    about = (
        "Influence: mean score over all pairs of documents (including each with itself), one "
        f"domain's as queries. Score {facts.score}: {MEANINGS[facts.score]}. {SIGN.capitalize()}. "
        "Colours end beyond the largest value off the diagonal."
    )
    with default_settings():
        layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1)
        figure = Figure(figsize=(width, sum(heights) + 1.6), dpi=110, layout=layout)
        FigureCanvasAgg(figure)
        figure.suptitle(f"Domains of {one_line(facts.output, 80)}{rest}", fontsize=12)
        figure.supxlabel(textwrap.fill(about, int(12.5 * width)), fontsize=8.5)
        parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
        _draw_bars(parts[0], facts, shown)
        places = parts[1].subfigures(1, 2) if beside else parts[1:]
        influence = f"Influence between domains ({facts.score})"
        for place, title, values, unit in (
            (places[0], "Cosine of the mean gradients", facts.matrix.cosine, "no unit"),
            (places[1], influence, facts.matrix.influence, "mean score"),
        ):
            axes = place.subplots()
            exponent, cells = draw_matrix(axes, values[np.ix_(shown, shown)], names, 7)
            axes.tick_params(labelsize=8)
            axes.set_aspect("equal")
            axes.set_title(title, fontsize=10)
            bar = place.colorbar(cells, ax=axes, extend="both", fraction=0.04, pad=0.02)
            bar.set_label(unit + (f", in {power(exponent)}" if exponent else ""), fontsize=8)
            bar.ax.tick_params(labelsize=7)
        image = io.BytesIO()
        figure.savefig(image)  # a PNG, by these settings
    write_result("--output_dir", path, [image.getbuffer()])


def _draw_bars(part: Any, facts: DomainFacts, shown: list[int]) -> None:
    """Draw a bar for each domain and fact, with its number; domains in the matrices' order."""
    matrix, rows = facts.matrix, np.arange(len(shown))
    panels = part.subplots(1, len(_BARS), sharey=True)
    for axes, (key, label) in zip(panels, _BARS.items(), strict=True):
        chosen = getattr(matrix, key)[shown].astype(np.float64)
        axes.barh(rows, chosen, height=0.7, color="#9fb8d0")
        for row, value in zip(rows, chosen, strict=True):
            text = f"{int(value):,}" if key == "n_rows" else digits(float(value))
            place: Any = {"xytext": (3, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (0, row), **place, fontsize=7.5)
        axes.set_title(label, fontsize=9)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    names = [one_line(matrix.names[i], NAME_CHARACTERS) for i in shown]
    panels[0].set_yticks(rows, names, fontsize=8)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
