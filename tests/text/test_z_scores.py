"""Sums of z-scores equal those of whole arrays, in any blocks and for any number of ranks."""

import tempfile
from types import SimpleNamespace

import numpy as np
import pytest

from gradproj.text.z_scores import _Moments, sums_of_z_scores


def blocks_of(scores, sizes):
    first = 0
    for size in sizes:
        yield first, scores[:, first : first + size]
        first += size
    yield first, scores[:, first:]


def sums(one, other, sizes, moments=()):
    world = SimpleNamespace(gather=lambda mine: [*moments, mine])
    with tempfile.TemporaryFile() as file:
        blocks = blocks_of(one, sizes[0]), blocks_of(other, sizes[1])
        found = list(sums_of_z_scores(*blocks, world, file))
    assert [first for first, _ in found] == [0, *np.cumsum(sizes[0])]
    return np.concatenate([values for _, values in found], axis=1)


@pytest.mark.parametrize("sizes", [((), ()), ((3, 10), (1, 1, 9)), ((20,), (39,))])
def test_sums_equal_those_of_whole_arrays(sizes):
    random = np.random.default_rng(0)
    one, other = (
        random.normal(mean, deviation, (2, 40)).astype(np.float32)
        for mean, deviation in ((-3e-9, 1e-9), (1e4, 300))
    )
    one[:, 4] = np.nan
    other[1, 7] = np.nan
    kept = np.setdiff1d(np.arange(40), [4, 7])
    wanted = np.full((2, 40), np.nan)
    z = [(x[:, kept] - x[:, kept].mean(1, keepdims=True)) / x[:, kept].std(1, keepdims=True)
         for x in (one.astype(np.float64), other.astype(np.float64))]  # fmt: skip
    wanted[:, kept] = z[0] + z[1]
    np.testing.assert_allclose(sums(one, other, sizes), wanted, rtol=1e-5, atol=1e-6)
    # Another rank has the first half of the samples.
    halves = [slice(0, 20), slice(20, 40)]
    both = np.stack([one, other]).astype(np.float64)[:, :, halves[0]]
    moments = _Moments.of(both[:, :, np.isfinite(both).all(axis=(0, 1))])
    got = sums(one[:, halves[1]], other[:, halves[1]], ((), ()), [moments])
    np.testing.assert_allclose(got, wanted[:, 20:], rtol=1e-5, atol=1e-6)


def test_score_without_deviation_adds_nothing():
    one = np.float32([[1, 2, 3, 6]])
    got = sums(one, np.full((1, 4), 0.1, np.float32), ((), ()))
    np.testing.assert_allclose(got, (one - 3) / one.std(), rtol=1e-6)
