"""A store's domains, distributions and outliers as plain data, for pages that draw themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, overview
from gradproj.analysis.scan import ScanOptions
from gradproj.formatting import one_line
from gradproj.report.distributions import Histogram, count_rows
from gradproj.report.document_tables import TextExcerpts, outlier_tables
from gradproj.report.domain_charts import (
    DOMAIN_COLUMNS,
    MAX_CHARTED_DOMAINS,
    Group,
    domain_lines,
    spread_of,
    why_no_matrix,
)
from gradproj.report.domain_summary import (
    DomainFacts,
    check_any_row_is_readable,
    facts_from_matrix,
    lost_text,
)
from gradproj.report.figures import QUANTILES, value_range
from gradproj.report.number_format import json_numbers
from gradproj.report.run_summary import statuses_of
from gradproj.store import ProjectionStore

N_BARS = 60
_AXES = {"loss": ("loss, nats per target token", False), "grad_norm": ("norm of the row", True)}
"""Column -> its label, and whether its axis is logarithmic."""


def overview_data(
    store: ProjectionStore, options: ScanOptions, excerpts: TextExcerpts, k: int
) -> dict[str, Any]:
    """Scan a store once, and its columns twice; return what the page of ``report`` shows of it.

    ``options`` are arguments of the scan, ``k`` the documents in a table. All words are as in the
    store: the page that shows them escapes them. Raises as ``overview`` does.
    """
    counts = count_rows(store)
    seen = overview(store, k, **options)
    check_any_row_is_readable(seen.n_read, counts, store)
    matrix = seen.domains
    facts = None if matrix is None else facts_from_matrix(store, matrix, options, counts)
    spread, groups = spread_of(store, counts, k)
    outliers = outlier_tables(store, seen, spread, options["score"], excerpts)
    return {
        "statuses": [list(line) for line in statuses_of(counts)],
        "damage": lost_text(counts.total("ok") - seen.n_read, str(store.path.parent)),
        "score": options["score"],
        "meaning": MEANINGS[options["score"]],
        "domains": {"columns": DOMAIN_COLUMNS, "lines": domain_lines(facts, groups)},
        "matrices": _matrices(facts),
        "no_matrix": why_no_matrix(facts),
        "histograms": [_histogram(name, groups) for name in _AXES] if groups else [],
        "quantiles": list(QUANTILES),
        "groups": [_quantiles(group) for group in groups],
        "outliers": [
            {
                "title": table.title,
                "about": table.about,
                "column": table.column,
                "documents": [
                    {"value": x.value, "id": x.sample_id, "key": x.key, "domain": x.domain}
                    | {"loss": x.loss, "n_tokens": x.n_tokens, "excerpt": x.excerpt}
                    for x in table.documents
                ],
            }
            for table in outliers
        ],
        "texts_note": excerpts.problem,
    }


def _matrices(facts: DomainFacts | None) -> list[dict[str, Any]]:
    if facts is None or len(facts.shown) < 2:
        return []
    shown = facts.largest(MAX_CHARTED_DOMAINS)
    names = [one_line(facts.matrix.names[i], 60) for i in shown]
    return [
        {"title": title, "names": names, "values": json_numbers(values[np.ix_(shown, shown)])}
        for title, values in (
            ("Cosine of the mean gradients", facts.matrix.cosine),
            (f"Influence between domains ({facts.score})", facts.matrix.influence),
        )
    ]


def _histogram(name: str, groups: Sequence[Group]) -> dict[str, Any]:
    """Return bars of all documents' values, between their 0.1 % quantiles."""
    label, log = _AXES[name]
    whole = Histogram(np.sum([getattr(group, name).counts for group in groups], axis=0))
    low, high = value_range(whole.quantile(0.001), whole.quantile(0.999), log)
    edges = np.geomspace(low, high, N_BARS + 1) if log else np.linspace(low, high, N_BARS + 1)
    counts = whole.between(edges)
    return {"label": label, "log": log, "edges": edges.tolist(), "counts": counts.tolist()}


def _quantiles(group: Group) -> dict[str, Any]:
    values = {
        name: json_numbers([getattr(group, name).quantile(q) for q in QUANTILES]) for name in _AXES
    }
    return {"name": one_line(group.label, 60), "documents": group.loss.n, **values}
