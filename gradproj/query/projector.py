"""Queries to rows, by the engine, model, settings and matrices of a store's job, in batches under its budget."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.batching import Batch, BatchConfig, collate, plan_batches, split_long
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import ConfigError
from gradproj.formatting import human_bytes, one_line
from gradproj.job.config import RunConfig
from gradproj.job.recorded import config_from, recorded_engine
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.query.queries import EXCERPT_CHARACTERS, Query
from gradproj.store import ProjectionStore

MOST_ROWS_BYTES = 2**32
"""Of the rows of all queries, which are held while a store is scanned."""
_PROMPT_SHARE = 0.4
"""Most of an excerpt that a prompt may take from its completion."""


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
    """One line of each, at most ``EXCERPT_CHARACTERS`` long."""


def check_rows_fit(source: str, n_queries: int, dim: int, way_out: str) -> None:
    """``ConfigError`` for more queries of ``source`` than are asked at once; ``way_out`` says what else to do."""
    n_bytes = 4 * n_queries * dim
    if n_bytes > MOST_ROWS_BYTES:
        raise ConfigError(
            f"{source} asks {n_queries:,} queries, whose rows of {dim:,} values take {human_bytes(n_bytes)} of memory; "
            f"{human_bytes(MOST_ROWS_BYTES)}, {MOST_ROWS_BYTES // (4 * dim):,} queries, is the most at once. {way_out}"
        )


@dataclass(frozen=True)
class _Tokens:
    """A query's token ids, and which of them the loss is on: those from ``first`` on."""

    ids: np.ndarray
    first: int


@dataclass
class _Sequences:
    """What runs through the model: a query, or a window of one."""

    tokens: list[np.ndarray]
    first: list[int]
    """Of each, where its targets begin; at least 1, since the first token has none before it."""
    query: list[int]


class QueryProjector:
    """Makes queries' rows as a store's job would have made them.

    Args:
        store: whose settings and matrices are taken.
        run: its job's settings; None takes them as recorded. Where the model has moved, or may run code of its own,
            ``recorded.config_from`` makes them.
        device: auto, cpu or cuda.

    Raises:
        ModelError: the model or the tokenizer is not the recorded one any more, or could run code, which nobody has
            allowed here.
    """

    def __init__(
        self, store: ProjectionStore, run: RunConfig | None = None, device: str = "auto"
    ) -> None:
        run = run or config_from(RecordedRunArgs(output=str(store.path.parent)))
        prepare_torch(run.job.threads, run.job.deterministic)
        recorded = recorded_engine(store, run, device)
        self._tokenizer, self._device, self._vocabulary = (
            recorded.tokenizer,
            recorded.device,
            recorded.vocabulary,
        )
        self._model, self._engine = recorded.model, recorded.engine
        self._special, self._batch = run.model.special_tokens, run.batch

    def rows(self, queries: Sequence[Query]) -> QueryRows:
        """The queries' rows, by the recorded special tokens, length rule and reduction.

        Of a prompt and its completion, the tokens are those of the two written one after the other, as a document would
        hold them, and the loss is on every token that holds a character of the completion: one that the tokenizer makes
        across the boundary counts. So do the special tokens that the store's rows have at the end.

        Raises:
            ConfigError: a query has no target token, more tokens than the rows cover, ids that the model does not know,
                or a gradient that is not finite; or none is given.
        """
        if not queries:
            raise ConfigError("there is no query to make a row of; give at least one")
        tokens = [self._tokens_of(query) for query in queries]
        sequences = self._split(tokens)
        rows = np.zeros((len(queries), self._engine.total_proj_dim), np.float32)
        loss = np.zeros(len(queries))
        lengths = [len(sequence) for sequence in sequences.tokens]
        # A budget that the job measured is its own device's, which need not be this one's.
        budget = self._batch.batch_tokens or BatchConfig().batch_tokens
        run = functools.partial(self._forward_backward, sequences)
        with self._engine:
            for chosen in plan_batches(lengths, self._batch.batch_size, budget):
                for part, result in run_in_halves(self._engine, chosen, run):
                    if result is None:
                        raise ConfigError(
                            f"{queries[sequences.query[part[0]]].place}: does not fit the memory "
                            f"of {self._device}; try --device cpu"
                        )
                    part_rows, part_loss = result
                    owners = [sequences.query[i] for i in part]
                    np.add.at(rows, owners, part_rows.cpu().numpy())
                    np.add.at(loss, owners, part_loss.double().cpu().numpy())
        n_tokens = np.array([len(t.ids) - t.first for t in tokens], np.int64)
        if self._batch.loss_reduction == "mean":
            rows /= n_tokens[:, None].astype(np.float32)
        for query, row in zip(queries, rows, strict=True):
            if not np.isfinite(row).all():
                raise ConfigError(
                    f"{query.place}: its gradient is not finite; nothing can be said of it"
                )
        return QueryRows(
            [q.name for q in queries],
            rows,
            n_tokens,
            loss / n_tokens,
            [self._excerpt(q) for q in queries],
        )

    # -- tokens --

    def _tokens_of(self, query: Query) -> _Tokens:
        tokens, most = self._encode(query), self._batch.max_length
        n = len(tokens.ids)
        if tokens.first >= n:
            what = "a single token" if n < 2 else f"{n:,} tokens, all of the prompt"
            raise ConfigError(
                f"{query.place}: {what}: no target to take a gradient of; give more text"
            )
        if n > most and self._batch.long_documents == "truncate":
            raise ConfigError(
                f"{query.place}: {n:,} tokens, and the store's rows cover the first {most:,} of a document; shorten it"
            )
        return tokens

    def _encode(self, query: Query) -> _Tokens:
        if query.input_ids is not None:
            largest = max(query.input_ids)
            if largest >= self._vocabulary:
                raise ConfigError(
                    f"{query.place}: token id {largest}; the model knows those from 0 to {self._vocabulary - 1:,}"
                )
            return _Tokens(np.array(query.input_ids, dtype=np.int64), 1)
        prompt = _encodable(query.prompt or "")
        whole = prompt + _encodable(query.completion if query.text is None else query.text)
        encoding = self._tokenizer(
            whole,
            add_special_tokens=self._special == "tokenizer",
            return_offsets_mapping=self._tokenizer.is_fast,
        )
        first = _boundary(encoding, prompt, self._tokenizer, self._special == "tokenizer")
        before = [self._tokenizer.bos_token_id] if "bos" in self._special else []
        after = [self._tokenizer.eos_token_id] if "eos" in self._special else []
        ids = np.array([*before, *encoding.input_ids, *after], dtype=np.int64)
        return _Tokens(ids, max(1, len(before) + first))

    def _split(self, tokens: Sequence[_Tokens]) -> _Sequences:
        found = _Sequences([], [], [])
        for number, query in enumerate(tokens):
            start = 0
            for part in split_long(query.ids, self._batch.max_length, self._batch.long_documents):
                first = max(1, query.first - start)
                if first < len(part):  # a window of nothing but prompt has no target
                    found.tokens.append(part)
                    found.first.append(first)
                    found.query.append(number)
                start += len(part) - 1
        return found

    # -- the engine --

    def _forward_backward(self, sequences: _Sequences, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        batch = collate(sequences.tokens, chosen, pad=0)
        batch = _only_targets_from(batch, [sequences.first[i] for i in chosen]).to(self._device)
        result = run_batch(self._model, self._engine, batch)
        self._engine.take_token_covariances()  # a query needs none
        return result

    # -- for people --

    def _excerpt(self, query: Query) -> str:
        if query.input_ids is not None:
            return one_line(
                self._tokenizer.decode(query.input_ids[:EXCERPT_CHARACTERS]), EXCERPT_CHARACTERS
            )
        if query.text is not None:
            return one_line(query.text, EXCERPT_CHARACTERS)
        completion = one_line(query.completion or "", EXCERPT_CHARACTERS - 4)
        room = max(
            int(_PROMPT_SHARE * EXCERPT_CHARACTERS), EXCERPT_CHARACTERS - 4 - len(completion)
        )
        prompt = one_line((query.prompt or "").rstrip()[-4 * room :], 4 * room)
        prompt = prompt if len(prompt) <= room else "..." + prompt[3 - room :]
        joined = f"{prompt} >> {completion}" if prompt else completion
        return one_line(joined, EXCERPT_CHARACTERS)


def _boundary(encoding: Any, prompt: str, tokenizer: Any, special: bool) -> int:
    """The first token that holds a character after the prompt's.

    Offsets say it. Slow tokenizers have none: there it is the first token that the prompt alone does not begin with,
    which is an earlier one only where the completion makes them split the prompt's end otherwise.
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
    """The same batch with its loss on the tokens from ``first`` on, of each sequence."""
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
    """A shell passes bytes that are no UTF-8 on as lone surrogates, and so does JSON."""
    return (text or "").encode("utf-8", "replace").decode()
