"""Scores of head rows against dense products of the decoded rows."""

import numpy as np
import pytest
import torch

from gradproj.analysis.head_scores import HeadScorer
from gradproj.engine.head_rows import encode_head
from gradproj.errors import ConfigError
from gradproj.store.head_rows import HeadQueries, HeadSegment, decode_head

VOCABULARY, K, N, M, Q, QUERY_ROWS = 70_000, 12, 9, 5, 3, 40


def some_queries(random):
    tokens = random.permutation(VOCABULARY)[:60]  # documents share tokens with queries
    ids = np.stack([random.permutation(tokens)[:QUERY_ROWS] for _ in range(Q)])
    values = random.standard_normal((Q, QUERY_ROWS, K)).astype(np.float32)
    return tokens, HeadQueries(ids, values)


def test_scores_are_products_of_the_decoded_rows():
    random = np.random.default_rng(0)
    tokens, queries = some_queries(random)
    segment = HeadSegment(M, K, VOCABULARY)
    ids = np.stack([random.permutation(tokens)[:M] for _ in range(N)])
    values = torch.from_numpy(random.standard_normal((N, M, K)).astype(np.float32))
    values[2, 3:] = 0
    stored = encode_head(torch.from_numpy(ids), values, segment).numpy()
    stored[4] = 255
    decoded = decode_head(stored, segment)
    documents, dense = np.zeros((N, VOCABULARY, K)), np.zeros((Q, VOCABULARY, K))
    for n in range(N):
        documents[n, decoded.ids[n] % VOCABULARY] += decoded.values(K)[n]
    for q in range(Q):
        dense[q, queries.ids[q]] = queries.values[q]
    want = dense.reshape(Q, -1) @ documents.reshape(N, -1).T
    got = HeadScorer(queries, segment).scores(stored)
    assert np.isnan(got[:, 4]).all()
    np.testing.assert_allclose(np.delete(got, 4, 1), np.delete(want, 4, 1), rtol=1e-4, atol=1e-4)


def test_queries_of_another_width_are_refused():
    _, queries = some_queries(np.random.default_rng(0))
    with pytest.raises(ConfigError, match="have 12 values, those of the store 16"):
        HeadScorer(queries, HeadSegment(M, 16, VOCABULARY))
