"""Results of an experiment, from scores and losses."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.checks import distinct_top, rank_agreement
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment
from gradproj.evaluation.leave_out import LeaveOut
from gradproj.evaluation.retrieval import Retrieval, near_copies, retrieval
from gradproj.evaluation.statistics import Bootstrap, Estimate, noise_ceiling, permutation_baseline

RECALL_AT = (1, 10)


@dataclass(frozen=True)
class MethodResult:
    """Results of one method."""

    lds: Estimate
    by_query: list[float]
    over_reference: Estimate | None
    """LDS less the reference method's, paired by query and by bootstrap sample."""
    row_bytes: int | None
    """Bytes of a document's rows that the method reads; None for one without rows."""
    distinct_top: float
    """See ``checks.distinct_top``."""
    duplicates: Retrieval | None
    leave_out: LeaveOut | None


@dataclass(frozen=True)
class Results:
    """Results of an experiment."""

    methods: dict[str, MethodResult]
    """Highest LDS first."""
    reference: str
    ceiling: float
    """NaN with one seed."""
    chance: tuple[float, float]
    """Mean and standard deviation of the reference's LDS with shuffled documents."""
    randomized: float | None
    """Rank agreement of the reference's scores with those of a model with random weights."""
    n_documents: int
    n_queries: int
    n_subsets: int
    subset_size: int
    n_seeds: int
    mean_loss: float
    """Mean loss of the queries over all trainings, nats per token."""
    loss_spread: float
    """Standard deviation of a query's loss over the subsets, mean over the queries."""
    training_seeds: list[int]


def reference_of(config: LdsConfig, names: Iterable[str]) -> str:
    """Return the method that others are compared with: the first if ``--reference`` is not one."""
    names = list(names)
    return config.reference if config.reference in names else names[0]


def evaluate_methods(
    config: LdsConfig,
    experiment: Experiment,
    scores: dict[str, np.ndarray],
    subsets: np.ndarray,
    losses: np.ndarray,
    left: dict[str, LeaveOut],
    row_bytes: dict[str, int | None],
    randomized: np.ndarray | None,
) -> Results:
    """Compute the results of every method.

    ``scores`` are method -> ``(Q + C, N)``; the C queries with near-copies are last. ``subsets``
    are ``(M, N)`` bool, ``losses`` ``(M, S, Q + C)``, ``left`` the leave-out results by method.
    ``randomized`` are the reference's scores under random weights.
    """
    n = experiment.n_held_out
    reference = reference_of(config, scores)
    losses = losses[:, :, :n]
    bootstrap = Bootstrap(subsets, losses, config.bootstrap, config.seed)
    estimates = {name: bootstrap.by_query(values[:n]) for name, values in scores.items()}
    copies = np.zeros((0, len(experiment.documents)), bool)
    if len(experiment.copies):
        copies = near_copies(experiment.documents, experiment.queries[n:], experiment.copies)
    methods = {}
    for name, (by_query, of_samples) in estimates.items():
        over = None
        if name != reference:
            base = estimates[reference]
            over = Bootstrap.estimate(by_query - base[0], of_samples - base[1])
        copies_found = retrieval(scores[name][n:], copies, RECALL_AT) if len(copies) else None
        lds = Bootstrap.estimate(by_query, of_samples)
        methods[name] = MethodResult(
            lds, by_query.tolist(), over, row_bytes[name], distinct_top(scores[name][:n]),
            copies_found, left.get(name),
        )  # fmt: skip
    ordered = dict(sorted(methods.items(), key=lambda item: -item[1].lds.mean))
    chance = permutation_baseline(
        scores[reference][:n], subsets, losses, config.permutations, config.seed
    )
    agreement = None
    if randomized is not None:
        agreement = rank_agreement(scores[reference][:n], randomized[:n])
    return Results(
        ordered, reference, noise_ceiling(losses), chance, agreement,
        len(experiment.documents), n, len(subsets), int(subsets[0].sum()), losses.shape[1],
        float(losses.mean()), float(losses.mean(axis=1).std(axis=0, ddof=1).mean()),
        [config.seed + 1 + seed for seed in range(config.seeds)],
    )  # fmt: skip
