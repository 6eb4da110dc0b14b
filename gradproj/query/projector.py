"""Project queries with the engine, model, settings and matrices of a store's job."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.batching import (
    BatchConfig,
    collate,
    fit_padding,
    plan_batches,
)
from gradproj.engine.head_rows import QUERY_ROWS, HeadBasis, sum_windows
from gradproj.engine.own_loss import OwnLoss
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import ConfigError
from gradproj.formatting import human_bytes
from gradproj.job.config import RunConfig
from gradproj.job.recorded import config_from, recorded_engine
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.head_gradients import HeadRows
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.query.hidden import QueryStates, kind_of
from gradproj.query.own_loss import OwnLossRows
from gradproj.query.queries import Query
from gradproj.query.tokens import QueryTokenizer
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HeadQueries

MAX_ROWS_BYTES = 2**32
"""Most bytes of query rows, which stay in memory while a store is scanned."""


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
    sequences: Sequence[TokenSequence] = ()
    """Tokens of all queries, an owner being a query's place; empty if they have not been read."""
    head: HeadQueries | None = None
    """Head rows, if the store has them."""
    hidden: np.ndarray | None = None
    """``(Q, d)`` float32 hidden states, if the store has them."""
    queries: Sequence[Query] = ()
    """The queries themselves, unless they are another store's documents."""

    def windows(self) -> list[list[TokenSequence]]:
        """Return each query's sequences."""
        found: list[list[TokenSequence]] = [[] for _ in self.names]
        for sequence in self.sequences:
            found[sequence.owner].append(sequence)
        return found


def check_rows_fit(source: str, n_queries: int, dim: int, head_bytes: int, way_out: str) -> None:
    """Raise ``ConfigError`` if the rows of these queries do not fit the memory allowed for them.

    ``source`` is the flag and value that name the queries, ``head_bytes`` what the head rows of a
    query take, ``way_out`` the message's last sentence.
    """
    row_bytes = 4 * dim + head_bytes
    if n_queries * row_bytes > MAX_ROWS_BYTES:
        with_head = f" and head rows of {human_bytes(head_bytes)}" if head_bytes else ""
        raise ConfigError(
            f"{source} has {n_queries:,} queries, whose rows of {dim:,} values{with_head} take "
            f"{human_bytes(n_queries * row_bytes)} of memory; the limit is "
            f"{human_bytes(MAX_ROWS_BYTES)}, {MAX_ROWS_BYTES // row_bytes:,} queries. {way_out}"
        )


def entry_bytes(k: int) -> int:
    """Return the bytes of one head row of ``k`` values in memory: a token id and float32."""
    return 8 + 4 * k


def query_head_bytes(store: ProjectionStore) -> int:
    """Return the most bytes that the head rows of a projected query take; 0 without head rows."""
    if store.head is None:
        return 0
    segment = store.head.segment
    return min(QUERY_ROWS, segment.vocabulary) * entry_bytes(segment.k)


class QueryProjector:
    """Projects queries in the way a store's job projects documents.

    Args:
        store: source of settings and matrices.
        run: the job's settings; None for the recorded ones. Use ``recorded.config_from`` if the
            model has moved or is allowed to run its own code.
        device: auto, cpu or cuda.
        query_model: folder of another checkpoint of the same layers, shapes and token ids, or of
            a PEFT adapter, by whose gradients the queries ask; default: the job's model.

    Raises:
        ModelError: the model or the tokenizer differs from the recorded one, or could run code
            that the caller has not allowed; the ``query_model`` is not of the store's shapes.
    """

    def __init__(
        self,
        store: ProjectionStore,
        run: RunConfig | None = None,
        device: str = "auto",
        query_model: str = "",
    ) -> None:
        run = run or config_from(RecordedRunArgs(output=str(store.path.parent)))
        prepare_torch(run.job.threads, run.job.deterministic)
        self.recorded = recorded = recorded_engine(store, run, device, query_model)
        self._model, self._engine, self._device = recorded.model, recorded.engine, recorded.device
        self._batch, self._head = recorded.batch, recorded.head
        self._hidden = kind_of(store)
        self.tokenizer = QueryTokenizer(
            recorded.tokenizer, recorded.vocabulary, run.model.special_tokens, run.rules,
            recorded.batch,
        )  # fmt: skip

    def rows(self, queries: Sequence[Query]) -> QueryRows:
        """Project queries by the recorded special tokens, length rule and loss reduction.

        A prompt and its completion are tokenized as one text, as a document would hold them. The
        loss is on every token with a character of the completion, including one that spans the
        boundary, and on the special tokens that the store's documents end with.

        Raises:
            ConfigError: no query; or one without a target token, with more tokens than a row
                covers, with unknown token ids, or with a gradient that is zero or not finite.
        """
        if not queries:
            raise ConfigError("there is no query to project; give at least one")
        sequences = self.tokenizer.sequences_of(queries)
        rows = np.zeros((len(queries), self._engine.total_proj_dim), np.float32)
        loss = np.zeros(len(queries))
        head = _HeadWindows(self._head, len(queries))
        hidden = QueryStates(self._hidden, self._model, sequences, len(queries))
        lengths = list(map(len, sequences))
        # 0 means that the job measured its own device; this device may be another.
        budget = self._batch.batch_tokens or BatchConfig().batch_tokens
        run = functools.partial(self._forward_backward, sequences, head, hidden)
        padding = self._batch.max_padding
        if len(set(lengths)) > 1:
            padding = fit_padding(self._model, self._batch, max(lengths)).max_padding
        with self._engine:
            sizes = self._batch.batch_size, budget, padding
            for chosen in plan_batches(lengths, *sizes):
                for part, result in run_in_halves(self._engine, chosen, run):
                    if result is None:
                        raise ConfigError(
                            f"{queries[sequences[part[0]].owner].place}: does not fit the memory "
                            f"of {self._device}; try --device cpu"
                        )
                    part_rows, part_loss = result
                    owners = [sequences[i].owner for i in part]
                    np.add.at(rows, owners, part_rows.cpu().numpy())
                    np.add.at(loss, owners, part_loss.double().cpu().numpy())
        n_tokens = targets_by_owner(sequences, len(queries))
        if self._batch.loss_reduction == "mean":
            rows /= n_tokens[:, None].astype(np.float32)
        for query, row in zip(queries, rows, strict=True):
            problem = "not finite" if not np.isfinite(row).all() else "" if row.any() else "zero"
            if problem:
                raise ConfigError(
                    f"{query.place}: its gradient is {problem}, which ranks no document; leave the "
                    "query out"
                )
        names, excerpts = [q.name for q in queries], [self.tokenizer.excerpt(q) for q in queries]
        divisor = n_tokens if self._batch.loss_reduction == "mean" else np.ones_like(n_tokens)
        made = names, rows, n_tokens, loss / n_tokens, excerpts, sequences
        return QueryRows(*made, head.queries(divisor), hidden.finished(), queries)

    def rows_of(self, loss: OwnLoss, queries: Sequence[Query]) -> QueryRows:
        """Project the gradients of any scalar that the model computes of each query.

        A probe on a hidden state, a log-odds, a divergence from another model. The rows are those
        of the loss as it is (not divided by tokens), and ``QueryRows.loss`` its values. Head rows
        are none. A row is linear in the loss, so that rows of several can be combined.

        Args:
            loss: ``loss(model, inputs) -> (B,)``, each sample's own number, to be minimised by
                training on a document of positive score. ``inputs`` are ``input_ids``,
                ``attention_mask`` (0 at padding, on the right) and ``labels`` (not shifted, -100
                where a token is no target of the query), ``(B, S)`` int64. It runs the model once,
                by any of its calls; layers that it does not reach have zeros.
            queries: each of one sequence, at most as long as a row covers.

        Raises:
            ConfigError: as for ``rows``; a query of several sequences; or a loss that is not one
                differentiable number for each sample by itself.
        """
        if not queries:
            raise ConfigError("there is no query to project; give at least one")
        sequences = self.tokenizer.sequences_of(queries)
        counts = np.bincount([sequence.owner for sequence in sequences], minlength=len(queries))
        for query, count in zip(queries, counts.tolist(), strict=True):
            if count != 1:
                raise ConfigError(
                    f"{query.place}: it takes {count} sequences, and a loss of one's own is of "
                    f"one, of at most {self._batch.max_length:,} tokens"
                )
        places = [query.place for query in queries]
        with self._engine:
            made = OwnLossRows(self._model, self._engine, loss, sequences, places)
            rows, values = made.compute(self._batch)
        names, excerpts = [q.name for q in queries], [self.tokenizer.excerpt(q) for q in queries]
        n_tokens = np.array(list(map(len, sequences)), np.int64)
        return QueryRows(names, rows, n_tokens, values, excerpts, sequences)

    def _forward_backward(
        self,
        sequences: list[TokenSequence],
        head: "_HeadWindows",
        hidden: QueryStates,
        chosen: np.ndarray,
    ) -> tuple[Tensor, Tensor]:
        batch = collate(sequences, chosen).to(self._device)
        sink = head.sink()
        with hidden.watching(batch) as states:
            result = run_batch(self._model, self._engine, batch, head=sink)
        self._engine.take_token_covariances()  # a query needs none
        if sink is not None:
            head.add([sequences[i].owner for i in chosen], sink)
        hidden.add(chosen, states)
        return result


class _HeadWindows:
    """The head rows of queries while their windows run; none without a basis."""

    def __init__(self, basis: HeadBasis | None, n_queries: int) -> None:
        self._basis = basis
        self._windows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n_queries)]

    def sink(self) -> HeadRows | None:
        basis = self._basis
        return None if basis is None else HeadRows(basis.matrix, basis.scale, QUERY_ROWS)

    def add(self, owners: Sequence[int], sink: HeadRows) -> None:
        for owner, ids, values in zip(owners, *(x.cpu() for x in sink.largest()), strict=True):
            self._windows[owner].append((ids, values))

    def queries(self, divisor: np.ndarray) -> HeadQueries | None:
        """Return the sums over each query's windows, divided by ``divisor`` ``(Q,)``."""
        if self._basis is None:
            return None
        sums = []
        for windows in self._windows:
            ids, values = (torch.stack(x) for x in zip(*windows, strict=True))
            sums.append(sum_windows(ids, values, QUERY_ROWS))
        n_rows = max(ids.shape[1] for ids, _ in sums)
        shape = len(sums), n_rows, len(self._basis.matrix)
        all_ids, all_values = np.zeros(shape[:2], np.int64), np.zeros(shape, np.float32)
        for query, (ids, values) in enumerate(sums):
            all_ids[query, : ids.shape[1]] = ids
            all_values[query, : ids.shape[1]] = values / float(divisor[query])
        return HeadQueries(all_ids, all_values)
