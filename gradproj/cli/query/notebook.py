"""An answer as a notebook shows it: a table for each query, with texts shaded by token."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gradproj.analysis import TopDocuments
from gradproj.formatting import Html, escaped, html_table, html_text, one_line
from gradproj.query.token_scores import TokenScores
from gradproj.report.number_format import power
from gradproj.report.token_shading import COLOURS, Scale, Shaded, query_shading, shading_of

_TEXT = 200
_INK = "#1d2330"
"""Colour of shaded text, also on a dark page."""


def answer_html(answer: Any) -> Html:
    """Return the lists of an ``Answer``; what holds for all of them is folded."""
    lines = "<br>".join(map(html_text, answer.summary.lines(answer.dampings)))
    parts = [f"<details><summary>about the scores</summary>{lines}</details>"]
    parts += _groups(answer) if answer.grouped is not None else _lists(answer)
    return Html("".join(parts))


def _lists(answer: Any) -> Iterator[str]:
    queries = answer.queries
    for ranking in answer.rankings:
        for number, name in enumerate(queries.names):
            ends = {"highest": ranking.top, "lowest": ranking.bottom}
            values = np.concatenate([end.scores[number] for end in ends.values()]).tolist()
            scale = Scale(values)
            damping = f", damping {ranking.damping}" if len(answer.rankings) > 1 else ""
            yield f"<h4>{html_text(one_line(name, _TEXT))}{html_text(damping)}</h4>"
            yield f"<p>{_question(answer, number, ranking.top.ids[number].tolist(), scale)}</p>"
            for title, end in ends.items():
                if end.ids.shape[1]:
                    yield _documents(answer, title, end, number, scale)


def _question(answer: Any, number: int, ids: Sequence[int], scale: Scale) -> str:
    if answer.tokens is not None and answer.tokens.queries and ids:
        return _shaded(query_shading(answer.tokens, number, ids, scale))
    return html_text(answer.queries.excerpts[number])


def _documents(answer: Any, title: str, end: TopDocuments, number: int, scale: Scale) -> str:
    samples, tokens = answer.samples, answer.tokens
    first, columns = answer.first_stage, answer.columns
    unit = power(scale.exponent) if tokens is not None else ""
    text = f"text, parts in {unit}" if unit else "text"
    headings = [title, "score", *columns, "id", "domain", "loss", "key", text]
    rows = []
    ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
    for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
        sample = samples[sample_id]
        shown: str = one_line(sample.text or "", _TEXT)
        if tokens is not None and (number, sample_id) in tokens.found:
            shown = _split(tokens, number, sample_id, scale)
        others = [column[number, sample_id] for column in columns.values()]
        key = one_line(escaped(sample.key), 80)
        rows.append(
            (place, value, *others, sample_id, sample.domain or "", sample.loss, key, shown)
        )
    caption = "" if first is None else first.note
    return html_table(headings, rows, caption)


def _split(tokens: TokenScores, number: int, sample_id: int, scale: Scale) -> Html:
    """Return an excerpt by token, above a strip of the layers."""
    shading = shading_of(tokens, number, scale, sample_id)
    assert shading is not None
    cells = "".join(
        f'<span title="{cell.text}: {cell.value}" style="flex:1;background:'
        f'{COLOURS.get(cell.shade, "transparent")}"></span>'
        for cell in shading.layers
    )
    strip = f'<div style="display:flex;height:8px;border:1px solid #8a8f98">{cells}</div>'
    return Html(f"{_shaded(shading.pieces)}{strip}recomputed {shading.total}")


def _shaded(pieces: Sequence[Shaded]) -> Html:
    style = {shade: f"background:{colour};color:{_INK}" for shade, colour in COLOURS.items()}
    marks = [
        f'<span title="{x.value}" style="{style[x.shade]}">{x.text}</span>' if x.shade else x.text
        for x in pieces
    ]
    return Html(f'<bdi dir="auto">{"".join(marks)}</bdi>')


def _groups(answer: Any) -> Iterator[str]:
    grouped, scores = answer.grouped, answer.grouped.scores
    headings = (grouped.by, "mean", "standard error", "documents")
    for query, name in enumerate(answer.queries.names):
        yield f"<h4>{html_text(one_line(name, _TEXT))}</h4>"
        facts = scores.mean[query], scores.standard_error[query], scores.n_documents
        for title, numbers in grouped.ends(query).items():
            if len(numbers):
                rows = [(scores.names[n], *(x[n] for x in facts)) for n in numbers.tolist()]
                yield html_table(headings, rows, title)
