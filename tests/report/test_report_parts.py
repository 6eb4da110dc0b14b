"""Parts of the report: counts and histograms, times of units, figures, number formats."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.analysis_stores import EMPTY, MISSING_UNIT, N_SAMPLES, make_store, ok_rows
from helpers.stores import make_columns

from gradproj import ProjectionStore
from gradproj.errors import StoreError
from gradproj.report.distributions import Histogram, count_rows, distributions
from gradproj.report.figures import (
    MOST_RANKS,
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
from gradproj.report.number_format import digits, exponent_of, in_cell, json_numbers, power, scaled
from gradproj.report.throughput import UnitTimes, throughput, unit_times
from gradproj.store import STATUS
from gradproj.store.unit_record import UnitRecord, encode_record, read_stats, record_name

DOMAIN = np.arange(N_SAMPLES) % 3 - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("parts") / "out")


# --- columns ---


def test_rows_are_counted_by_domain_and_status(made):
    with ProjectionStore(made.path) as store:
        counts = count_rows(store)
    ok = ok_rows(made)
    assert counts.n_rows.tolist() == [(ok & (number == DOMAIN)).sum() for number in (0, 1)]
    assert counts.by_status.sum() == N_SAMPLES
    assert (counts.total("missing"), counts.total("empty")) == (16, len(EMPTY))
    assert counts.n_documents == [None, None]  # there is no corpus index
    assert counts.n_missing(0) is None


def test_quantiles_match_numpy_to_half_a_percent_and_the_largest_norms_are_found(made):
    ids = np.flatnonzero(ok_rows(made))
    with ProjectionStore(made.path) as store:
        got = distributions(store, [[0], [1], [-1]], 7)
    for number, code in enumerate((0, 1, -1)):
        losses = ids[DOMAIN[ids] == code] / 8
        histogram = got.groups["loss"][number]
        assert histogram.n == len(losses)
        for q in (0.05, 0.25, 0.5, 0.75, 0.95):
            want = np.quantile(losses, q, method="inverted_cdf")
            assert histogram.quantile(q) == pytest.approx(want, rel=0.005, abs=1e-6)
    assert got.largest_ids.tolist() == ids[::-1][:7].tolist()
    np.testing.assert_array_equal(got.largest_norms, (ids[::-1][:7] / 4).astype(np.float32))


def histogram_of(values):
    """Return the histogram of a store with these losses."""
    values = np.asarray(values, np.float32)
    columns = {
        "status": np.full(len(values), STATUS["ok"], np.uint8),
        "domain": np.zeros(len(values), np.int16),
        "loss": values,
        "grad_norm": values,
    }
    return distributions(fake_store(len(values), columns), [[0]], 3).groups["loss"][0]


def fake_store(n, columns):
    """Return a store with columns only; each is an array, or a function of the range."""

    class Fake(SimpleNamespace):
        def __len__(self):
            return n

    def column(name, first, last):
        values = columns[name]
        return values(first, last) if callable(values) else values[first:last]

    return Fake(column=column, domains=["only"], attributes={"complete": True}, layout=None)


def test_histogram_counts_zeros_and_extremes_and_skips_non_finite_values():
    histogram = histogram_of([0.0, -0.0, 1e-30, 1.0, 2.0, 3e38, math.nan, math.inf])
    assert histogram.n == 6
    assert histogram.quantile(0) == 0
    assert histogram.quantile(1) == pytest.approx(3e38, rel=0.01)
    parts = histogram.between(np.array([0, 0.5, 1.5, 2.5, 4e38]))
    np.testing.assert_allclose(parts, [3, 1, 1, 1], atol=1e-6)
    assert math.isnan(Histogram(np.zeros_like(histogram.counts)).quantile(0.5))


def test_memory_does_not_grow_with_the_number_of_documents():
    n = 3_000_000
    columns = {
        "status": lambda a, b: np.full(b - a, STATUS["ok"], np.uint8),
        "domain": lambda a, b: np.zeros(b - a, np.int16),
        "loss": lambda a, b: np.arange(a, b, dtype=np.float32) / n,
        "grad_norm": lambda a, b: np.arange(b, a, -1, dtype=np.float32) % 1000,
    }
    tracemalloc.start()
    got = distributions(fake_store(n, columns), [[0]], 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # a column of float32 alone has 12 MB, ids of int64 24 MB
    assert got.groups["loss"][0].n == n
    assert got.groups["loss"][0].quantile(0.5) == pytest.approx(0.5, rel=0.005)
    assert (got.largest_norms == 999).all()


# --- times ---


def write_unit(output, unit, rank, started, seconds, tokens, log="rank-{:05d}.log", **more):
    stats = {
        "started_at": started,
        "seconds": seconds,
        "finished_at": started + seconds,
        "real_tokens": tokens,
    }
    stats = more.get("stats", stats)
    columns = make_columns(SimpleNamespace(key_bytes=8), 0, 4, np.ones(4))
    record = UnitRecord(unit, 4 * unit, "identity", None, columns, stats)
    (output / record_name(unit)).write_bytes(encode_record(record))
    if rank is not None:
        with (output / "logs" / log.format(rank)).open("a") as file:
            file.write(f"2026-01-01 00:00:00,000 DEBUG unit {unit}: batch 1 of 2, (2, 8) tokens\n")
            file.write(f"2026-01-01 00:00:00,000 INFO unit {unit} committed: {stats}\n")


@pytest.fixture
def folder(tmp_path):
    for name in ("units", "logs"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_unit_times_come_from_the_records_and_ranks_from_the_logs(folder):
    write_unit(folder, 0, 0, 1000.25, 10, 500)
    write_unit(folder, 1, 10, 1001.5, 20, 800)
    write_unit(folder, 2, 2, 1002.0, 5, 300, log="rank-{:05d}-slurm-70_1.log")
    write_unit(folder, 3, None, 1003.0, 5, 100)
    write_unit(folder, 4, None, 0, 0, 0, stats={"seconds": 1.5})
    # A unit that was computed twice: the record is of the second time.
    write_unit(folder, 0, 10, 2000.75, 10, 500)
    times = unit_times(folder)
    assert times.ranks == ["2 of slurm-70_1", "10", "unknown"]
    assert [times.ranks[rank] for rank in times.rank] == [
        "10",
        "2 of slurm-70_1",
        "unknown",
        "10",
    ]
    assert times.n_tokens.tolist() == [800, 300, 100, 500]
    assert times.n_untimed == 1
    assert times.working_s == 20 + 10
    assert times.rank_s == 20 + 5 + 5 + 10


def test_record_stats_are_read_without_the_columns_and_damage_is_named(folder):
    write_unit(folder, 0, 0, 1000.25, 10, 500)
    path = folder / record_name(0)
    assert read_stats(path)["real_tokens"] == 500
    data = path.read_bytes()
    path.write_bytes(data[:-20])  # the beginning is whole
    assert read_stats(path)["started_at"] == 1000.25
    for broken in (b"", b"abc", data[:40], b"\xff" * 100, (2).to_bytes(8, "little") + b"{}"):
        path.write_bytes(broken)
        with pytest.raises(StoreError, match=r"00000000\.safetensors is damaged"):
            read_stats(path)


def times_of(units, n_ranks):
    values = np.array(sorted(units), float)
    ranks = [str(rank) for rank in range(n_ranks)]
    return UnitTimes(values[:, 0], values[:, 1], values[:, 2], values[:, 3].astype(int), ranks, 0)


def test_throughput_keeps_every_token_and_spreads_a_unit_s_tokens_evenly():
    speed = throughput(times_of([(100, 110, 500, 0), (105, 125, 800, 1)], 2), n_bins=25)
    seconds = speed.edges_s[-1] / 25
    assert speed.total.sum() * seconds == pytest.approx(1300)
    np.testing.assert_allclose(speed.by_rank[0], [50] * 10 + [0] * 15, atol=1e-9)
    np.testing.assert_allclose(speed.by_rank[1], [0] * 5 + [40] * 20, atol=1e-9)
    assert (speed.from_s, speed.to_s, speed.pauses) == (100, 125, [])


def test_only_long_idle_time_is_cut_out():
    day = 86400.0
    speed = throughput(
        times_of([(0, 100, 10, 0), (300, 400, 10, 0), (day, day + 100, 30, 0)], 1), n_bins=50
    )
    assert speed.pauses == [(400, day - 400)]
    assert speed.edges_s[-1] == 500
    assert speed.total.sum() * 10 == pytest.approx(50)
    assert speed.total[10:30].sum() == 0
    assert speed.total[40:].sum() * 10 == pytest.approx(30)
    assert throughput(UnitTimes(*(np.empty(0),) * 3, np.empty(0, int), [], 0)) is None


def test_throughput_figure_of_many_ranks_shows_the_fastest_median_and_slowest():
    n = MOST_RANKS + 1
    speed = throughput(times_of([(0, 10, 10 * (rank + 1), rank) for rank in range(n)], n))
    picture = throughput_chart(speed, [str(rank) for rank in range(n)])
    words = [shape.text for shape in picture.shapes if shape.tag == "text"]
    assert {"fastest", "median", "slowest"} <= set(words)
    assert not [word for word in words if word.startswith("rank")]
    few = throughput_chart(throughput(times_of([(0, 10, 5, 0), (0, 10, 5, 1)], 2)), ["0", "1"])
    assert {"rank 0", "rank 1"} <= {shape.text for shape in few.shapes}


# --- figures and number formats ---


def words_of(drawing):
    return [shape.text for shape in drawing.shapes if shape.tag == "text"]


def test_axes_have_round_ticks():
    linear = histogram_chart(histogram_of(np.linspace(0, 10, 1000)), "loss", "nats", log=False)
    assert [word for word in words_of(linear) if word.isdigit()][:6] == [
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
    ]
    log = histogram_chart(histogram_of(np.geomspace(0.01, 100, 1000)), "norm", "units", log=True)
    assert {"0.1", "1", "10"} <= set(words_of(log))
    narrow = histogram_chart(histogram_of(np.geomspace(3, 40, 1000)), "norm", "units", log=True)
    assert {"5", "10", "20"} <= set(words_of(narrow))


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


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.42, "+.42"),
        (-0.421, "-.42"),
        (1.0, "+1.0"),
        (9.96, "+10"),
        (-123.4, "-123"),
        (0.004, "0"),
        (math.nan, ""),
    ],
)
def test_numbers_in_cells_keep_their_sign_and_two_or_three_digits(value, shown):
    assert in_cell(value) == shown


def test_numbers_are_rounded_for_reading_and_json_has_no_nan():
    assert [digits(v) for v in (0, 1234.5, 0.0123456, 1.5e-7, math.nan, None)] == [
        "0", "1,234", "0.0123", "1.50e-07", "–", "–",
    ]  # fmt: skip
    assert [exponent_of([v]) for v in (0, 5, 0.02, 1e-7, 4e4)] == [0, 0, 0, -9, 3]
    assert scaled(1.234e-7, -9) == "+123.400"
    assert power(-9) == "10⁻⁹"
    assert json_numbers(np.array([[1, math.nan], [math.inf, 2]])) == [[1, None], [None, 2]]
    assert MISSING_UNIT == 2
