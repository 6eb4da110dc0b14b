"""The experiment's documents, queries and near-copies: windows of a corpus."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.corpus.content import Text, TokenIds
from gradproj.corpus.documents import Document
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.tar.writer import TarSequence, published
from gradproj.errors import CorpusError
from gradproj.evaluation.config import RETRAINING, LdsConfig
from gradproj.evaluation.planted import plant
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.fingerprint import check_corpus_tokenizer
from gradproj.model.tokenization import Tokenizing
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.storage.results import save_arrays
from gradproj.training.data import shuffled_documents
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

SAMPLES_PER_TAR = 4096
PRETRAIN_WINDOWS = 64
"""Most windows from one document of the pretraining."""
TOKENIZER_SAMPLES = 2000
"""Documents that train the tokenizer, if none is given."""
PAD = -1
"""Follows the token ids of a document that is shorter than the longest."""


@dataclass(frozen=True)
class Experiment:
    """Documents and queries as token ids, ``PAD`` after the end; the tars hold the same."""

    documents: np.ndarray
    """``(N, S)`` int64."""
    queries: np.ndarray
    """``(Q + C, S)`` int64: Q held out, then C that have a near-copy among the documents."""
    copies: np.ndarray
    """``(C,)`` int64: the document that is the near-copy of each of the last C queries."""
    document_tars: Path
    query_tars: Path
    tokenizer: Path
    start: Path | None
    """Directory of the model that every training starts from; None for random weights."""
    first: np.ndarray
    """``(Q + C,)`` int64: each query's first target; 1 without a prompt."""
    sources: np.ndarray | None = None
    """``(Q, N)`` bool: planted documents that a query asks for; None if nothing was planted."""

    @property
    def n_held_out(self) -> int:
        """Q."""
        return len(self.queries) - len(self.copies)

    @property
    def query_labels(self) -> np.ndarray:
        """The queries' ids ``(Q + C, S)`` at their targets, ``PAD`` elsewhere."""
        is_target = np.arange(self.queries.shape[1]) >= self.first[:, None]
        return np.where(is_target, self.queries, PAD)


@dataclass(frozen=True)
class _Window:
    ids: np.ndarray
    domain: str
    source: str


def make_experiment(config: LdsConfig) -> Experiment:
    """Cut and write the documents, or read those of an earlier call."""
    folder = Path(config.output_dir)
    tokenizer_dir = Path(config.tokenizer or config.model or folder / "tokenizer")
    if not (folder / "tokens.npz").is_file():
        tokenizer = _tokenizer(config, tokenizer_dir)
        candidates, pretrain = _windows(config, tokenizer)
        documents, queries, copies = _draw(config, candidates)
        planted: dict[str, np.ndarray] = {}
        if config.experiment != RETRAINING:
            documents, queries, planted = _planted(config, documents, queries, tokenizer)
        parts = (("documents", documents), ("queries", queries), ("pretrain", pretrain))
        for name, windows in parts:
            if windows and not (folder / name).is_dir():
                write_tars(folder / name, [_payload(window, tokenizer) for window in windows])
        save_arrays(
            folder / "tokens.npz",
            documents=_padded(documents),
            queries=_padded(queries),
            copies=copies,
            **planted,
        )
    with np.load(folder / "tokens.npz", allow_pickle=False) as file:
        arrays = dict(file)
    start = Path(config.model) if config.model else folder / "start"
    return Experiment(
        arrays["documents"], arrays["queries"], arrays["copies"],
        folder / "documents", folder / "queries", tokenizer_dir,
        start if config.model or config.pretrain else None,
        arrays.get("first", np.ones(len(arrays["queries"]), np.int64)), arrays.get("sources"),
    )  # fmt: skip


def _planted(
    config: LdsConfig, documents: list[_Window], queries: list[_Window], tokenizer: Any
) -> tuple[list[_Window], list[_Window], dict[str, np.ndarray]]:
    """Return documents and queries with what is planted, and the arrays that say what it is."""

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False).input_ids, np.int64)

    planted = plant(config, [w.ids for w in documents], [w.ids for w in queries], encode)
    documents, queries = (
        [replace(window, ids=ids) for window, ids in zip(windows, changed, strict=True)]
        for windows, changed in ((documents, planted.documents), (queries, planted.queries))
    )
    return documents, queries, {"first": planted.first, "sources": planted.sources}


def unpadded(ids: np.ndarray) -> list[np.ndarray]:
    """Return the token ids of each row of ``(n, S)`` without ``PAD``."""
    return [row[row != PAD] for row in ids]


def _padded(windows: "list[_Window]") -> np.ndarray:
    ids = np.full((len(windows), max(len(window.ids) for window in windows)), PAD, np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window.ids)] = window.ids
    return ids


def _tokenizer(config: LdsConfig, folder: Path) -> Any:
    """Load the given tokenizer or the model's, or train one on the corpus."""
    trained = not config.tokenizer and not config.model
    if trained and not (folder / "tokenizer.json").is_file():
        train_tokenizer(
            TokenizerConfig(
                shards=config.shards, output_dir=str(folder), vocab_size=config.vocab_size,
                max_samples=TOKENIZER_SAMPLES,
            )
        )  # fmt: skip
    model = ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(folder))
    return load_tokenizer(fetch(model))


def _windows(config: LdsConfig, tokenizer: Any) -> tuple[list[_Window], list[_Window]]:
    """Return windows to draw from and others, of the greatest length, to pretrain on.

    Documents are in a shuffled order, and none has windows of both.
    """
    index, longest = open_corpus(config.shards), config.max_length
    check_corpus_tokenizer(index.tokenization, tokenizer)
    shortest = config.min_length or longest
    lengths = np.random.default_rng([config.seed, 5])
    needed = config.n_documents + config.n_queries  # near-copies take the place of documents
    n_pretrain = 0 if config.model else config.pretrain
    candidates: list[_Window] = []
    pretrain: list[_Window] = []
    n_others = 0
    for document in shuffled_documents(index, config.seed, epoch=0):
        if len(candidates) >= needed and len(pretrain) >= n_pretrain:
            break
        target, most, least = pretrain, PRETRAIN_WINDOWS, longest
        if len(candidates) < needed:
            target, most, least = candidates, config.windows_per_document, shortest
        tokens, begin = _tokens_of(document, tokenizer, most * longest), 0
        n_others += tokens is None
        for length in lengths.integers(least, longest + 1, most).tolist():
            if tokens is None or begin + length > len(tokens):
                break
            ids, source = tokens[begin : begin + length], f"{document.key} {begin}"
            target.append(_Window(ids, document.domain, source))
            begin += length
    if len(candidates) < needed or (n_pretrain and not pretrain):
        of_tokens = f"{shortest} to {longest}" if shortest < longest else str(longest)
        left_out = f"; {n_others:,} documents with a prompt or labels are left out" * (n_others > 0)
        raise CorpusError(
            f"--shards {config.shards} has {len(candidates):,} windows of {of_tokens} tokens (at "
            f"most --windows_per_document {config.windows_per_document}) and {len(pretrain):,} of "
            f"other documents to pretrain on; --n_documents {config.n_documents:,} and --n_queries "
            f"{config.n_queries:,} need {needed:,}, and --pretrain needs at least one: give fewer "
            f"of them, a smaller --max_length, or more --windows_per_document{left_out}"
        )
    return candidates[:needed], pretrain[:n_pretrain]


def _tokens_of(document: Document, tokenizer: Any, most: int) -> np.ndarray | None:
    """Return the first ``most`` token ids of a text, or of token ids; None of any other form.

    A window of tokens is a document of the experiment, and all its tokens are targets.
    """
    content = document.content
    if isinstance(content, TokenIds):
        return np.asarray(content.ids[:most], np.int64) if content.labels is None else None
    if not isinstance(content, Text):
        return None if content is not None else np.empty(0, np.int64)
    (ids,) = Tokenizing(tokenizer, "tokenizer", most).ids([content.text])
    return ids[:most]


def _draw(
    config: LdsConfig, windows: list[_Window]
) -> tuple[list[_Window], list[_Window], np.ndarray]:
    """Return documents, queries and ``copies``.

    The original of a near-copy is among the queries and not among the documents.
    """
    random = np.random.default_rng([config.seed, 1])
    n_originals = config.n_documents - config.n_near_copies
    mixed = [windows[i] for i in random.permutation(len(windows))]
    documents, queries = mixed[:n_originals], mixed[n_originals:]
    tokens = np.concatenate([window.ids for window in documents])
    copies = [
        replace(w, ids=_corrupted(w.ids, tokens, config.corruption, random))
        for w in queries[config.n_queries :]
    ]
    order = random.permutation(config.n_documents)
    documents += copies
    return [documents[i] for i in order], queries, np.argsort(order)[n_originals:]


def _corrupted(
    ids: np.ndarray, tokens: np.ndarray, fraction: float, random: np.random.Generator
) -> np.ndarray:
    """Replace a fraction of the ids, at random positions, by random ones of ``tokens``."""
    corrupted = ids.copy()
    positions = random.permutation(len(ids))[: round(fraction * len(ids))]
    corrupted[positions] = random.choice(tokens, len(positions))
    return corrupted


def _payload(window: _Window, tokenizer: Any) -> bytes:
    meta = {"pile_set_name": window.domain, "source": window.source}
    text = tokenizer.decode(window.ids)
    return json.dumps({"text": text, "input_ids": window.ids.tolist(), "meta": meta}).encode()


def write_subset(folder: Path, documents: np.ndarray) -> None:
    """Write tars of these documents ``(n, S)``, for one training."""
    rows = unpadded(documents)
    write_tars(folder, [json.dumps({"input_ids": ids.tolist()}).encode() for ids in rows])


def write_tars(folder: Path, payloads: list[bytes]) -> None:
    """Write a directory of tars, published atomically."""
    with published(str(folder)) as work:
        tars = TarSequence(work / "tars", SAMPLES_PER_TAR)
        for payload in payloads:
            tars.add({"json": payload})
        tars.end_tar()
