"""An answer as JSON lines, with the same facts as the table."""

import json
import math
from collections.abc import Iterator
from typing import Any

from gradproj.cli.query.answer import Answer
from gradproj.cli.query.groups import Grouped
from gradproj.cli.query.subjects import Subjects
from gradproj.cli.query.tokens import token_fields
from gradproj.formatting import escaped
from gradproj.store.layer_view import Sample


def json_lines(answer: Answer) -> Iterator[str]:
    """Yield one object per ranked document, or group of documents, all with the same keys.

    ``pandas.read_json(lines=True)`` reads them.
    """
    if answer.grouped is not None:
        yield from _group_objects(answer, answer.grouped)
        return
    queries, first = answer.queries, answer.first_stage
    with_text = any(sample.text is not None for sample in answer.samples.values())
    for ranking in answer.rankings:
        for number in range(len(queries.names)):
            for end_name, end in (("top", ranking.top), ("bottom", ranking.bottom)):
                ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
                for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
                    sample = answer.samples[sample_id]
                    fields = hit_fields(
                        queries, number, end_name, place, value, sample, ranking.damping
                    )
                    if answer.summary.query_model:
                        fields["query_model"] = answer.summary.query_model
                    if first is not None:
                        fields |= first.fields(number, sample_id)
                    for title, column in answer.columns.items():
                        fields[title.replace(" ", "_")] = _finite(column[number, sample_id])
                    if answer.matches is not None:
                        fields["text_matches"] = [
                            {
                                "text": match.text,
                                "documents": match.n_documents,
                                "tokens": match.n_tokens,
                            }
                            for match in answer.matches[number, sample_id]
                        ]
                    if answer.tokens is not None:
                        fields |= token_fields(answer.tokens, number, sample_id)
                    if with_text:
                        fields["text"] = sample.text
                    yield json.dumps(fields, allow_nan=False)


def hit_fields(
    queries: Subjects,
    number: int,
    end: str,
    rank: int,
    score: float,
    sample: Sample,
    damping: float | str | None,
) -> dict[str, Any]:
    """Return what every object of a ranked document has; ``number`` is the query's."""
    fields = {
        "query": queries.names[number],
        "end": end,
        "rank": rank,
        "score": _finite(score),
        "id": sample.sample_id,
        "key": escaped(sample.key),
        "domain": sample.domain,
        "loss": _finite(sample.loss),
        "n_tokens": sample.n_tokens,
        "query_loss": _finite(float(queries.loss[number])),
        "query_n_tokens": int(queries.n_tokens[number]),
        "damping": damping,
    }
    if queries.n_queries is not None:
        fields["n_queries"] = int(queries.n_queries[number])
    return fields


def _group_objects(answer: Answer, grouped: Grouped) -> Iterator[str]:
    scores, queries = grouped.scores, answer.queries
    for query, name in enumerate(queries.names):
        for end, numbers in grouped.ends(query).items():
            for place, number in enumerate(numbers.tolist(), start=1):
                found = scores.ids[query, number] >= 0
                ids, values = scores.ids[query, number, found], scores.scores[query, number, found]
                fields = {
                    "query": name,
                    "end": end,
                    "rank": place,
                    "by": grouped.by,
                    "group": scores.names[number],
                    "mean": _finite(float(scores.mean[query, number])),
                    "standard_error": _finite(float(scores.standard_error[query, number])),
                    "n_documents": int(scores.n_documents[number]),
                    "damping": grouped.damping,
                    "documents": [
                        _document(answer.samples[i], value)
                        for i, value in zip(ids.tolist(), values.tolist(), strict=True)
                    ],
                }
                if queries.n_queries is not None:
                    fields["n_queries"] = int(queries.n_queries[query])
                yield json.dumps(fields, allow_nan=False)


def _document(sample: Sample, score: float) -> dict[str, Any]:
    fields = {
        "id": sample.sample_id,
        "key": escaped(sample.key),
        "domain": sample.domain,
        "score": _finite(score),
        "loss": _finite(sample.loss),
        "n_tokens": sample.n_tokens,
    }
    return fields if sample.text is None else {**fields, "text": sample.text}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
