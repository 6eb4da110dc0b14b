"""The order of a corpus's sample: every id once, at equal steps from the beginning on."""

from itertools import islice

import numpy as np
import pytest

from gradproj.corpus.sampling import spread_order


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 100])
def test_order_has_every_sample_once(n):
    assert sorted(spread_order(n)) == list(range(n))


@pytest.mark.parametrize("n", [1000, 1024, 1500])
def test_any_beginning_is_spread_over_the_corpus(n):
    for count in (5, 60, 300):
        first = np.sort(list(islice(spread_order(n), count)))
        assert np.diff([*first, n]).max() <= 4 * n / count
