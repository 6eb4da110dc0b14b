"""The experiment's documents: windows of one length of a corpus, some held out as queries, some near-copies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.tar.writer import TarSequence, published
from gradproj.errors import CorpusError
from gradproj.evaluation.config import LdsConfig
from gradproj.files import save_arrays
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_tokenizer
from gradproj.training.data import shuffled_documents, tokens_of
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

SAMPLES_PER_TAR = 4096
PRETRAIN_WINDOWS = 64
"""Most windows of a document that is pretrained on."""
TOKENIZER_SAMPLES = 2000
"""Documents that the tokenizer is trained on, where none is given."""


@dataclass(frozen=True)
class Experiment:
    """The documents as token ids; the tars hold the same."""

    documents: np.ndarray
    """``(N, S)`` int64."""
    queries: np.ndarray
    """``(Q + C, S)`` int64: Q held out, then the C of which the documents hold a near-copy."""
    copies: np.ndarray
    """``(C,)`` int64: the document that is a near-copy of each of the last C queries."""
    document_tars: Path
    query_tars: Path
    tokenizer: Path
    start: Path | None
    """The folder of the model that every training starts from; None: random weights."""

    @property
    def n_held_out(self) -> int:
        """Q."""
        return len(self.queries) - len(self.copies)


@dataclass(frozen=True)
class _Window:
    ids: np.ndarray
    domain: str
    source: str


def make_experiment(config: LdsConfig) -> Experiment:
    """Cut and write the documents, or read them where an earlier call has.

    Raises:
        CorpusError: the corpus gives too few windows.
    """
    folder = Path(config.output_dir)
    tokenizer_dir = Path(config.tokenizer) if config.tokenizer else folder / "tokenizer"
    if not (folder / "tokens.npz").is_file():
        tokenizer = _tokenizer(config, tokenizer_dir)
        found, before = _windows(config, tokenizer)
        documents, queries, copies = _draw(config, found)
        for name, windows in (("documents", documents), ("queries", queries), ("pretrain", before)):
            if windows and not (folder / name).is_dir():
                write_tars(folder / name, [_payload(window, tokenizer) for window in windows])
        save_arrays(
            folder / "tokens.npz",
            documents=np.stack([window.ids for window in documents]),
            queries=np.stack([window.ids for window in queries]),
            copies=copies,
        )
    arrays = np.load(folder / "tokens.npz", allow_pickle=False)
    parts = (arrays["documents"], arrays["queries"], arrays["copies"])
    return Experiment(
        *parts,
        folder / "documents",
        folder / "queries",
        tokenizer_dir,
        folder / "start" if config.pretrain else None,
    )


def _tokenizer(config: LdsConfig, folder: Path) -> Any:
    """The one given, or one trained on the corpus."""
    if not config.tokenizer and not (folder / "tokenizer.json").is_file():
        train_tokenizer(
            TokenizerConfig(
                shards=config.shards, output_dir=str(folder), vocab_size=config.vocab_size,
                max_samples=TOKENIZER_SAMPLES,
            )
        )  # fmt: skip
    return load_tokenizer(
        fetch(ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(folder)))
    )


def _windows(config: LdsConfig, tokenizer: Any) -> tuple[list[_Window], list[_Window]]:
    """``(windows to draw from, windows to pretrain on)``: full ones, of documents in a shuffled order, none of both."""
    index, length = open_corpus(config.shards), config.max_length
    needed = config.n_documents + config.n_queries  # near-copies take the place of documents
    found: list[_Window] = []
    before: list[_Window] = []
    for document in shuffled_documents(index, config.seed, epoch=0):
        if len(found) >= needed and len(before) >= config.pretrain:
            break
        kept, most = (
            (found, config.windows_per_document)
            if len(found) < needed
            else (before, PRETRAIN_WINDOWS)
        )
        tokens = tokens_of(document, tokenizer, most * length)
        for begin in range(0, len(tokens) - length + 1, length):
            kept.append(
                _Window(tokens[begin : begin + length], document.domain, f"{document.key} {begin}")
            )
    if len(found) < needed or (config.pretrain and not before):
        raise CorpusError(
            f"--shards {config.shards} gives {len(found):,} documents of {length} tokens (at most {config.windows_per_document} "
            f"from each of its own) and {len(before):,} more to pretrain on; --n_documents {config.n_documents:,} and "
            f"--n_queries {config.n_queries:,} need {needed:,}, --pretrain some of others: ask for fewer, or a smaller "
            "--max_length, or more --windows"
        )
    return found[:needed], before[: config.pretrain]


def _draw(
    config: LdsConfig, windows: list[_Window]
) -> tuple[list[_Window], list[_Window], np.ndarray]:
    """``(documents, queries, copies)``; a near-copy's original is among the queries, no document of the corpus."""
    random = np.random.default_rng([config.seed, 1])
    n_own = config.n_documents - config.n_near_copies
    mixed = [windows[i] for i in random.permutation(len(windows))]
    own, queries = mixed[:n_own], mixed[n_own:]
    originals = queries[config.n_queries :]
    known = np.concatenate([window.ids for window in own])
    copies = [
        _Window(_changed(w.ids, known, config.corruption, random), w.domain, w.source)
        for w in originals
    ]
    order = random.permutation(config.n_documents)
    together = own + copies
    places = np.argsort(order)[n_own:]
    return [together[i] for i in order], queries, places


def _changed(
    ids: np.ndarray, known: np.ndarray, share: float, random: np.random.Generator
) -> np.ndarray:
    """Some of the tokens, at random places, replaced by tokens drawn from the corpus."""
    changed = ids.copy()
    places = random.permutation(len(ids))[: round(share * len(ids))]
    changed[places] = random.choice(known, len(places))
    return changed


def _payload(window: _Window, tokenizer: Any) -> bytes:
    meta = {"pile_set_name": window.domain, "source": window.source}
    text = tokenizer.decode(window.ids)
    return json.dumps({"text": text, "input_ids": window.ids.tolist(), "meta": meta}).encode()


def write_subset(folder: Path, documents: np.ndarray) -> None:
    """Tars of just these documents ``(n, S)``, for one training."""
    write_tars(folder, [json.dumps({"input_ids": ids}).encode() for ids in documents.tolist()])


def write_tars(folder: Path, payloads: list[bytes]) -> None:
    """A folder of tars, published whole."""
    with published(str(folder)) as work:
        tars = TarSequence(work / "tars", SAMPLES_PER_TAR)
        for payload in payloads:
            tars.add(payload)
        tars.end_tar()
