"""A plain query: which documents of a store support a text most.

The text goes through the engine with the settings, weights and matrices that the store recorded, so its row
is the one the job would have made of it; the rows of the store are then scanned once.
"""

import dataclasses
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.batching import collate, split_long
from gradproj.config import RunConfig
from gradproj.corpus.index import list_tars, load_index
from gradproj.corpus.stream import read_documents
from gradproj.dist import choose_device
from gradproj.engine import GradProjLoraEngine
from gradproj.errors import ConfigError, ModelError, StoreError
from gradproj.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from gradproj.flags import flag_of
from gradproj.loss import Targets, per_sample_loss
from gradproj.model import ModelFiles, fetch, load_model, load_model_config, load_tokenizer
from gradproj.plan import INDEX_NAME
from gradproj.start import matrices_on, prepare_torch
from gradproj.store import STATUS, ProjectionStore, Sample

SCORES = ("cosine", "dot")
MEANINGS = {
    "cosine": "cosine of the two projected gradients, without unit, from -1 to 1",
    "dot": "inner product of the two projected gradients: about how many nats per token the query's loss "
    "falls per unit of learning rate, in one plain gradient step on the document",
}
SIGN = "positive: training more on the document lowers the query's loss; negative: raises it"
EXCERPT_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """What is asked of which store."""

    output: str = field(metadata={"flag": "OUTPUT", "positional": True, "help": "the job's --output_dir"})
    text: str = field(metadata={"help": "the query; it is tokenized as the documents were"})
    score: str = field(default="cosine", metadata={"help": "what documents are ranked by", "choices": SCORES})
    top_k: int = field(default=20, metadata={"help": "documents to show"})
    show_text: bool = field(default=False, metadata={"help": "show each document's beginning, from its tar"})
    model: str = field(default="", metadata={"help": "where the job's model lies now, if it has moved"})
    tokenizer: str = field(default="", metadata={"help": "where its tokenizer lies now, if it has moved"})
    shards: str = field(default="", metadata={"help": "where the tars lie now, if they have moved"})
    device: str = field(
        default="auto",
        metadata={"help": "where the query's gradient is taken", "choices": ("auto", "cpu", "cuda")},
    )

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ConfigError("--text is empty; give the text to ask about")
        if self.score not in SCORES:
            raise ConfigError(f"--score is {self.score!r}; choose one of {', '.join(SCORES)}")
        if self.top_k < 1:
            raise ConfigError(f"--top_k must be at least 1, got {self.top_k}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is {self.device!r}; choose auto, cpu or cuda")


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
    run = recorded_config(Path(config.output))
    prepare_torch(run)
    run = _moved(run, config)
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


# ---- What the job recorded


def recorded_config(output: Path) -> RunConfig:
    """The settings of the job that made ``output``, from its ``run_config.json``.

    Raises:
        StoreError: it is not there or not readable.
    """
    path = output / "run_config.json"
    try:
        flags = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StoreError(f"{output} is not a job's --output_dir: it holds no run_config.json") from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    sections = {}
    for section in dataclasses.fields(RunConfig):
        kind = typing.cast(Any, section.type)
        known = [f for f in dataclasses.fields(kind) if flag_of(f) in flags]
        sections[section.name] = kind(**{f.name: flags[flag_of(f)] for f in known})
    return RunConfig(**sections)


def _moved(run: RunConfig, config: QueryConfig) -> RunConfig:
    model, tokenizer = run.model, config.tokenizer or run.model.tokenizer
    if config.model:
        model = replace(model, model=config.model, architecture="")
    corpus = replace(run.corpus, shards=config.shards or run.corpus.shards)
    return replace(run, model=replace(model, tokenizer=tokenizer), corpus=corpus)


def document_texts(output: str | Path, run: RunConfig) -> Callable[[int], str]:
    """A function from a sample id to its document's text, read from the tars.

    Raises:
        CorpusError: the tars are not where the job found them, or have changed.
    """
    index, shards = load_index(Path(output) / INDEX_NAME), run.corpus.shards
    if not shards.endswith(".json"):
        index = index.relocated(list_tars(shards))

    def read(sample_id: int) -> str:
        (document,) = read_documents(index, sample_id, sample_id + 1, run.limits)
        if document.text is not None:
            return document.text
        return f"({document.problem})" if document.problem else f"token ids {(document.input_ids or [])[:50]}"

    return read


def recorded_model(store: ProjectionStore, run: RunConfig) -> tuple[ModelFiles, Any]:
    """``(files, tokenizer)`` of the store's model, once they are known to be the same as then.

    Raises:
        ModelError: gone, or changed since; lists what differs.
    """
    name, commit = run.model.model, store.attributes["model"]["revision"]
    is_local = Path(name).is_dir() if name else False
    if name and not commit and not is_local:  # only a hub's model has a commit
        raise ModelError(
            f"--model {name}, as the job recorded it, is no directory here: go to the folder in which the job "
            "was started, or give --model DIR where it lies now"
        )
    files = fetch(replace(run.model, revision="" if is_local else commit))
    tokenizer = load_tokenizer(files)
    found = {
        "--model (weights)": weights_fingerprint(files),
        "--model (config)": config_fingerprint(load_model_config(files)),
        "--tokenizer": tokenizer_fingerprint(tokenizer),
    }
    identity = store.attributes["identity"]
    changed = [name for name, value in found.items() if identity[name] != value]
    if changed:
        raise ModelError(
            f"{files.model_dir or run.model.architecture} is not what {store.path} was made with; its "
            f"{' and '.join(changed)} changed since. Put back what it was, or make a new store"
        )
    return files, tokenizer


# ---- The query's row


class QueryProjector:
    """Makes a text's row as the store's job would have made it."""

    def __init__(self, store: ProjectionStore, run: RunConfig, device: str = "auto") -> None:
        """Load the recorded model; ``ModelError`` where it is not the same any more."""
        files, self._tokenizer = recorded_model(store, run)
        self._device, _ = choose_device(device, 0)
        self._model = load_model(files, self._device)
        matrices = matrices_on(self._device, store.projection_matrices)
        self._engine = GradProjLoraEngine.from_config(self._model, run.projection, matrices)
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
