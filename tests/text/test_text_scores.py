"""Text scores equal the definition, computed with Counters of tuples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN, uncommit
from helpers.text import job_tokens, text_score

from gradproj import ProjectionStore
from gradproj.analysis import CONTROL, QuerySets
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.text import scores as scores_module
from gradproj.text.index import make_text_index
from gradproj.text.scores import QueryNgrams, QueryText, TextScan, text_scores, text_top_k


def first_end(query):
    return 0 if query.is_end is None else int(np.argmax(query.is_end))


def test_text_scores_of_documents_in_memory_equal_the_definition():
    random = np.random.default_rng(0)
    documents = [random.integers(0, 6, n) for n in (1, 2, 30, 7, 0, 12)]
    queries = [
        QueryText(random.integers(0, 7, 9)),
        QueryText(documents[3]),
        QueryText(documents[0]),
    ]
    queries.append(QueryText(documents[2], np.arange(30) >= 25))
    lists = [document.tolist() for document in documents]
    wanted = [
        [text_score(query.ids.tolist(), document, lists, first_end(query)) for document in lists]
        for query in queries
    ]
    np.testing.assert_allclose(text_scores(queries, documents), wanted, rtol=1e-12)


@pytest.fixture
def scan(output, monkeypatch):
    with ProjectionStore(output) as store:
        index = make_text_index(store, RecordedRunArgs(output=str(output)))
        # Blocks of 5 documents, which do not divide a unit.
        monkeypatch.setattr(scores_module, "_BLOCK_SCORES", 2 * 5)
        yield TextScan(store, index)


def queries_of(tokens):
    return [
        QueryText(np.array(tokens[3])),
        QueryText(np.array(tokens[8]), np.arange(len(tokens[8])) >= 4),
    ]


def test_text_scores_of_a_store_equal_the_definition(scan, job):
    tokens = job_tokens(job)
    queries = queries_of(tokens)
    got = np.full((2, N_SAMPLES), -1, np.float32)
    for first, values in scan.blocks(queries):
        got[:, first : first + values.shape[1]] = values
    for sample_id in range(N_SAMPLES):
        if sample_id in (EMPTY, ONE_TOKEN):
            assert np.isnan(got[:, sample_id]).all()
            continue
        for query, first, value in ((3, 0, got[0, sample_id]), (8, 4, got[1, sample_id])):
            wanted = text_score(tokens[query], tokens[sample_id], tokens.values(), first)
            assert value == pytest.approx(wanted, rel=1e-5)
    top, bottom = scan.rank(queries, 5, 2)
    order = np.argsort(-got, axis=1, kind="stable")
    np.testing.assert_array_equal(top.ids, order[:, :5])
    np.testing.assert_allclose(top.scores, np.take_along_axis(got, top.ids, axis=1))
    assert top.n_scored == len(tokens)
    assert bottom.ids.shape == (2, 2)
    np.testing.assert_array_equal(text_top_k(scan.store, scan.index, queries, 5).ids, top.ids)
    ids = np.array([30, 3, EMPTY, 69])
    np.testing.assert_allclose(scan.scores_at(queries, ids), got[:, ids], rtol=1e-6)


def test_domains_and_documents_without_a_row_are_left_out(scan, job, output):
    tokens = job_tokens(job)
    domain = scan.store.domains[0]
    chosen = np.flatnonzero(scan.store.column("domain") == 0)
    of_domain = TextScan(scan.store, scan.index, domains=[domain])
    top, _ = of_domain.rank(queries_of(tokens), N_SAMPLES)
    assert set(top.ids[0]) == set(chosen) & tokens.keys()
    uncommit(output, 1)
    with ProjectionStore(output) as store:
        top, _ = TextScan(store, scan.index).rank(queries_of(tokens), N_SAMPLES)
    assert set(top.ids[0]) == tokens.keys() - set(range(16, 32))


def test_scores_do_not_depend_on_the_threads(scan, job, monkeypatch):
    queries = queries_of(job_tokens(job))
    one = scan.rank(queries, 5)[0]
    pool = scores_module.thread_pool
    monkeypatch.setattr(scores_module, "thread_pool", lambda: (pool()[0], 3))
    three = scan.rank(queries, 5)[0]
    assert torch.equal(torch.from_numpy(one.ids), torch.from_numpy(three.ids))
    np.testing.assert_array_equal(one.scores, three.scores)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_sets_of_queries_score_the_mean_or_maximum_less_the_control_set(scan, job, aggregate):
    tokens = job_tokens(job)
    queries = [
        QueryText(np.array(tokens[i]), np.arange(len(tokens[i])) >= first)
        for i, first in ((3, 0), (8, 4), (9, 0), (3, 2))
    ]
    own = [
        text_score(q.ids.tolist(), q.ids.tolist(), tokens.values(), first_end(q))
        for q in queries[:1]
    ]
    of_query = np.array([1, 0, CONTROL, 1])
    singles = scan.scores_at(queries, np.array([3, 8, 9, 30])).copy()
    lengths = [
        np.sqrt(QueryNgrams([q]).weights(scan.index.frequencies) @ QueryNgrams([q])._counts)
        for q in queries
    ]
    assert lengths[0] == pytest.approx(np.sqrt(own[0]))
    for unit in (False, True):
        sets = QuerySets(["a", "b"], of_query, aggregate, unit)
        of_sets = replace(scan, sets=sets)
        each = singles / (np.array(lengths)[:, None] if unit else 1)
        combine = {"mean": np.mean, "max": np.max}[aggregate]
        wanted = np.stack([combine(each[of_query == g], axis=0) for g in range(2)]) - each[2]
        got = of_sets.scores_at(queries, np.array([3, 8, 9, 30]))
        np.testing.assert_allclose(got, wanted, rtol=1e-9)
        top, _ = of_sets.rank(queries, N_SAMPLES)
        ids = top.ids[0].tolist()
        assert top.scores[0][ids.index(30)] == pytest.approx(wanted[0, 3], rel=1e-5)
