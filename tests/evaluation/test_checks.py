"""Checks of scores without training, names of rows, sums of z-scores, the figure."""

from dataclasses import replace

import numpy as np
import pytest

from gradproj.evaluation.checks import distinct_top, rank_agreement
from gradproj.evaluation.figure import draw
from gradproj.evaluation.leave_out import file_name
from gradproj.evaluation.method_names import GradientMethod, RowKind
from gradproj.evaluation.methods import rescored, sum_of_z_scores


def test_distinct_top_documents_go_from_the_same_to_different_ones_for_all_queries():
    same, different = np.tile(np.arange(20.0), (4, 1)), np.kron(np.eye(4), np.ones(5))
    assert distinct_top(same, k=5) == 5 / 20
    assert distinct_top(different, k=5) == 1
    assert distinct_top(np.ones((3, 2)), k=10) == 1


def test_rank_agreement_is_that_of_ranks_within_a_query():
    scores = np.random.default_rng(0).normal(size=(3, 50))
    assert rank_agreement(scores, np.exp(scores) * [[1], [2], [3]]) == pytest.approx(1)
    assert rank_agreement(scores, -scores) == pytest.approx(-1)


def test_sum_of_z_scores_weighs_methods_equally_within_a_query():
    a, b = np.array([[1.0, 2, 3], [4, 4, 4]]), np.array([[300.0, 0, 0], [0, 0, 50]])
    want = (a - a.mean(1, keepdims=True))[0] / a[0].std() + (b[0] - b[0].mean()) / b[0].std()
    got = sum_of_z_scores(a, b)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    np.testing.assert_allclose(got[1], (b[1] - b[1].mean()) / b[1].std(), rtol=1e-6)


def test_best_documents_have_exact_scores_and_the_others_follow_in_their_unit():
    scores, exact = np.array([[4.0, 1, 2, -3]]), np.array([[40.0, 100, 20, 7]])
    np.testing.assert_allclose(rescored(scores, exact, 2), [[40, 10, 20, -30]])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("kfac@16:0.03", GradientMethod("kfac", RowKind("16"), 0.03)),
        (
            "kfac@8/int4/rescored20",
            GradientMethod("kfac", RowKind("8", "int4", "eigen", "sum"), rescored=20),
        ),
        ("kfac@64/signs", GradientMethod("kfac", RowKind("64", "signs", "eigen", "sum"))),
        (
            "dot@full/dense/random/mean",
            GradientMethod(
                "dot",
                RowKind("full", "dense", "random", "sum"),
            ),
        ),
    ],
)
def test_name_tells_rows_and_score(name, want):
    found = GradientMethod.of(name)
    reduction = "mean" if "mean" in name or "/" not in name else "sum"
    assert found == replace(want, reduction=reduction)
    assert "/" not in file_name(name)


def test_rows_of_the_first_version_keep_the_names_of_their_folders():
    assert RowKind("16").name == "16"
    assert RowKind("16", "signs", "eigen", "sum").name == "16-signs-eigen-sum"


def test_figure_names_every_kind_of_rows_once(tmp_path):
    lds = {"mean": 0.5, "over_queries": 0.02}
    sizes = {"kfac@16/signs": 400, "kfac@64/signs": 6000, "kfac@64/signs+text": 6000, "text": None}
    methods = {name: {"lds": lds, "row_bytes": size} for name, size in sizes.items()}
    draw({"one": {"methods": methods}, "two": {"methods": methods}}, tmp_path / "lds.svg")
    shown = (tmp_path / "lds.svg").read_text()
    assert shown.count("<!-- kfac/signs -->") == 1
    assert shown.count("<!-- kfac/signs+text -->") == 1
    assert shown.count("<!-- text -->") == 2
