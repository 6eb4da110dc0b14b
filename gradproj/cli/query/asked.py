"""The queries of a question: projected rows, or their tokens alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gradproj.analysis import QuerySets
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.session import Question, Texts
from gradproj.cli.query.subjects import Subjects
from gradproj.corpus.content import Preference
from gradproj.errors import ConfigError
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.query import Query, QueryRows, check_rows_fit, read_queries
from gradproj.query.hidden import HIDDEN
from gradproj.query.projector import query_head_bytes
from gradproj.query.query_store import rows_of_query_store
from gradproj.query.tokens import QueryTokenizer
from gradproj.store import STATUS, ProjectionStore
from gradproj.text.ranking import TEXT, WITH_TEXT
from gradproj.text.scores import QueryText
from gradproj.text.token_files import make_token_files

ALL = "all queries"
"""Name of the only set."""


@dataclass(frozen=True)
class Asked:
    """The queries of a question, and the sets that they form."""

    rows: QueryRows
    """Of all queries, those of the control set last."""
    sets: QuerySets | None
    """None for single queries."""

    @property
    def texts(self) -> list[QueryText]:
        """The tokens whose n-grams count: all of a text, and those of a completion."""
        return [QueryText.of_windows(windows) for windows in self.rows.windows()]

    @cached_property
    def subjects(self) -> Subjects:
        """The subjects of the answer's lists."""
        rows, sets = self.rows, self.sets
        if sets is None:
            return Subjects(rows.names, rows.n_tokens, rows.loss, rows.excerpts)
        members = [np.flatnonzero(sets.of_query == number) for number in range(len(sets))]
        n_tokens = np.array([rows.n_tokens[chosen].sum() for chosen in members])
        nats = [(rows.loss * rows.n_tokens)[chosen].sum() for chosen in members]
        excerpts = [rows.excerpts[x[0]] if len(x) == 1 else "" for x in members]
        return Subjects(sets.names, n_tokens, np.array(nats) / n_tokens, excerpts, sets.sizes)


def read_texts(config: QueryConfig) -> Texts:
    """Read the queries that are texts; ``ConfigError`` as ``read_queries``."""
    if config.text:
        queries = [Query.of("text", text=config.text, where="--text")]
    else:
        queries = read_queries(config.queries, config.group_by)
    control = read_queries(config.contrast) if config.contrast else []
    groups, names = [q.group for q in queries], [q.name for q in queries]
    queries = [*queries, *control]
    weights = np.abs([query.weight for query in queries])
    return queries, _sets(config, groups, names, len(control), weights)


def ask(question: Question) -> Asked:
    """Read the queries, and project them unless text alone is asked for.

    Raises:
        ConfigError: a query that cannot be answered, or too many of them.
        ModelError: the model or the tokenizer differs from the store's.
    """
    config, store, session = question.config, question.store, question.session
    if config.query_store:
        with ProjectionStore(config.query_store) as other:
            rows = rows_of_query_store(other, store)
            rows = _with_tokens(rows, config, other, question.note) if config.uses_text else rows
        return Asked(rows, _sets(config, [""] * len(rows.names), rows.names, 0))
    queries, sets = question.texts or read_texts(config)
    if config.score in (TEXT, HIDDEN, *WITH_TEXT):
        _check_signs(config.score, queries)
    if config.score == TEXT:
        return Asked(_tokenized(question, queries), sets)
    given = [f"--{x} {getattr(config, x)}" for x in ("queries", "contrast") if getattr(config, x)]
    source, head_bytes = " and ".join(given), query_head_bytes(store)
    check_rows_fit(source, len(queries), store.dim, head_bytes, "Split the file into several")
    with session.model():
        return Asked(session.projector(config, store).rows(queries), sets)


def _check_signs(score: str, queries: Sequence[Query]) -> None:
    """Raise ``ConfigError`` for queries that ask for the opposite of what is alike."""
    for query in queries:
        has = "a negative weight" if query.weight < 0 else ""
        if isinstance(query.content, Preference):
            has = "a rejected answer"
        if has:
            raise ConfigError(
                f"{query.place}: it has {has}, and --score {score} counts what is alike as wanted: "
                "take a score of gradients alone, such as kfac"
            )


def _sets(
    config: QueryConfig,
    groups: list[str],
    names: list[str],
    n_control: int,
    weights: np.ndarray | None = None,
) -> QuerySets | None:
    if not config.makes_sets:
        return None
    if config.aggregate == "none":
        groups = names
    elif not config.group_by:
        groups = [ALL] * len(groups)
    return QuerySets.of_groups(groups, n_control, config.aggregate, config.unit_queries, weights)


def _tokenized(question: Question, queries: Sequence[Query]) -> QueryRows:
    """Return queries with their tokens and without rows or losses; no model is loaded."""
    config = question.config
    run = config_from(config, loads_weights=False)
    tokenizer, vocabulary = question.session.tokenizer(config, question.store)
    tokenizer = QueryTokenizer(
        tokenizer, vocabulary, run.model.special_tokens, run.rules, run.batch
    )
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
