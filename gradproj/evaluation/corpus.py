"""The experiment's documents: windows of one length of a corpus, some held out as queries, some near-copies."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.checkpoint import ModelConfig, fetch
from gradproj.corpus.tarwriter import TarSequence, published
from gradproj.errors import CorpusError
from gradproj.evaluation.config import LdsConfig
from gradproj.model import load_tokenizer
from gradproj.training.data import open_corpus, shuffled_documents, tokens_of
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

SAMPLES_PER_TAR = 4096
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
    made = Experiment(*_EMPTY, folder / "documents", folder / "queries", tokenizer_dir)
    if not (folder / "tokens.npz").is_file():
        if not config.tokenizer and not (tokenizer_dir / "tokenizer.json").is_file():
            train_tokenizer(
                TokenizerConfig(
                    shards=config.shards, output_dir=str(tokenizer_dir), vocab_size=config.vocab_size,
                    max_samples=TOKENIZER_SAMPLES,
                )
            )  # fmt: skip
        files = fetch(ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(tokenizer_dir)))
        tokenizer = load_tokenizer(files)
        _write(config, made, tokenizer, *_draw(config, _windows(config, tokenizer)))
    arrays = np.load(folder / "tokens.npz")
    return Experiment(
        arrays["documents"], arrays["queries"], arrays["copies"], made.document_tars, made.query_tars, tokenizer_dir
    )  # fmt: skip


_EMPTY = (np.empty((0, 0), np.int64), np.empty((0, 0), np.int64), np.empty(0, np.int64))


def _windows(config: LdsConfig, tokenizer: Any) -> list[_Window]:
    """As many full windows as are needed, of documents in a shuffled order."""
    index, length = open_corpus(config.shards), config.max_length
    needed = config.documents + config.queries  # near-copies take the place of documents
    found: list[_Window] = []
    for document in shuffled_documents(index, config.seed, epoch=0):
        tokens = tokens_of(document, tokenizer, config.windows * length)
        for begin in range(0, len(tokens) - length + 1, length):
            source = f"{document.key} {begin}"
            found.append(_Window(tokens[begin : begin + length], document.domain, source))
        if len(found) >= needed:
            return found[:needed]
    raise CorpusError(
        f"--shards {config.shards} gives {len(found):,} documents of {length} tokens (at most {config.windows} from "
        f"each of its own); --documents {config.documents:,} and --queries {config.queries:,} need {needed:,}: ask "
        "for fewer, or a smaller --max_length, or more --windows"
    )


def _draw(config: LdsConfig, windows: list[_Window]) -> tuple[list[_Window], list[_Window], np.ndarray]:
    """``(documents, queries, copies)``; a near-copy's original is among the queries, no document of the corpus."""
    random = np.random.default_rng([config.seed, 1])
    n_own = config.documents - config.duplicates
    mixed = [windows[i] for i in random.permutation(len(windows))]
    own, queries = mixed[:n_own], mixed[n_own:]
    originals = queries[config.queries :]
    known = np.concatenate([window.ids for window in own])
    copies = [_Window(_changed(w.ids, known, config.changed, random), w.domain, w.source) for w in originals]
    order = random.permutation(config.documents)
    together = own + copies
    places = np.argsort(order)[n_own:]
    return [together[i] for i in order], queries, places


def _changed(ids: np.ndarray, known: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Some of the tokens, at random places, replaced by tokens drawn from the corpus."""
    changed = ids.copy()
    places = random.permutation(len(ids))[: round(share * len(ids))]
    changed[places] = random.choice(known, len(places))
    return changed


def _write(
    config: LdsConfig,
    made: Experiment,
    tokenizer: Any,
    documents: list[_Window],
    queries: list[_Window],
    copies: np.ndarray,
) -> None:
    for folder, windows in ((made.document_tars, documents), (made.query_tars, queries)):
        if not folder.is_dir():
            payloads = [_payload(w.ids, w.domain, tokenizer.decode(w.ids), w.source) for w in windows]
            write_tars(folder, payloads)
    path = Path(config.output_dir) / "tokens.npz"
    arrays = {
        "documents": np.stack([w.ids for w in documents]),
        "queries": np.stack([w.ids for w in queries]),
        "copies": copies,
    }
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    path.with_suffix(".tmp").rename(path)


def _payload(ids: np.ndarray, domain: str, text: str, source: str) -> bytes:
    meta = {"pile_set_name": domain, "source": source}
    return json.dumps({"text": text, "input_ids": ids.tolist(), "meta": meta}).encode()


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
