"""Baselines and the kronfluence reference, on small random models and texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import make_model, small_model
from helpers.text import text_score

from gradproj.evaluation.baselines import bm25, hidden_cosine, ngram_overlap, text_kernel
from gradproj.evaluation.corpus import PAD
from gradproj.evaluation.kronfluence import kronfluence_scores, linear_in_place_of_conv1d
from gradproj.evaluation.retraining import load, query_losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def documents() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 250, (6, 24))


def test_linear_layers_in_place_of_conv1d_give_equal_logits():
    model = small_model("gpt2")
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    names = linear_in_place_of_conv1d(model)
    assert len(names) == 8
    assert all(type(model.get_submodule(name)) is torch.nn.Linear for name in names)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_kronfluence_ranks_a_document_first_for_itself(folder, documents, tmp_path):
    pytest.importorskip("kronfluence")
    scores = kronfluence_scores(
        "kronfluence_ekfac", folder, documents, *[documents[2:4]] * 2, tmp_path / "work"
    )
    assert scores.shape == (2, 6)
    assert scores.argmax(axis=1).tolist() == [2, 3]
    assert not (tmp_path / "work").exists()


def test_hidden_is_the_cosine_of_centred_mean_states(folder, documents):
    model = load(folder, "cpu")
    with torch.no_grad():
        means = [
            model.transformer(torch.from_numpy(d)[None])[0][0].mean(0).numpy() for d in documents
        ]
    centred = np.stack(means) - np.mean(means, axis=0)
    want = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in centred] for a in centred[1:3]]
    np.testing.assert_allclose(
        hidden_cosine(folder, documents, documents[1:3], "cpu"), want, atol=1e-4
    )


def test_text_is_the_kernel_of_ngrams_weighted_by_their_rarity():
    documents = np.random.default_rng(0).integers(0, 9, (6, 24))
    lists = documents.tolist()
    want = [[text_score(query, document, lists) for document in lists] for query in lists[1:3]]
    np.testing.assert_allclose(text_kernel(list(documents), list(documents[1:3])), want, rtol=1e-6)


def test_query_loss_is_the_mean_over_target_tokens(folder, documents):
    model = load(folder, "cpu")
    ids = torch.from_numpy(documents)
    with torch.no_grad():
        want = [model(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    np.testing.assert_allclose(query_losses(model, documents), want, rtol=1e-5)
    labels = ids.masked_fill(torch.arange(24) < 20, -100)
    with torch.no_grad():
        both = zip(ids, labels, strict=True)
        want = [model(input_ids=row[None], labels=of[None]).loss.item() for row, of in both]
    of_targets = np.where(np.arange(24) < 20, PAD, documents)
    np.testing.assert_allclose(query_losses(model, documents, of_targets), want, rtol=1e-5)


def test_each_common_ngram_counts_once():
    documents = np.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 1, 2], [9, 9, 9, 9, 9, 9]])
    queries = np.array([[1, 2, 3, 4, 5, 9], [9, 9, 9, 9, 9, 9]])
    assert ngram_overlap(documents, queries).tolist() == [[2, 1, 0], [0, 0, 1]]


def test_bm25_is_lucenes_formula():
    pytest.importorskip("bm25s")
    documents, queries = (
        np.array([[5, 5, 7, 8], [5, 6, 6, 6], [1, 2, 3, 4]]),
        np.array([[5, 6, 6, 99]]),
    )
    k1, b, n, mean_length = 1.5, 0.75, 3, 4.0

    def weight(token: int, document: list[int]) -> float:
        df = sum(token in d for d in documents.tolist())
        tf, length = document.count(token), len(document)
        idf = np.log(1 + (n - df + 0.5) / (df + 0.5))
        return idf * tf / (tf + k1 * (1 - b + b * length / mean_length)) if df else 0.0

    want = [[sum(weight(t, d) for t in q) for d in documents.tolist()] for q in queries.tolist()]
    np.testing.assert_allclose(bm25(documents, queries), want, rtol=1e-5)
