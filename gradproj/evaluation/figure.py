"""Draws the linear datamodeling score of methods against the bytes that they read of a document."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradproj.evaluation.method_names import GradientMethod
from gradproj.files import explain_os_errors
from gradproj.formatting import human_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (
    "#2f6297", "#d94801", "#3b8a3b", "#7b4ba0", "#8c564b", "#b8860b", "#17859b", "#222222",
    "#c2578f", "#8a9a2b",
)  # fmt: skip
PANEL_INCHES = (5.0, 4.6)


def draw(experiments: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each experiment.

    Args:
        experiments: title -> content of its ``lds.json``. Methods of rows are points at their
            bytes, joined where only the number of values differs, with one standard error over
            queries; methods without rows are dashed lines.
        path: file to write, ``.svg`` or ``.png``.
    """
    # Imported here, since it is slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * len(experiments), height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(experiments), squeeze=False)[0]
    methods = [item for results in experiments.values() for item in results["methods"].items()]
    names = sorted(name for name, result in methods if result["row_bytes"] is not None)
    colours = _colours(dict.fromkeys(map(_family, names)))
    for axes, (title, results) in zip(panels, experiments.items(), strict=True):
        _panel(axes, results["methods"], colours)
        axes.set_title(title, fontsize=10)
    _legend(figure, panels)
    panels[0].set_ylabel("linear datamodeling score")
    with explain_os_errors(path):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """Name every kind of rows once, below the panels."""
    handles: dict[str, Any] = {}
    for axes in panels:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    if handles:
        title = "score/rows; a point's number is K, for K x K values of each layer"
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2 * len(panels),
            frameon=False, fontsize=8, title=title, title_fontsize=8,
        )  # fmt: skip


def _family(name: str) -> str:
    """Return a method's name without its number of values, and without a damping."""
    first, *added = name.split("+")
    method = GradientMethod.of(first)
    if method is None:
        return name
    kind = first.removeprefix(f"{method.score}@{method.rows.k}")
    return "+".join([method.score + kind, *added])


def _colours(families: Sequence[str] | Mapping[str, None]) -> dict[str, str]:
    return {family: COLOURS[i % len(COLOURS)] for i, family in enumerate(families)}


def _panel(axes: "Axes", methods: Mapping[str, Any], colours: Mapping[str, str]) -> None:
    points: dict[str, list[tuple[int, float, float, str]]] = {}
    lines = []
    for name, result in methods.items():
        mean, error = result["lds"]["mean"], result["lds"]["over_queries"] or 0.0
        if result["row_bytes"] is None:
            lines.append((mean, name))
        else:
            point = (result["row_bytes"], mean, error, name)
            points.setdefault(_family(name), []).append(point)
    for family, found in points.items():
        xs, ys, errors, names = zip(*sorted(found), strict=True)
        axes.errorbar(
            xs, ys, errors, marker="o", markersize=4, linewidth=1.2, capsize=2, label=family,
            color=colours[family],
        )  # fmt: skip
        for x, y, name in zip(xs, ys, names, strict=True):
            method = GradientMethod.of(name.split("+")[0])
            axes.annotate(
                method.rows.k if method else "", (x, y), xytext=(4, 3), fontsize=7,
                textcoords="offset points", color=colours[family],
            )  # fmt: skip
    for mean, name in lines:
        axes.axhline(mean, color="#8a8f98", linestyle="--", linewidth=0.9, zorder=0)
        axes.annotate(
            name, (1, mean), xycoords=("axes fraction", "data"), xytext=(3, -3), fontsize=8,
            textcoords="offset points", color="#5a5f68",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: human_bytes(int(value)))
    axes.minorticks_off()
    axes.set_xlabel("bytes per document")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
