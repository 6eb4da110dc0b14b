"""Loss, gradient norm and status of finished rows, with values computed by hand."""

import numpy as np
import pytest

from gradproj.engine.row_columns import finish_rows
from gradproj.store.layout import STATUS


def columns(statuses, n_tokens):
    return {
        "status": np.array([STATUS[name] for name in statuses], np.uint8),
        "n_tokens": np.array(n_tokens, np.int32),
    }


@pytest.mark.parametrize(("loss_reduction", "norms"), [("mean", [2.5, 0.0]), ("sum", [5.0, 0.0])])
def test_rows_are_divided_by_their_target_tokens_for_the_mean_only(loss_reduction, norms):
    rows, losses = np.array([[3, 4], [0, 0]], np.float32), np.array([6, 0], np.float32)
    table = columns(["ok", "no_target"], [2, 0])
    loss, grad_norm = finish_rows(rows, losses, table, loss_reduction)
    np.testing.assert_array_equal(loss, [3, 0])
    np.testing.assert_array_equal(grad_norm, norms)
    np.testing.assert_array_equal(np.linalg.norm(rows, axis=1), norms)
    assert table["status"].tolist() == [STATUS["ok"], STATUS["no_target"]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_rows_get_their_status_and_no_norm(bad):
    rows = np.array([[1, bad], [1, 0], [bad, 0]], np.float32)
    table = columns(["ok", "ok", "out_of_memory"], [1, 1, 1])
    _, grad_norm = finish_rows(rows, np.ones(3, np.float32), table, "mean")
    np.testing.assert_array_equal(grad_norm, [np.nan, 1, np.nan])
    assert table["status"].tolist() == [
        STATUS["non_finite"], STATUS["ok"], STATUS["out_of_memory"],
    ]  # fmt: skip


def test_row_too_long_for_float32_is_not_finite():
    rows = np.full((1, 4), 3e38, np.float32)
    table = columns(["ok"], [1])
    _, grad_norm = finish_rows(rows, np.ones(1, np.float32), table, "sum")
    assert np.isnan(grad_norm[0])
    assert table["status"].tolist() == [STATUS["non_finite"]]
