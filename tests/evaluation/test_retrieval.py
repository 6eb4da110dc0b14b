"""Retrieval of near-copies, and leave-out, by hand."""

import numpy as np
import pytest

from gradproj.evaluation.leave_out import _result, best_of_all
from gradproj.evaluation.retrieval import near_copies, retrieval


def test_copy_is_found_if_its_score_is_among_the_k_highest():
    scores = np.array([[9.0, 1, 2, 3], [0, 5, 7, 6], [1, 1, 1, 1]])
    copies = np.zeros((3, 4), bool)
    copies[[0, 1, 2], [0, 3, 2]] = True
    result = retrieval(scores, copies, at=(1, 2))
    assert result.recall == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert result.mrr == pytest.approx(
        (1 + 1 / 2 + 1 / 4) / 3
    )  # among equal scores the copy is last


def test_first_of_several_copies_counts():
    scores, copies = np.array([[9.0, 8, 7, 6]]), np.array([[False, True, True, False]])
    assert retrieval(scores, copies, at=(1, 2)).recall == {1: 0.0, 2: 1.0}


def test_document_with_as_many_common_ngrams_as_the_planted_one_is_a_copy():
    queries = np.array([[1, 2, 3, 4, 5, 6]])
    documents = np.array(
        [[1, 2, 3, 4, 5, 9], [9, 9, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]]
    )
    assert near_copies(documents, queries, np.array([0])).tolist() == [[True, False, True, True]]
    # If the planted document has no common 4-gram, others need at least one.
    strangers = np.array([[9, 9, 9, 9, 9, 9], [8, 8, 8, 8, 8, 8]])
    assert near_copies(strangers, queries, np.array([1])).tolist() == [[False, True]]


def test_documents_of_a_group_are_each_querys_best_in_turn():
    scores = np.array([[9.0, 8, 7, 0, 0], [8, 9, 0, 7, 0]])
    assert best_of_all(scores, 2).tolist() == [0, 1]
    assert best_of_all(scores, 3).tolist() == [0, 1, 2]  # both seconds are taken already
    assert best_of_all(scores, 4).tolist() == [0, 1, 2, 3]


def test_leave_out_is_the_rise_above_the_mean_of_the_controls():
    controls = np.array([[2.0, 3.0], [2.2, 3.4]])
    result = _result(np.array([2.5, 3.3]), controls)
    assert result.by_query == pytest.approx([0.4, 0.1])
    assert result.mean == pytest.approx(0.25)
    assert result.standard_error == pytest.approx(0.15)
    assert result.share_above_controls == 0.5
