"""Figures of the page: ticks, places, colours, and SVG that is safe to embed."""

import numpy as np
import pytest
from helpers.report_parts import histogram_of, times_of

from gradproj.report.figures import (
    MAX_RANKS,
    boxes_chart,
    colour_limit,
    coverage_chart,
    diverging_colours,
    histogram_chart,
    is_dark,
    matrix_chart,
    throughput_chart,
    value_range,
)
from gradproj.report.svg import drawing_of
from gradproj.report.throughput import throughput


def words_of(drawing):
    return [shape.text for shape in drawing.shapes if shape.tag == "text"]


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        (np.linspace(0, 10, 10_001), False, ["2", "4", "6", "8"]),
        (np.linspace(0.21, 0.83, 10_001), False, ["0.4", "0.6", "0.8"]),
        (np.geomspace(0.01, 100, 10_001), True, ["0.1", "1", "10"]),
        (np.geomspace(3, 40, 10_001), True, ["5", "10", "20"]),
    ],
)
def test_axis_has_round_ticks_and_ends_at_the_quantiles(monkeypatch, values, log, labels):
    figures = []

    def keep_figure(figure, title, description):
        figures.append(figure)
        return drawing_of(figure, title, description)

    monkeypatch.setattr("gradproj.report.figures.drawing_of", keep_figure)
    # A few values far beyond the quantiles neither widen the axis nor move a tick.
    values = np.concatenate([values, [values[0] / 1000 - 1e-5, values[-1] * 1000]])
    drawing = histogram_chart(histogram_of(values), "loss", "nats", log)
    (axes,) = figures[0].axes
    ends = np.quantile(values, [0.001, 0.999])
    assert axes.get_xlim() == pytest.approx(ends, rel=0.005, abs=0.005)
    low, high = axes.get_xlim()
    # Releases of matplotlib differ in the ticks beyond the axis, which they do not draw.
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks == pytest.approx([float(label) for label in labels])
    words = words_of(drawing)
    assert words[: words.index("loss, nats")] == labels


def test_axis_leaves_room_around_equal_values_and_a_logarithmic_one_cuts_zeros_off():
    assert value_range(1, 3, log=False) == (1, 3)
    assert value_range(2, 2, log=False) == (1.5, 2.5)
    assert value_range(0, 100, log=True) == (1e-6, 100)
    assert value_range(3, 3, log=True) == (1.5, 6)
    low, high = value_range(0, 0, log=True)
    assert 0 < low < high


def test_boxes_are_drawn_at_the_quantiles():
    values = histogram_of(np.linspace(0, 100, 20_001))
    panels = [("loss", False, [values, histogram_of([])])]
    drawing = boxes_chart(["all", "none"], panels, "boxes")
    points = [shape.attributes for shape in drawing.shapes if shape.tag == "path"]
    # Axes run from the 5 % to the 95 % quantile and are 200 px from the left, 14 px from the right.
    left, right = 200, 1100 - 14
    median = left + (right - left) * (50 - 5) / 90
    (mark,) = [a for a in points if a.get("stroke-width") == "2"]
    assert float(mark["d"].split()[1]) == pytest.approx(median, abs=2)
    (box,) = [a for a in points if a.get("fill") == "#b7cde3"]
    corners = [float(x) for x in box["d"].replace("z", "").split()[1::3]]
    for got, quantile in ((min(corners), 25), (max(corners), 75)):
        assert got == pytest.approx(left + (right - left) * (quantile - 5) / 90, abs=2)


def test_coverage_is_white_where_rows_are_missing_and_joins_gaps_closer_than_a_pixel():
    shapes = coverage_chart(1100, [(110, 220), (990, 1100)]).shapes
    gaps = [s.attributes["d"] for s in shapes if s.attributes.get("fill") == "#ffffff"]
    spans = [sorted({float(x) for x in d.replace("z", "").split()[1::3]}) for d in gaps]
    assert spans == [
        pytest.approx([1 + start * 1098 / 1100, 1 + stop * 1098 / 1100], abs=0.02)
        for start, stop in ((110, 220), (990, 1100))
    ]
    many = [(i, i + 1) for i in range(0, 1_000_000, 100)]
    drawn = coverage_chart(1_000_000, many).shapes
    assert len([s for s in drawn if s.attributes.get("fill") == "#ffffff"]) == 1


def test_throughput_figure_of_many_ranks_shows_the_fastest_median_and_slowest():
    n = MAX_RANKS + 1
    speed = throughput(times_of([(0, 10, 10 * (rank + 1), rank) for rank in range(n)], n))
    picture = throughput_chart(speed, [str(rank) for rank in range(n)])
    words = [shape.text for shape in picture.shapes if shape.tag == "text"]
    assert {"fastest", "median", "slowest"} <= set(words)
    assert not [word for word in words if word.startswith("rank")]
    few = throughput_chart(throughput(times_of([(0, 10, 5, 0), (0, 10, 5, 1)], 2)), ["0", "1"])
    assert {"rank 0", "rank 1"} <= {shape.text for shape in few.shapes}


def every_chart():
    values = histogram_of(np.linspace(0.1, 9, 500))
    speed = throughput(times_of([(0, 10, 500, 0), (5, 2000, 800, 1), (90000, 90010, 9, 1)], 2))
    names = [
        "$\\frac{1}{0}$",
        "</text><script>alert(1)</script>",
        "\u202eevil\x1b[31m\n",
        "Википедия",
    ]
    matrix = np.cos(np.arange(16.0).reshape(4, 4))
    return [
        coverage_chart(50, [(3, 9)]),
        throughput_chart(speed, names[:2]),
        histogram_chart(values, "loss", "nats", log=False),
        boxes_chart(names, [("loss", True, [values] * 4)], "boxes"),
        matrix_chart("cosine", names, matrix)[0],
    ]


def test_drawings_are_small_deterministic_and_without_references():
    drawings = every_chart()
    assert drawings == every_chart()
    for drawing in drawings:
        assert 5 < len(drawing.shapes) < 1000
        for shape in drawing.shapes:
            assert shape.tag in ("path", "text")
            assert not {"id", "style", "href", "class"} & shape.attributes.keys()
            assert not [v for v in shape.attributes.values() if "url" in v or "#" in v[1:]]
            assert all(v.isprintable() for v in shape.attributes.values())
            assert shape.text.isprintable()
    words = words_of(drawings[-1])
    assert "$\\frac{1}{0}$" in words  # no formula
    assert "Википедия" in words


def test_user_s_matplotlib_settings_neither_change_drawings_nor_are_changed():
    import matplotlib

    expected = every_chart()
    mine = {"font.size": 31, "axes.facecolor": "black", "text.usetex": True, "svg.hashsalt": "x"}
    with matplotlib.rc_context(mine):
        before = dict(matplotlib.rcParams)
        assert every_chart() == expected
        assert dict(matplotlib.rcParams) == before


def test_colours_are_white_at_zero_and_show_the_sign_in_greyscale():
    colours = diverging_colours()
    np.testing.assert_allclose(colours(0.5)[:3], 1, atol=0.01)
    grey = {share: sum(colours(0.5 + share / 2)[:3]) for share in (-1, -0.5, 0.5, 1)}
    assert grey[1] < grey[-1] < grey[-0.5]
    assert is_dark(np.zeros(3))
    assert not is_dark(np.ones(3))
    assert colour_limit(np.array([[100, 1], [1, 2.0]])) == 20
    assert colour_limit(np.array([[1, 0.5], [0.5, 1]])) == pytest.approx(0.6)
    assert colour_limit(np.zeros((2, 2))) == 1
