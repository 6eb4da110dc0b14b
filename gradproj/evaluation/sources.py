"""Do the best documents contain what a query asks for: precision and recall of known sources."""

from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.statistics import standard_error

RECALL_AT = 10


@dataclass(frozen=True)
class Mean:
    """A mean over queries with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Mean":
        return cls(float(values.mean()), standard_error(values))


@dataclass(frozen=True)
class SourcesFound:
    """Measures of one method's scores: do they find the queries' sources."""

    average_precision: Mean
    """Area under the curve of precision against recall."""
    over_reference: Mean | None
    """Average precision less the reference method's, paired by query."""
    reciprocal_rank: Mean
    """1 / rank of the first source."""
    recall: Mean
    """Fraction of the sources among the ``RECALL_AT`` best documents."""
    by_query: list[float]
    """Average precision."""
    row_bytes: int | None
    """Bytes of a document's rows that the method reads; None for one without rows."""


@dataclass(frozen=True)
class SourceResults:
    """Results of an experiment with planted sources."""

    methods: dict[str, SourcesFound]
    """Highest average precision first."""
    reference: str
    experiment: str
    n_documents: int
    n_queries: int
    n_sources: int
    """Documents that a query asks for, mean over the queries."""
    loss_before: float | None
    """Mean loss of the queries' targets, nats per token, under the model before it saw a source;
    None without ``--pretrain``."""
    loss_after: float
    """Mean loss under the scored model, which was trained on the sources."""


def evaluate_sources(
    experiment: str,
    sources: np.ndarray,
    scores: dict[str, np.ndarray],
    row_bytes: dict[str, int | None],
    reference: str,
    losses: tuple[float | None, float],
) -> SourceResults:
    """Compute the results of every method.

    ``sources`` are ``(Q, N)`` bool, ``scores`` method -> ``(Q, N)``, ``losses`` the mean losses of
    the queries before and after the training on the documents.
    """
    base = average_precision(scores[reference], sources)
    methods = {}
    for name, values in scores.items():
        precision, ranks = average_precision(values, sources), ranks_of(values, sources)
        first = np.array([row[0] for row in ranks])
        recall = np.array([(row <= RECALL_AT).mean() for row in ranks])
        over = None if name == reference else Mean.of(precision - base)
        methods[name] = SourcesFound(
            Mean.of(precision), over, Mean.of(1 / first), Mean.of(recall), precision.tolist(),
            row_bytes[name],
        )  # fmt: skip
    ordered = dict(sorted(methods.items(), key=lambda item: -item[1].average_precision.mean))
    (n_queries, n_documents), n_sources = sources.shape, round(float(sources.sum(axis=1).mean()))
    return SourceResults(ordered, reference, experiment, n_documents, n_queries, n_sources, *losses)


def ranks_of(scores: np.ndarray, sources: np.ndarray) -> list[np.ndarray]:
    """Return the ranks of each query's sources, from 1, in ascending order.

    Among equal scores sources rank last, so that a constant score finds nothing.
    """
    found = []
    for row, wanted in zip(scores, sources, strict=True):
        order = np.lexsort((wanted, -row))
        found.append(1 + np.flatnonzero(wanted[order]))
    return found


def average_precision(scores: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Return each query's mean, over its sources, of the precision at the source's rank, ``(Q,)``.

    This is the area under the curve of precision against recall (AUPRC), as steps.
    """
    return np.array(
        [(np.arange(1, len(ranks) + 1) / ranks).mean() for ranks in ranks_of(scores, sources)]
    )
