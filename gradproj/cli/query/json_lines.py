"""An answer as JSON lines, with the same facts as the table."""

import json
import math
from collections.abc import Iterator

from gradproj.cli.query.answer import Answer
from gradproj.formatting import escaped


def json_lines(answer: Answer) -> Iterator[str]:
    """Yield one object per ranked document, all with the same keys.

    ``pandas.read_json(lines=True)`` reads them.
    """
    queries, first = answer.queries, answer.first_stage
    with_text = any(sample.text is not None for sample in answer.samples.values())
    for ranking in answer.rankings:
        for number, name in enumerate(queries.names):
            for end_name, end in (("top", ranking.top), ("bottom", ranking.bottom)):
                ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
                for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
                    sample = answer.samples[sample_id]
                    fields = {
                        "query": name,
                        "end": end_name,
                        "rank": place,
                        "score": _finite(value),
                        "id": sample_id,
                        "key": escaped(sample.key),
                        "domain": sample.domain,
                        "loss": _finite(sample.loss),
                        "n_tokens": sample.n_tokens,
                        "query_loss": _finite(float(queries.loss[number])),
                        "query_n_tokens": int(queries.n_tokens[number]),
                        "damping": ranking.damping,
                    }
                    if answer.summary.query_model:
                        fields["query_model"] = answer.summary.query_model
                    if first is not None:
                        fields |= first.fields(number, sample_id)
                    for title, column in answer.columns.items():
                        fields[title.replace(" ", "_")] = _finite(column[number, sample_id])
                    if answer.matches is not None:
                        fields["text_matches"] = [
                            {"text": match.text, "documents": match.n_documents}
                            for match in answer.matches[number, sample_id]
                        ]
                    if with_text:
                        fields["text"] = sample.text
                    yield json.dumps(fields, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
