"""The queries of a question: projected rows, or their tokens alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from gradproj.cli.query.config import QueryConfig
from gradproj.job.recorded import config_from, recorded_tokenizer
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.query import Query, QueryProjector, QueryRows, check_rows_fit, read_queries
from gradproj.query.projector import query_head_bytes
from gradproj.query.query_store import rows_of_query_store
from gradproj.query.tokens import QueryTokenizer
from gradproj.store import STATUS, ProjectionStore
from gradproj.text.ranking import TEXT
from gradproj.text.scores import QueryText
from gradproj.text.token_files import make_token_files


def query_rows(
    config: QueryConfig, store: ProjectionStore, note: Callable[[str], None]
) -> QueryRows:
    """Read the queries, and project them unless text alone is asked for.

    Raises:
        ConfigError: a query that cannot be answered, or too many of them.
        ModelError: the model or the tokenizer differs from the store's.
    """
    if config.query_store:
        with ProjectionStore(config.query_store) as other:
            rows = rows_of_query_store(other, store)
            return _with_tokens(rows, config, other, note) if config.uses_text else rows
    if config.text:
        queries = [Query(name="text", text=config.text, where="--text")]
    else:
        queries = read_queries(config.queries)
    if config.score == TEXT:
        return _tokenized(config, store, queries)
    source, head_bytes = f"--queries {config.queries}", query_head_bytes(store)
    check_rows_fit(source, len(queries), store.dim, head_bytes, "Split the file into several")
    return QueryProjector(store, config_from(config), config.device, config.query_model).rows(
        queries
    )


def _tokenized(config: QueryConfig, store: ProjectionStore, queries: Sequence[Query]) -> QueryRows:
    """Return queries with their tokens and without rows or losses; no model is loaded."""
    run = config_from(config, loads_weights=False)
    tokenizer, vocabulary = recorded_tokenizer(store, run)
    tokenizer = QueryTokenizer(tokenizer, vocabulary, run.model.special_tokens, run.batch)
    sequences = tokenizer.sequences_of(queries)
    return QueryRows(
        names=[query.name for query in queries],
        rows=np.empty((len(queries), 0), np.float32),
        n_tokens=targets_by_owner(sequences, len(queries)),
        loss=np.full(len(queries), np.nan),
        excerpts=[tokenizer.excerpt(query) for query in queries],
        sequences=sequences,
    )


def _with_tokens(
    rows: QueryRows, config: QueryConfig, other: ProjectionStore, note: Callable[[str], None]
) -> QueryRows:
    """Add the tokens of a query store's documents, in the order of ``rows_of_query_store``."""
    inputs = RecordedRunArgs(
        output=str(other.path.parent), trust_remote_code=config.trust_remote_code
    )
    files = make_token_files(other, inputs, note=note)
    ids = np.flatnonzero(other.column("status") == STATUS["ok"])
    tokens = files.tokens_at(ids)
    return replace(rows, sequences=[TokenSequence.of(x, owner=n) for n, x in enumerate(tokens)])


def query_texts(queries: QueryRows) -> list[QueryText]:
    """Return the tokens whose n-grams count: all of a text, and those of a completion."""
    return [QueryText.of_windows(windows) for windows in queries.windows()]
