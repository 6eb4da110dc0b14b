"""The top k of a stream of blocks equals sorting all scores at once."""

import numpy as np
import pytest
import torch

from gradproj.analysis.top_k import TopK


def streamed_top_k(values, k, block, sorting):
    best = TopK(len(values), k, torch.device("cpu"))
    add = best.add_sorting if sorting else best.add
    for first in range(0, values.shape[1], block):
        add(first, values[:, first : first + block].clone())
    return best.result()


def sorted_top_k(values, k):
    """Sort with numpy: descending, NaN last, ties by id."""
    order = np.argsort(-np.where(np.isnan(values), -np.inf, values), axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(values, order, 1)


@pytest.mark.parametrize("sorting", [False, True], ids=["few", "sorting"])
@pytest.mark.parametrize("block", [1, 13, 512, 5_000])
@pytest.mark.parametrize("k", [1, 7, 100])
def test_top_k_of_a_stream_equals_sorting_all_scores(k, block, sorting):
    generator = np.random.default_rng(k)
    values = np.round(generator.standard_normal((5, 5_000)), 2).astype(np.float32)  # with many ties
    values[:, generator.random(5_000) < 0.3] = np.nan
    values[2] = np.sort(values[2])  # ascending: each block exceeds all earlier ones
    step = 5_000 if block == 5_000 else block
    values = values[:, : 700 if block == 1 else None]
    ids, scores = streamed_top_k(torch.from_numpy(values), k, step, sorting)
    want_ids, want = sorted_top_k(values, k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(scores, want)


@pytest.mark.parametrize("sorting", [False, True], ids=["few", "sorting"])
def test_missing_scores_leave_the_last_places_empty(sorting):
    values = torch.tensor([[torch.nan, -torch.inf, 3.0, -torch.inf], [1.0, 1.0, torch.nan, 0.0]])
    ids, scores = streamed_top_k(values, 4, 2, sorting)
    assert ids.tolist() == [[2, 1, 3, -1], [0, 1, 3, -1]]
    assert scores[:, 0].tolist() == [3.0, 1.0]


def test_k_of_zero_gives_empty_results():
    ids, values = streamed_top_k(torch.rand(2, 30), 0, 7, sorting=False)
    assert ids.shape == values.shape == (2, 0)


def test_long_stream_is_sorted_rarely(monkeypatch):
    n_sorts = 0
    sort_pending = TopK._sort_pending

    def counted(best):
        nonlocal n_sorts
        n_sorts += bool(best._pending)
        sort_pending(best)

    monkeypatch.setattr(TopK, "_sort_pending", counted)
    streamed_top_k(
        torch.from_numpy(np.random.default_rng(0).standard_normal((4, 200_000), np.float32)),
        20,
        512,
        False,
    )
    assert 1 < n_sorts < 20
