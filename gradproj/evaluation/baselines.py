"""Baselines: BM25, common n-grams, and cosine of hidden states."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradproj.evaluation.corpus import PAD, unpadded
from gradproj.evaluation.losses import LOSS_BATCH, load
from gradproj.text.scores import QueryText, text_scores


def bm25(documents: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return BM25 (Lucene's, the default of bm25s) of token ids as words, ``(Q, N)`` float32."""
    # On use: bm25s is of an optional extra.
    import bm25s

    index = bm25s.BM25()
    index.index([_words(ids) for ids in unpadded(documents)], show_progress=False)
    # A token that occurs twice in a query counts twice; one that no document has counts nothing.
    scores = [index.get_scores(_words(ids)) for ids in unpadded(queries)]
    return np.stack(scores).astype(np.float32)


def _words(ids: np.ndarray) -> list[str]:
    return [str(token) for token in ids.tolist()]


def ngram_overlap(documents: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Count the distinct 4-grams that query and document share, ``(Q, N)`` float32."""
    document_ngrams = [ngrams(ids.tolist()) for ids in unpadded(documents)]
    query_ngrams = [ngrams(ids.tolist()) for ids in unpadded(queries)]
    shared = [[len(query & document) for document in document_ngrams] for query in query_ngrams]
    return np.array(shared, np.float32)


def text_kernel(
    documents: Sequence[np.ndarray],
    queries: Sequence[np.ndarray],
    first: np.ndarray | None = None,
) -> np.ndarray:
    """Return the text score of ``gradproj query``, ``(Q, N)`` float32, with exact frequencies.

    ``first`` is each query's first target ``(Q,)``: n-grams count that end there or later. Without
    it all do.
    """
    begins = np.zeros(len(queries), np.int64) if first is None else np.where(first > 1, first, 0)
    texts = [
        QueryText(ids, np.arange(len(ids)) >= begin)
        for ids, begin in zip(queries, begins, strict=True)
    ]
    return text_scores(texts, documents).astype(np.float32)


def ngrams(ids: Sequence[int]) -> set[tuple[int, ...]]:
    return set(zip(*(ids[i:] for i in range(4)), strict=False))


@torch.no_grad()
def mean_hidden_states(folder: Path, ids: np.ndarray, device: str) -> Tensor:
    """Average the last hidden states of ids ``(n, S)`` over tokens, ``(n, H)`` float32."""
    model = load(folder, device)
    means = []
    for batch in torch.from_numpy(ids).to(model.device).split(LOSS_BATCH):
        states = model.base_model(input_ids=batch.clamp(min=0), use_cache=False)[0]
        shown = (batch != PAD)[:, :, None]
        means.append(((states * shown).sum(dim=1) / shown.sum(dim=1)).cpu())
    return torch.cat(means)


def hidden_cosine(
    folder: Path, documents: np.ndarray, queries: np.ndarray, device: str
) -> np.ndarray:
    """Return cosines of mean hidden states, ``(Q, N)``.

    The mean over the documents is subtracted first: it is most of every text's hidden state.
    """
    document_states = mean_hidden_states(folder, documents, device)
    query_states = mean_hidden_states(folder, queries, device)
    centre = document_states.mean(dim=0)
    a = torch.nn.functional.normalize(query_states - centre, dim=1)
    b = torch.nn.functional.normalize(document_states - centre, dim=1)
    return (a @ b.T).numpy()
