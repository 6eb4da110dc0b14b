"""An answer as a table."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from gradproj.analysis import TopDocuments
from gradproj.analysis.ranking import Ranking, overlap
from gradproj.cli.query.answer import Answer, Match
from gradproj.cli.query.groups import Grouped
from gradproj.cli.query.lines import NAME, WIDTH, labelled
from gradproj.cli.query.rescore import FirstStage
from gradproj.cli.query.subjects import Subjects
from gradproj.cli.query.tokens import token_lines
from gradproj.formatting import escaped, one_line

_COLUMN = 12
_PASSAGE = 48
"""Most characters of a shared passage."""


def table_lines(answer: Answer) -> Iterator[str]:
    """Yield the lines of the table, with control characters of texts and keys replaced."""
    rankings, queries = answer.rankings, answer.queries
    yield from summary_lines(answer)
    for ranking in rankings:
        for number in range(len(queries.names)):
            yield ""
            yield from _query_lines(queries, number, ranking.damping if len(rankings) > 1 else None)
            for name, end in (("top", ranking.top), ("bottom", ranking.bottom)):
                if end.ids.shape[1]:
                    yield from _end_lines(answer, name, end, number)
    if answer.grouped is not None:
        for number in range(len(queries.names)):
            yield ""
            yield from _query_lines(queries, number, None)
            for name, numbers in answer.grouped.ends(number).items():
                if len(numbers):
                    yield from _group_lines(answer, answer.grouped, name, numbers, number)
    if len(rankings) > 1:
        yield ""
        yield from overlap_lines(rankings)


def summary_lines(answer: Answer) -> list[str]:
    """Describe the answer: the rows, the score, and the second stage."""
    lines = answer.summary.lines(answer.dampings)
    if answer.grouped is not None:
        lines += _grouped_lines(answer.grouped)
    return lines if answer.first_stage is None else lines + _rescored_lines(answer.first_stage)


def _grouped_lines(grouped: Grouped) -> list[str]:
    scores = grouped.scores
    text = f"{(scores.n_documents > 0).sum():,} by {grouped.by}, ranked by their mean score"
    n_without = scores.n_scored - int(scores.n_documents.sum())
    text += f"; {n_without:,} documents are in none" if n_without else ""
    return labelled("groups", text).splitlines()


def _group_lines(
    answer: Answer, grouped: Grouped, name: str, numbers: np.ndarray, query: int
) -> Iterator[str]:
    scores, wide = grouped.scores, answer.summary.has_wide_range
    yield f"{name:<6}{'mean':>11}{'std. error':>12}{'documents':>11}  {one_line(grouped.by, NAME)}"
    for place, number in enumerate(numbers.tolist(), start=1):
        mean, error = scores.mean[query, number], scores.standard_error[query, number]
        line = f"{place:>5} {_value(mean, wide):>11}"
        line += f"{'-' if math.isnan(error) else format(error, '.1e'):>12}"
        line += (
            f"{scores.n_documents[number]:>11,}  {one_line(escaped(scores.names[number]), NAME)}"
        )
        yield line
        found = scores.ids[query, number] >= 0
        ids, values = scores.ids[query, number, found], scores.scores[query, number, found]
        for sample_id, value in zip(ids.tolist(), values.tolist(), strict=True):
            sample = answer.samples[sample_id]
            key = one_line(escaped(sample.key), NAME)
            yield f"      {_value(value, wide):>10}  id {sample_id}  {key}"
            if sample.text is not None:
                yield f"      {one_line(sample.text, WIDTH - 6)}"


def _width(title: str) -> int:
    return max(_COLUMN, len(title) + 2)


def _value(value: float, wide: bool) -> str:
    return f"{value:+.3e}" if wide else f"{value:+.4f}"


def _rescored_lines(first: FirstStage) -> list[str]:
    columns = "scan: place and score in the scan"
    columns += "" if first.text is None else "; text: place by shared text"
    return [*labelled("rescored", first.note).splitlines(), labelled("", columns)]


def overlap_lines(rankings: Sequence[Ranking]) -> Iterator[str]:
    """Yield a table of how far the rankings by several dampings agree."""
    names = [_damping_name(ranking.damping) for ranking in rankings]
    k = max(ranking.top.ids.shape[1] or ranking.bottom.ids.shape[1] for ranking in rankings)
    end = "top" if rankings[0].top.ids.shape[1] else "bottom"
    yield f"share of the {end} {k} in common, by damping, mean over the queries"
    yield " " * 10 + "".join(f"{name:>8}" for name in names)
    for name, fractions in zip(names, overlap(rankings), strict=True):
        yield f"{name:>10}" + "".join(f"{fraction:>8.2f}" for fraction in fractions)


def _query_lines(queries: Subjects, number: int, damping: float | str | None) -> Iterator[str]:
    n_tokens, loss = queries.n_tokens[number], queries.loss[number]
    n_queries = 1 if queries.n_queries is None else int(queries.n_queries[number])
    text = f"{one_line(queries.names[number], NAME)}: "
    text += f"{n_queries:,} queries, " if n_queries > 1 else ""
    text += f"{n_tokens:,} target tokens"
    text += "" if math.isnan(loss) else f", loss {loss:.3f} nats per token"
    text += "" if damping is None else f"; damping {_damping_name(damping)}"
    yield from labelled("query" if n_queries == 1 else "set", text).splitlines()
    if queries.excerpts[number]:
        yield from labelled("", queries.excerpts[number]).splitlines()


def _end_lines(answer: Answer, name: str, end: TopDocuments, number: int) -> Iterator[str]:
    first = answer.first_stage
    # Rescored, it is an influence, whatever the score of the scan is.
    wide = first is not None or answer.summary.has_wide_range
    titles = "" if first is None else first.header()
    titles += "".join(f"{title:>{_width(title)}}" for title in answer.columns)
    yield f"{name:<6}{'score':>11}{titles}  {'id':>9}  {'loss':>6}  {'domain':<18}  key"
    ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
    for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
        sample = answer.samples[sample_id]
        text = f"{_value(value, wide):>11}"
        text += "" if first is None else first.columns(number, sample_id)
        for title, column in answer.columns.items():
            text += f"{column[number, sample_id]:>{_width(title)}.3e}"
        domain, key = one_line(sample.domain or "-", NAME), one_line(escaped(sample.key), NAME)
        yield f"{place:>5} {text}  {sample_id:>9}  {sample.loss:>6.3f}  {domain:<18}  {key}"
        if answer.matches is not None:
            yield f"      {_shared(answer.matches[number, sample_id])}"
        if answer.tokens is not None:
            for line in token_lines(answer.tokens, number, sample_id):
                yield f"      {one_line(line, WIDTH - 6)}"
        if sample.text is not None:
            yield f"      {one_line(sample.text, WIDTH - 6)}"


def _shared(matches: Sequence[Match]) -> str:
    """Return a line of shared passages, each with the number of documents that hold it."""
    shown = [f"{one_line(m.text, _PASSAGE)!r} ({m.n_documents:,})" for m in matches]
    return one_line(f"shares {', '.join(shown) or 'nothing'}", WIDTH - 6)


def _damping_name(damping: float | str | None) -> str:
    return damping if isinstance(damping, str) else f"{damping:g}"
