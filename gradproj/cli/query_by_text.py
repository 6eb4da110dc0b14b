"""Text scores in ``query``: alone, beside a gradient score, or as a column."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from gradproj.analysis.ranking import Ranking
from gradproj.cli.query_config import QueryConfig
from gradproj.distributed import Process
from gradproj.errors import ConfigError
from gradproj.job.recorded import config_from, recorded_tokenizer
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryRows
from gradproj.query.tokens import QueryTokenizer, QueryTokens
from gradproj.store import STATUS, ProjectionStore
from gradproj.text.index import TextIndex, make_text_index, open_text_index
from gradproj.text.scores import QueryText, TextScan
from gradproj.text.token_files import make_token_files

_QUERIES_AT_ONCE = 64


def text_scan(
    config: QueryConfig,
    store: ProjectionStore,
    process: Process,
    note: Callable[[str], None],
    index: TextIndex | None = None,
) -> TextScan:
    """Return a scan of the store's documents by text, whose index is made on first use.

    ``index``: the store's, if it was opened already.

    Raises:
        ConfigError: there is no index, and several ranks would have to make it.
    """
    index = index or open_text_index(store)
    if index is None and process.world_size > 1:
        raise ConfigError(
            f"{store.path.parent} has no text index yet: run `gradproj text {store.path.parent}` "
            "first, under torchrun to share the work"
        )
    if index is None:
        index = make_text_index(store, config, note=note)
    assert index is not None
    domains, together = config.domains_of(store), process.world_size > 1
    return TextScan(store, index, domains, together, sys.stderr.isatty())


def tokenized(config: QueryConfig, store: ProjectionStore, queries: Sequence[Query]) -> QueryRows:
    """Return queries with their tokens and without rows or losses; no model is loaded."""
    run = config_from(config, loads_weights=False)
    tokenizer, vocabulary = recorded_tokenizer(store, run)
    tokenizer = QueryTokenizer(tokenizer, vocabulary, run.model.special_tokens, run.batch)
    tokens = tuple(tokenizer.tokens_of(query) for query in queries)
    return QueryRows(
        names=[query.name for query in queries],
        rows=np.empty((len(queries), 0), np.float32),
        n_tokens=np.array([len(t.ids) - t.first for t in tokens]),
        loss=np.full(len(queries), np.nan),
        excerpts=[tokenizer.excerpt(query) for query in queries],
        tokens=tokens,
    )


def with_tokens(
    rows: QueryRows, config: QueryConfig, other: ProjectionStore, note: Callable[[str], None]
) -> QueryRows:
    """Add the tokens of a query store's documents, in the order of ``rows_of_query_store``."""
    inputs = RecordedRunArgs(
        output=str(other.path.parent), trust_remote_code=config.trust_remote_code
    )
    files = make_token_files(other, inputs, note=note)
    ids = np.flatnonzero(other.column("status") == STATUS["ok"])
    tokens = tuple(QueryTokens(tokens, first=1) for tokens in files.tokens_at(ids))
    return replace(rows, tokens=tokens)


def query_texts(queries: QueryRows) -> list[QueryText]:
    """Return the tokens whose n-grams count: all of a text, and those of a completion."""
    return [QueryText.of_targets(t.ids, t.first) for t in queries.tokens]


def text_column(
    scan: TextScan, queries: Sequence[QueryText], rankings: Sequence[Ranking]
) -> dict[tuple[int, int], float]:
    """Return the text score of each ranked document: (number of the query, sample id) -> score."""
    column: dict[tuple[int, int], float] = {}
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        span = slice(start, start + _QUERIES_AT_ONCE)
        ends = [end.ids[span] for r in rankings for end in (r.top, r.bottom)]
        ids = np.unique(np.concatenate([np.asarray(end).ravel() for end in ends]))
        scores = scan.scores_at(queries[span], ids)
        for number, values in enumerate(scores, start):
            column |= {(number, int(i)): float(x) for i, x in zip(ids, values, strict=True)}
    return column
