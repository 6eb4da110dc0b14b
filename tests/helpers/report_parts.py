"""Stand-ins for the parts of a report: histograms, columns, times of units."""

from types import SimpleNamespace

import numpy as np

from gradproj.report.distributions import distributions
from gradproj.report.throughput import UnitTimes
from gradproj.store import STATUS


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


def times_of(units, n_ranks):
    values = np.array(sorted(units), float)
    ranks = [str(rank) for rank in range(n_ranks)]
    return UnitTimes(values[:, 0], values[:, 1], values[:, 2], values[:, 3].astype(int), ranks, 0)
