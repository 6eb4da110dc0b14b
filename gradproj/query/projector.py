"""Project queries with the engine, model, settings and matrices of a store's job."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.batching import (
    Batch,
    BatchConfig,
    collate,
    fit_padding,
    plan_batches,
    split_long,
)
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import ConfigError
from gradproj.formatting import human_bytes, one_line
from gradproj.job.config import RunConfig
from gradproj.job.recorded import config_from, recorded_engine
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.query.queries import EXCERPT_CHARACTERS, Query
from gradproj.store import ProjectionStore

MAX_ROWS_BYTES = 2**32
"""Most bytes of query rows, which stay in memory while a store is scanned."""
_PROMPT_FRACTION = 0.4
"""Fraction of an excerpt that a prompt may always use, however long the completion is."""


@dataclass(frozen=True)
class QueryRows:
    """Queries as the job would store them."""

    names: list[str]
    rows: np.ndarray
    """``(Q, D)`` float32."""
    n_tokens: np.ndarray
    """``(Q,)`` int64: target tokens."""
    loss: np.ndarray
    """``(Q,)`` float64: mean nats per target token."""
    excerpts: list[str]
    """One line per query, of at most ``EXCERPT_CHARACTERS`` characters."""


def check_rows_fit(source: str, n_queries: int, dim: int, way_out: str) -> None:
    """Raise ``ConfigError`` if the rows of these queries do not fit the memory allowed for them.

    ``source`` is the flag and value that name the queries, ``way_out`` the message's last sentence.
    """
    n_bytes = 4 * n_queries * dim
    if n_bytes > MAX_ROWS_BYTES:
        raise ConfigError(
            f"{source} has {n_queries:,} queries, whose rows of {dim:,} values take "
            f"{human_bytes(n_bytes)} of memory; the limit is {human_bytes(MAX_ROWS_BYTES)}, "
            f"{MAX_ROWS_BYTES // (4 * dim):,} queries. {way_out}"
        )


@dataclass(frozen=True)
class _Tokens:
    """Token ids of a query, or of a window of a long one."""

    ids: np.ndarray
    first: int
    """The first target of the loss; at least 1, since the first token has no predecessor."""
    query: int = -1
    """Number of the query."""


class QueryProjector:
    """Projects queries in the way a store's job projects documents.

    Args:
        store: source of settings and matrices.
        run: the job's settings; None for the recorded ones. Use ``recorded.config_from`` if the
            model has moved or is allowed to run its own code.
        device: auto, cpu or cuda.

    Raises:
        ModelError: the model or the tokenizer differs from the recorded one, or could run code
            that the caller has not allowed.
    """

    def __init__(
        self, store: ProjectionStore, run: RunConfig | None = None, device: str = "auto"
    ) -> None:
        run = run or config_from(RecordedRunArgs(output=str(store.path.parent)))
        prepare_torch(run.job.threads, run.job.deterministic)
        recorded = recorded_engine(store, run, device)
        self._tokenizer, self._vocabulary = recorded.tokenizer, recorded.vocabulary
        self._model, self._engine, self._device = recorded.model, recorded.engine, recorded.device
        self._special, self._batch = run.model.special_tokens, recorded.batch

    def rows(self, queries: Sequence[Query]) -> QueryRows:
        """Project queries by the recorded special tokens, length rule and loss reduction.

        A prompt and its completion are tokenized as one text, as a document would hold them. The
        loss is on every token with a character of the completion, including one that spans the
        boundary, and on the special tokens that the store's documents end with.

        Raises:
            ConfigError: no query; or one without a target token, with more tokens than a row
                covers, with unknown token ids, or with a gradient that is not finite.
        """
        if not queries:
            raise ConfigError("there is no query to project; give at least one")
        tokens = [self._tokens_of(query) for query in queries]
        sequences = list(self._windows(tokens))
        rows = np.zeros((len(queries), self._engine.total_proj_dim), np.float32)
        loss = np.zeros(len(queries))
        lengths = [len(sequence.ids) for sequence in sequences]
        # 0 means that the job measured its own device; this device may be another.
        budget = self._batch.batch_tokens or BatchConfig().batch_tokens
        run = functools.partial(self._forward_backward, sequences)
        padding = self._batch.max_padding
        if len(set(lengths)) > 1:
            padding = fit_padding(self._model, self._batch, max(lengths)).max_padding
        with self._engine:
            sizes = self._batch.batch_size, budget, padding
            for chosen in plan_batches(lengths, *sizes):
                for part, result in run_in_halves(self._engine, chosen, run):
                    if result is None:
                        raise ConfigError(
                            f"{queries[sequences[part[0]].query].place}: does not fit the memory "
                            f"of {self._device}; try --device cpu"
                        )
                    part_rows, part_loss = result
                    owners = [sequences[i].query for i in part]
                    np.add.at(rows, owners, part_rows.cpu().numpy())
                    np.add.at(loss, owners, part_loss.double().cpu().numpy())
        n_tokens = np.array([len(t.ids) - t.first for t in tokens], np.int64)
        if self._batch.loss_reduction == "mean":
            rows /= n_tokens[:, None].astype(np.float32)
        for query, row in zip(queries, rows, strict=True):
            if not np.isfinite(row).all():
                raise ConfigError(f"{query.place}: its gradient is not finite; leave the query out")
        names, excerpts = [q.name for q in queries], [self._excerpt(q) for q in queries]
        return QueryRows(names, rows, n_tokens, loss / n_tokens, excerpts)

    # --- tokens ---

    def _tokens_of(self, query: Query) -> _Tokens:
        tokens, max_length = self._encode(query), self._batch.max_length
        n = len(tokens.ids)
        if tokens.first >= n:
            length = "a single token" if n < 2 else f"{n:,} tokens, all of the prompt"
            raise ConfigError(f"{query.place}: {length}: no target for a loss; give more text")
        if n > max_length and self._batch.long_documents == "truncate":
            raise ConfigError(
                f"{query.place}: {n:,} tokens, and the store's rows cover the first "
                f"{max_length:,} of a document; shorten it"
            )
        return tokens

    def _encode(self, query: Query) -> _Tokens:
        if query.input_ids is not None:
            self._check_vocabulary(query, max(query.input_ids))
            return _Tokens(np.array(query.input_ids, dtype=np.int64), 1)
        prompt = _encodable(query.prompt or "")
        whole = prompt + _encodable(query.completion if query.text is None else query.text)
        encoding = self._tokenizer(
            whole,
            add_special_tokens=self._special == "tokenizer",
            return_offsets_mapping=self._tokenizer.is_fast,
        )
        first = _first_completion_token(
            encoding, prompt, self._tokenizer, self._special == "tokenizer"
        )
        before = [self._tokenizer.bos_token_id] if "bos" in self._special else []
        after = [self._tokenizer.eos_token_id] if "eos" in self._special else []
        ids = np.array([*before, *encoding.input_ids, *after], dtype=np.int64)
        self._check_vocabulary(query, int(ids.max(initial=0)))
        return _Tokens(ids, max(1, len(before) + first))

    def _check_vocabulary(self, query: Query, largest: int) -> None:
        if largest >= self._vocabulary:
            raise ConfigError(
                f"{query.place}: token id {largest}; the model has ids from 0 to "
                f"{self._vocabulary - 1:,}"
            )

    def _windows(self, tokens: Sequence[_Tokens]) -> Iterator[_Tokens]:
        for number, query in enumerate(tokens):
            start = 0
            for part in split_long(query.ids, self._batch.max_length, self._batch.long_documents):
                first = max(1, query.first - start)
                if first < len(part):  # a window within the prompt has no target
                    yield _Tokens(part, first, number)
                start += len(part) - 1  # windows overlap by one token

    def _forward_backward(
        self, sequences: list[_Tokens], chosen: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        batch = collate([sequence.ids for sequence in sequences], chosen, pad=0)
        batch = _only_targets_from(batch, [sequences[i].first for i in chosen]).to(self._device)
        result = run_batch(self._model, self._engine, batch)
        self._engine.take_token_covariances()  # a query needs none
        return result

    def _excerpt(self, query: Query) -> str:
        if query.input_ids is not None:
            text = self._tokenizer.decode(query.input_ids[:EXCERPT_CHARACTERS])
            return one_line(text, EXCERPT_CHARACTERS)
        if query.text is not None:
            return one_line(query.text, EXCERPT_CHARACTERS)
        completion = one_line(query.completion or "", EXCERPT_CHARACTERS - 4)
        room = max(
            int(_PROMPT_FRACTION * EXCERPT_CHARACTERS), EXCERPT_CHARACTERS - 4 - len(completion)
        )
        prompt = one_line((query.prompt or "").rstrip()[-4 * room :], 4 * room)
        prompt = prompt if len(prompt) <= room else "..." + prompt[3 - room :]
        return one_line(f"{prompt} >> {completion}" if prompt else completion, EXCERPT_CHARACTERS)


def _first_completion_token(encoding: Any, prompt: str, tokenizer: Any, special: bool) -> int:
    """Return the first token with a character after the prompt, from the token offsets.

    Slow tokenizers have no offsets. There it is the first token that differs from those of the
    prompt alone, which is too early if the completion changes how the prompt's end is split.
    """
    if not prompt:
        return 0
    if not tokenizer.is_fast:
        alone = tokenizer(prompt, add_special_tokens=special).input_ids
        pairs = enumerate(zip(alone, encoding.input_ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(alone), len(encoding.input_ids)))
    ends = [end for _, end in encoding.offset_mapping]
    return next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))


def _only_targets_from(batch: Batch, first: Sequence[int]) -> Batch:
    """Return the batch with its loss on the tokens from ``first`` on, of each sequence."""
    mask = batch.token_mask.numpy().copy()
    for n, start in enumerate(first):
        mask[n, : start - 1] = False  # position s predicts token s + 1
    positions = np.flatnonzero(mask)
    targets = batch.input_ids.numpy().reshape(-1)[positions + 1]
    return replace(
        batch,
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        token_mask=torch.from_numpy(mask),
    )


def _encodable(text: str | None) -> str:
    """Replace lone surrogates, which stand for bytes that are not UTF-8 in argv and in JSON."""
    return (text or "").encode("utf-8", "replace").decode()
