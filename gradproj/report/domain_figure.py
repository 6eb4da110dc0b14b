"""The domains' figure: matrices and facts of each domain as one PNG. Only on use: matplotlib is an extra."""

import importlib.util
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN
from gradproj.files import explain_os_errors
from gradproj.formatting import one_line
from gradproj.report.domain_summary import DomainFacts
from gradproj.report.number_format import digits, exponent_of, in_cell, minus, power
from gradproj.report.svg import colour_limit, is_dark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_DOMAINS = 40
"""Those with the most rows, where there are more: cells of more cannot be read."""
MOST_BESIDE = 10
"""Matrices of more domains stand below each other."""
COLOURS = "RdBu"
"""Red below 0, blue above, white at 0."""
_NAME, _CELL = 24, 0.42
_BARS = (
    ("rows", "documents with a row"),
    ("loss", "loss, nats per target token"),
    ("norm", "mean norm of the rows"),
    ("rank", "effective rank"),
)


def why_no_figure() -> str | None:
    """Why no figure can be drawn, with the way out; None where one can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no figure was drawn: matplotlib is not installed; pip install 'gradproj[plot]' brings it"
    return None


def draw_domains(facts: DomainFacts, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    shown = _most(facts)
    n, names = len(shown), [one_line(facts.matrix.names[i], _NAME) for i in shown]
    side, bars = max(2.6, _CELL * n), 0.28 * n + 1.1
    beside = n <= MOST_BESIDE
    width = 2 * side + 6.4 if beside else max(11.0, side + 4.6)
    heights = [bars, side + 2.0] if beside else [bars, side + 2.0, side + 2.0]
    figure = Figure(
        figsize=(width, sum(heights) + 1.6),
        dpi=110,
        layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1),
    )
    FigureCanvasAgg(figure)
    left_out = len(facts.matrix.names) - n
    rest = f" ({left_out} without rows or with fewer are left out)" if left_out else ""
    figure.suptitle(f"Domains of {one_line(facts.output, 80)}{rest}", parse_math=False, fontsize=12)
    about = (
        "Influence: mean score over all pairs of documents (also with themselves), one domain's as queries. Score "
        f"{facts.score}: {MEANINGS[facts.score]}. {SIGN.capitalize()}. Colours end beyond the largest value off the "
        "diagonal."
    )
    figure.supxlabel(textwrap.fill(about, int(12.5 * width)), fontsize=8.5, parse_math=False)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    _draw_bars(parts[0], facts, shown, names)
    first, second = parts[1].subfigures(1, 2) if beside else parts[1:]
    _draw_matrix(
        first, "Cosine of the mean gradients", facts.matrix.cosine, shown, names, "no unit"
    )
    title = f"Influence between domains ({facts.score})"
    _draw_matrix(second, title, facts.matrix.influence, shown, names, "mean score")
    with explain_os_errors(path):
        figure.savefig(path)


def _most(facts: DomainFacts) -> list[int]:
    largest = sorted(facts.shown, key=lambda i: -facts.matrix.n_rows[i])[:MOST_DOMAINS]
    return [i for i in facts.shown if i in set(largest)]


def _draw_bars(part: Any, facts: DomainFacts, shown: list[int], names: list[str]) -> None:
    """A bar for each domain and fact, with its number; domains in the order of the matrices."""
    matrix, at = facts.matrix, np.arange(len(shown))
    values = {
        "rows": matrix.n_rows,
        "loss": matrix.loss,
        "norm": matrix.grad_norm,
        "rank": matrix.effective_rank,
    }
    panels = part.subplots(1, len(_BARS), sharey=True)
    for axes, (key, label) in zip(panels, _BARS, strict=True):
        chosen = values[key][shown].astype(np.float64)
        axes.barh(at, chosen, height=0.7, color="#9fb8d0")
        for y, value in zip(at, chosen, strict=True):
            text = f"{int(value):,}" if key == "rows" else digits(float(value))
            axes.annotate(
                text, (0, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
            )
        axes.set_title(label, fontsize=9)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].set_yticks(at, names, fontsize=8, parse_math=False)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)


def _draw_matrix(
    part: Any, title: str, values: np.ndarray, shown: list[int], names: list[str], unit: str
) -> None:
    """A matrix with its numbers in the cells, in units of a power of ten."""
    chosen = values[np.ix_(shown, shown)]
    exponent = exponent_of(chosen.ravel().tolist())
    chosen = chosen / 10.0**exponent
    limit = colour_limit(chosen)
    axes: Axes = part.subplots()
    image = axes.imshow(chosen, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="equal")
    colours = image.to_rgba(chosen, bytes=True)[..., :3]
    for (i, j), value in np.ndenumerate(chosen):
        text = minus(in_cell(value))
        ink = "white" if is_dark("#" + colours[i, j].tobytes().hex()) else "black"
        number = axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
        number.set_in_layout(
            False
        )  # it lies in its cell: hundreds of them would be measured for nothing
    axes.set_xticks(
        range(len(names)),
        names,
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
        parse_math=False,
    )
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize=10)
    bar = part.colorbar(image, ax=axes, extend="both", fraction=0.04, pad=0.02)
    bar.set_label(unit + (f", in {power(exponent)}" if exponent else ""), fontsize=8)
    bar.ax.tick_params(labelsize=7)
