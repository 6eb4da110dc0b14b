"""Results of an experiment, from scores and losses."""

from dataclasses import dataclass

import numpy as np

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
    n_documents: int
    n_queries: int
    n_subsets: int
    n_seeds: int
    mean_loss: float
    """Mean loss of the queries over all trainings, nats per token."""
    loss_spread: float
    """Standard deviation of a query's loss over the subsets, mean over the queries."""
    training_seeds: list[int]


def evaluate_methods(
    config: LdsConfig,
    experiment: Experiment,
    scores: dict[str, np.ndarray],
    subsets: np.ndarray,
    losses: np.ndarray,
    left: dict[str, LeaveOut],
) -> Results:
    """Compute the results of every method.

    ``scores`` are method -> ``(Q + C, N)``; the C queries with near-copies are last. ``subsets``
    are ``(M, N)`` bool, ``losses`` ``(M, S, Q + C)``, ``left`` the leave-out results by method.
    """
    n = experiment.n_held_out
    reference = config.reference if config.reference in scores else next(iter(scores))
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
        methods[name] = MethodResult(lds, by_query.tolist(), over, copies_found, left.get(name))
    ordered = dict(sorted(methods.items(), key=lambda item: -item[1].lds.mean))
    chance = permutation_baseline(
        scores[reference][:n], subsets, losses, config.permutations, config.seed
    )
    return Results(
        ordered, reference, noise_ceiling(losses), chance,
        len(experiment.documents), n, len(subsets), losses.shape[1],
        float(losses.mean()), float(losses.mean(axis=1).std(axis=0, ddof=1).mean()),
        [config.seed + 1 + seed for seed in range(config.seeds)],
    )  # fmt: skip
