"""Counts by domain and status, and histograms of losses and norms."""

import math
import tracemalloc

import numpy as np
import pytest
from helpers.analysis_stores import EMPTY, N_SAMPLES, make_store, ok_rows
from helpers.report_parts import fake_store, histogram_of

from gradproj import ProjectionStore
from gradproj.report.distributions import Histogram, count_rows, distributions
from gradproj.store import STATUS

DOMAIN = np.arange(N_SAMPLES) % 3 - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("parts") / "out")


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
    norms = np.linalg.norm(made.rows[ids].astype(float), axis=1).astype(np.float32)
    largest = np.argsort(-norms)[:7]
    assert got.largest_ids.tolist() == ids[largest].tolist()
    np.testing.assert_array_equal(got.largest_norms, norms[largest])


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
