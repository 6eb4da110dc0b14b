"""A plain query: which documents of a store support a text most.

The text goes through the engine with the settings, weights and matrices that the store recorded, so its row
is the one the job would have made of it; the rows of the store are then scanned once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from gradproj.batching import collate, split_long
from gradproj.config import RunConfig
from gradproj.coordinator.config import RecordedInputs
from gradproj.errors import ConfigError, StoreError
from gradproj.loss import Targets, per_sample_loss
from gradproj.recorded import config_from, recorded_config, recorded_engine, recorded_index
from gradproj.start import prepare_torch
from gradproj.store import STATUS, ProjectionStore, Sample
from gradproj.texts import text_of

__all__ = [
    "QueryConfig",
    "QueryProjector",
    "QueryResult",
    "QueryRow",
    "document_texts",
    "query",
    "recorded_config",
    "result_lines",
    "score_rows",
    "top_documents",
]

SCORES = ("cosine", "dot")
MEANINGS = {
    "cosine": "cosine of the two projected gradients, without unit, from -1 to 1",
    "dot": "inner product of the two projected gradients: about how many nats the query's loss (mean or sum over "
    "its tokens, as the store's rows) falls per unit of learning rate, in one plain gradient step on the document",
}
SIGN = "positive: training more on the document lowers the query's loss; negative: raises it"
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class QueryConfig(RecordedInputs):
    """What is asked of which store."""

    text: str = field(metadata={"help": "the query; it is tokenized as the documents were"})
    score: str = field(default="cosine", metadata={"help": "what documents are ranked by", "choices": SCORES})
    top_k: int = field(default=20, metadata={"help": "documents to show"})
    show_text: bool = field(default=False, metadata={"help": "show each document's beginning, from its tar"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text.strip():
            raise ConfigError("--text is empty; give the text to ask about")
        if self.score not in SCORES:
            raise ConfigError(f"--score is {self.score!r}; choose one of {', '.join(SCORES)}")
        if self.top_k < 1:
            raise ConfigError(f"--top_k must be at least 1, got {self.top_k}")


@dataclass(frozen=True)
class QueryRow:
    """A text as the job would store it."""

    row: np.ndarray
    """``(D,)`` float32."""
    n_tokens: int
    """Target tokens."""
    loss: float
    """Mean nats per target token."""


@dataclass(frozen=True)
class QueryResult:
    """The best documents of those that have a row."""

    query: QueryRow
    scores: np.ndarray
    """``(k,)`` float32, highest first."""
    samples: list[Sample]
    n_scored: int
    n_missing: int
    """Documents whose unit is not computed yet."""


def query(config: QueryConfig) -> QueryResult:
    """Score every document of a store against a text, in one scan and bounded memory.

    Raises:
        StoreError: no store there, or none of its rows is there yet.
        ModelError: the model or the tokenizer is not the one the store was made with.
        ConfigError: the text has no target token, or more tokens than the store's documents.
    """
    run = config_from(config)
    prepare_torch(run)
    texts = document_texts(config.output, run) if config.show_text else None
    with ProjectionStore(config.output, read_text=texts) as store:
        asked = QueryProjector(store, run, config.device).row(config.text)
        ids, scores, n_scored = top_documents(store, asked.row, config.score, config.top_k)
        n_missing = sum(stop - start for start, stop in store.missing_ranges())
        if not n_scored:
            raise StoreError(
                f"{store.path} has no row yet ({n_missing:,} of {len(store):,} documents are still to be computed); "
                "start the job again on it"
            )
        samples = store.samples(ids, text=config.show_text)
    return QueryResult(asked, scores, samples, n_scored, n_missing)


# ---- The documents


def document_texts(output: str | Path, run: RunConfig) -> Callable[[int], str]:
    """A function from a sample id to its document's text, read from the tars.

    Raises:
        CorpusError: the tars are not where the job found them, or have changed.
    """
    index = recorded_index(Path(output), run)

    return functools.partial(text_of, index)


# ---- The query's row


class QueryProjector:
    """Makes a text's row as the store's job would have made it."""

    def __init__(self, store: ProjectionStore, run: RunConfig, device: str = "auto") -> None:
        """Load the recorded model; ``ModelError`` where it is not the same any more."""
        recorded = recorded_engine(store, run, device)
        self._tokenizer, self._device = recorded.tokenizer, recorded.device
        self._model, self._engine = recorded.model, recorded.engine
        self._run = run

    def row(self, text: str) -> QueryRow:
        """The text's row, by the recorded special tokens, length rule and reduction.

        Raises:
            ConfigError: fewer than two tokens, or more than the store's documents have.
        """
        batch_config = self._run.batch
        sequences = split_long(self._tokens(text), batch_config.max_length, batch_config.long_documents)
        n_tokens = sum(len(s) - 1 for s in sequences)
        total, loss = torch.zeros(self._engine.total_proj_dim, device=self._device), 0.0
        with self._engine as engine:
            for sequence in sequences:
                batch = collate([sequence], np.array([0]), pad=0).to(self._device)
                engine.set_token_mask(batch.token_mask)
                targets = Targets(batch.positions, batch.targets)
                losses = per_sample_loss(self._model, {"input_ids": batch.input_ids, "targets": targets})
                losses.sum().backward()
                total += engine.collect_batch()[0]
                loss += losses.item()
        if batch_config.loss_reduction == "mean":
            total /= n_tokens
        return QueryRow(total.cpu().numpy(), n_tokens, loss / n_tokens)

    def _tokens(self, text: str) -> list[int]:
        special, tokenizer = self._run.model.special_tokens, self._tokenizer
        # A shell passes bytes that are no UTF-8 on as lone surrogates.
        ids = tokenizer(
            text.encode("utf-8", "replace").decode(), add_special_tokens=special == "tokenizer"
        ).input_ids
        before = [tokenizer.bos_token_id] if "bos" in special else []
        after = [tokenizer.eos_token_id] if "eos" in special else []
        tokens, most = [*before, *ids, *after], self._run.batch.max_length
        if len(tokens) < 2:
            raise ConfigError(
                "--text is a single token, which has no target to take a gradient of; give more text"
            )
        if len(tokens) > most and self._run.batch.long_documents == "truncate":
            raise ConfigError(
                f"--text has {len(tokens):,} tokens, and the rows cover the first {most:,} of a document: shorten it"
            )
        return tokens


# ---- The scan


def top_documents(
    store: ProjectionStore, row: np.ndarray, score: str, top_k: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """The documents with the highest scores; only those whose status is ok take part.

    Args:
        store: finished or not.
        row: the query's, ``(D,)``.
        score: a key of ``MEANINGS``.
        top_k: how many.

    Returns:
        ``(ids (k,) int64, scores (k,) float32, documents scored)``, highest first, ties by id.
    """
    best_ids, best = np.empty(0, np.int64), np.empty(0, np.float32)
    n_scored = 0
    for ids, rows in store.scan():
        ok = store.column("status", int(ids[0]), int(ids[-1]) + 1) == STATUS["ok"]
        ids, rows = ids[ok], rows[ok]
        n_scored += len(ids)
        best_ids = np.concatenate([best_ids, ids])
        best = np.concatenate([best, score_rows(rows, row, score)])
        order = np.argsort(-best, kind="stable")[:top_k]
        best_ids, best = best_ids[order], best[order]
    return best_ids, best, n_scored


def score_rows(rows: np.ndarray, row: np.ndarray, score: str) -> np.ndarray:
    """``(n,)`` float32 scores of rows ``(n, D)`` against a query's row; a zero row has score 0."""
    scores = rows @ row
    if score == "cosine":
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows)) * np.linalg.norm(row)
        scores = scores / np.maximum(norms, np.finfo(np.float32).tiny)
    return scores.astype(np.float32)


# ---- For people


def result_lines(config: QueryConfig, result: QueryResult) -> list[str]:
    """The answer as lines of text, with what the score means."""
    asked, n_scored = result.query, result.n_scored
    missing = f"; {result.n_missing:,} more are not computed yet" if result.n_missing else ""
    lines = [
        f"query   {asked.n_tokens:,} target tokens, loss {asked.loss:.3f} nats per token",
        f"rows    {n_scored:,} documents compared{missing}",
        f"score   {MEANINGS[config.score]}",
        f"        {SIGN}",
        "",
        f"{'rank':>4}  {'score':>10}  {'id':>9}  {'loss':>6}  {'domain':<18}  key",
    ]
    for rank, (value, sample) in enumerate(zip(result.scores.tolist(), result.samples, strict=True), start=1):
        shown = f"{value:+.4f}" if config.score == "cosine" else f"{value:+.3e}"
        lines.append(
            f"{rank:>4}  {shown:>10}  {sample.sample_id:>9}  {sample.loss:>6.3f}  {sample.domain or '-':<18}  "
            f"{_one_line(sample.key)}"
        )
        if sample.text is not None:
            lines.append(f"      {_one_line(sample.text)}")
    return lines


def _one_line(text: str) -> str:
    """An excerpt that cannot disturb a terminal: white space joined, control characters left out."""
    joined = " ".join(text[: 4 * EXCERPT_CHARACTERS].split())
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in joined)
    return clean if len(clean) <= EXCERPT_CHARACTERS else clean[: EXCERPT_CHARACTERS - 3] + "..."
