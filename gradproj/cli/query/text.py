"""Text scores in ``query``: the scan, and a column of them."""

import sys
from collections.abc import Sequence

import numpy as np

from gradproj.analysis.ranking import Ranking
from gradproj.cli.query.answer import Match, Matches
from gradproj.cli.query.session import Question
from gradproj.errors import ConfigError
from gradproj.text.index import TextIndex, make_text_index, open_text_index
from gradproj.text.matches import passages_of
from gradproj.text.scores import QueryText, TextScan

_QUERIES_AT_ONCE = 64


def text_scan(question: Question, index: TextIndex | None = None) -> TextScan:
    """Return a scan of the store's documents by text, whose index is made on first use.

    ``index``: the store's, if it was opened already.

    Raises:
        ConfigError: there is no index, and several ranks would have to make it.
    """
    config, store, together = question.config, question.store, question.together
    index = index or open_text_index(store)
    if index is None and together:
        raise ConfigError(
            f"{store.path.parent} has no text index yet: run `gradproj text {store.path.parent}` "
            "first, under torchrun to share the work"
        )
    if index is None:
        index = make_text_index(store, config, note=question.note)
    assert index is not None
    return TextScan(store, index, config.domains_of(store), together, sys.stderr.isatty())


def text_matches(
    question: Question,
    scan: TextScan,
    queries: Sequence[QueryText],
    rankings: Sequence[Ranking],
) -> Matches:
    """Return the passages that each ranked document shares with the query."""
    tokenizer, _ = question.session.tokenizer(question.config, question.store)
    matches: Matches = {}
    for number, query in enumerate(queries):
        ends = [end.ids[number] for r in rankings for end in (r.top, r.bottom)]
        found = passages_of(scan.index, query, np.concatenate(ends))
        for sample_id, passages in found.items():
            matches[number, sample_id] = [
                Match(tokenizer.decode(passage.tokens), passage.n_documents, len(passage.tokens))
                for passage in passages
            ]
    return matches


def text_column(
    scan: TextScan, queries: Sequence[QueryText], rankings: Sequence[Ranking]
) -> dict[tuple[int, int], float]:
    """Return the text score of each ranked document: (number of the list, sample id) -> score."""
    column: dict[tuple[int, int], float] = {}
    step = _QUERIES_AT_ONCE if scan.sets is None else len(queries)
    for start in range(0, len(queries), step):
        span = slice(start, start + step)
        ends = [end.ids[span] for r in rankings for end in (r.top, r.bottom)]
        ids = np.unique(np.concatenate([np.asarray(end).ravel() for end in ends]))
        scores = scan.scores_at(queries[span], ids)
        for number, values in enumerate(scores, start):
            column |= {(number, int(i)): float(x) for i, x in zip(ids, values, strict=True)}
    return column
