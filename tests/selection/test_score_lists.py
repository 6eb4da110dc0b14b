"""Beginnings of ranked lists, found by thresholds: compared with sorting everything."""

import tracemalloc

import numpy as np
import pytest

from gradproj.selection import picks as rules
from gradproj.selection import score_lists
from gradproj.selection.score_lists import ScoreLists

N = 300


@pytest.fixture(params=[2**20, 7])
def scores(request, tmp_path, monkeypatch):
    """Three lists with ties, zeros of both signs, infinities and documents without a score."""
    monkeypatch.setattr(score_lists, "_BLOCK_ROWS", request.param)
    generator = np.random.default_rng(0)
    values = generator.standard_normal((3, N)).astype(np.float32) * 10.0 ** generator.integers(
        -20, 20, (3, N)
    ).astype(np.float32)
    values[:, generator.random(N) < 0.5] = np.float32(0.25)
    values[1, :40] = 0.0
    values[1, 20:30] = -0.0
    values[:, [3, 77]] = np.inf, -np.inf
    values[:, 50:60] = np.nan
    values[2, 299] = np.nan  # of one list only: then no list may choose it
    np.save(tmp_path / "scores.npy", values)
    return tmp_path / "scores.npy"


@pytest.fixture
def allowed():
    return np.random.default_rng(1).random(N) < 0.9


def sorted_list(path, allowed, number, bottom=False):
    """Return all ids of a list, best first, the slow way."""
    values = np.load(path)
    able = allowed & ~np.isnan(values).any(axis=0)
    sign = 1 if bottom else -1
    return sorted(np.flatnonzero(able).tolist(), key=lambda i: (sign * values[number, i], i))


@pytest.mark.parametrize("bottom", [False, True])
@pytest.mark.parametrize("k", [1, 2, 37, 150, 10**9])
def test_first_documents_are_those_of_a_sorted_list(scores, allowed, k, bottom):
    want = [sorted_list(scores, allowed, number, bottom)[:k] for number in range(3)]
    lists = ScoreLists(scores, allowed, bottom)
    for number in range(3):
        got = lists.first(number, k)
        assert got.ids.tolist() == want[number]
        np.testing.assert_array_equal(got.scores, np.load(scores)[number, got.ids])


@pytest.mark.parametrize("k", [1, 10, 500, 6000, 10**9])
def test_budget_of_tokens_ends_at_the_first_document_that_exceeds_it(scores, allowed, k):
    tokens = np.random.default_rng(2).integers(0, 60, N)
    for number in range(3):
        want, total = [], 0
        for i in sorted_list(scores, allowed, number):
            total += tokens[i]
            if total > k:
                break
            want.append(i)
        lists = ScoreLists(scores, allowed.copy())
        got = lists.first(number, k, lambda first, last: tokens[first:last])
        assert got.ids.tolist() == want


@pytest.mark.parametrize("step", [1, 13, 10**6])
def test_ranked_documents_come_in_order_without_those_taken_out_meanwhile(scores, allowed, step):
    want = sorted_list(scores, allowed, 1)
    lists, got = ScoreLists(scores, allowed), []
    for sample_id, score in lists.ranked(1, step):
        assert score == np.load(scores)[1, sample_id]
        got.append(sample_id)
        if len(got) == 20:
            lists.allowed[want[25:30]] = False
    assert got == want[:25] + want[30:]


def test_queries_choose_their_own_best_and_shared_documents_stand_where_they_come_first(
    scores, allowed
):
    each = [sorted_list(scores, allowed, number) for number in range(3)]
    want = []
    for place in range(14):
        for number in range(3):
            n_own = 14 if number == 0 else 13  # 40 = 14 + 13 + 13
            entry = (each[number][place], number)
            if place < n_own and entry[0] not in [i for i, _ in want]:
                want.append(entry)
    got = rules.per_query(ScoreLists(scores, allowed), 40)
    pairs = zip(got.chosen.ids.tolist(), got.list_of.tolist(), strict=True)
    assert list(pairs) == want
    assert len(want) < 40
    assert got.n_shared == 40 - len(want)
    values = np.load(scores)[got.list_of, got.chosen.ids]
    np.testing.assert_array_equal(got.chosen.scores, values)


def slow_round_robin(scores, allowed, costs, budget):
    each = [sorted_list(scores, allowed, number) for number in range(3)]
    want, taken = [], set()
    while True:
        for number in range(3):
            free = [i for i in each[number] if i not in taken]
            if not free:
                return want
            budget -= costs[free[0]]
            if budget < 0:
                return want
            taken.add(free[0])
            want.append((free[0], number))


@pytest.mark.parametrize("step", [1, 50])
@pytest.mark.parametrize("in_tokens", [False, True])
@pytest.mark.parametrize("budget", [2, 100, 10**6])
def test_queries_in_turn_choose_their_best_free_document(
    scores, allowed, budget, in_tokens, step, monkeypatch
):
    monkeypatch.setattr(rules, "_STEP_MIN", step)
    monkeypatch.setattr(rules, "_STEPS_MAX", 3 * step)
    costs = np.random.default_rng(3).integers(1, 9, N) if in_tokens else np.ones(N, int)
    want = slow_round_robin(scores, allowed, costs, budget)
    got = rules.round_robin(ScoreLists(scores, allowed), budget, lambda a, b: costs[a:b])
    assert list(zip(got.chosen.ids.tolist(), got.list_of.tolist(), strict=True)) == want


def test_memory_is_a_byte_for_each_document_and_12_for_each_chosen(tmp_path):
    n = 8 * 2**20
    values = np.lib.format.open_memmap(
        tmp_path / "scores.npy", mode="w+", dtype=np.float32, shape=(1, n)
    )
    values[0] = np.random.default_rng(0).standard_normal(n)
    values.flush()
    tracemalloc.start()
    lists = ScoreLists(tmp_path / "scores.npy", np.ones(n, bool))
    chosen = lists.first(0, n // 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chosen) == n // 20
    assert chosen.scores.min() >= np.partition(values[0], n - n // 20)[n - n // 20]
    assert peak < n + 60 * n // 20 + 80 * 2**20
