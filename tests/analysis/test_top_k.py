"""Laws of the best of a stream: those that sorting everything gives, however the stream is cut."""

import numpy as np
import pytest
import torch

from gradproj.analysis.top_k import TopK


def streamed(values, k, block, sorting):
    best = TopK(len(values), k, torch.device("cpu"))
    add = best.add_sorting if sorting else best.add
    for first in range(0, values.shape[1], block):
        add(first, values[:, first : first + block].clone())
    return best.found()


def sorted_whole(values, k):
    """By numpy: descending, NaN nowhere, equal ones by id."""
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(values, order, 1)


@pytest.mark.parametrize("sorting", [False, True], ids=["few", "sorting"])
@pytest.mark.parametrize("block", [1, 13, 512, 5_000])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_the_best_of_a_stream_are_the_best_of_all(k, block, sorting):
    generator = np.random.default_rng(k)
    values = np.round(generator.standard_normal((5, 5_000)), 2).astype(
        np.float32
    )  # with many equal ones
    values[:, generator.random(5_000) < 0.3] = np.nan
    values[2] = np.sort(values[2])  # rising: each block is better than all before
    step = 5_000 if block == 5_000 else block
    values = values[:, : 700 if block == 1 else None]
    ids, found = streamed(torch.from_numpy(values), k, step, sorting)
    want_ids, want = sorted_whole(values, k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("sorting", [False, True], ids=["few", "sorting"])
def test_fewer_scores_than_places_leave_the_last_ones_empty(sorting):
    values = torch.tensor([[torch.nan, -torch.inf, 3.0, -torch.inf], [1.0, 1.0, torch.nan, 0.0]])
    ids, found = streamed(values, 4, 2, sorting)
    assert ids.tolist() == [[2, 1, 3, -1], [0, 1, 3, -1]]
    assert found[:, 0].tolist() == [3.0, 1.0]


def test_none_wanted_none_found():
    ids, values = streamed(torch.rand(2, 30), 0, 7, sorting=False)
    assert ids.shape == values.shape == (2, 0)


def test_a_long_stream_is_sorted_seldom(monkeypatch):
    n_sorts = 0
    settle = TopK._settle

    def counted(best):
        nonlocal n_sorts
        n_sorts += bool(best._waiting)
        settle(best)

    monkeypatch.setattr(TopK, "_settle", counted)
    streamed(
        torch.from_numpy(np.random.default_rng(0).standard_normal((4, 200_000), np.float32)),
        20,
        512,
        False,
    )
    assert 1 < n_sorts < 20
