"""Leave-out: retrain without a method's top documents and measure the rise of the query's loss."""

from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment
from gradproj.evaluation.retraining import Retraining, losses_of
from gradproj.evaluation.statistics import standard_error


@dataclass(frozen=True)
class LeaveOut:
    """Effect of removing a method's top documents."""

    by_query: list[float]
    """Loss of each query (nats per token) less its mean over the random controls."""
    mean: float
    standard_error: float
    """Over the queries."""
    share_above_controls: float
    """Fraction of queries whose loss is above that of every control."""


def leave_out(
    config: LdsConfig, experiment: Experiment, scores: dict[str, np.ndarray]
) -> dict[str, LeaveOut]:
    """Return every method's result for the first ``config.leave_out`` queries.

    The queries of a group share a training without the top documents of all of them. ``scores`` is
    method -> ``(Q, N)``.
    """
    n, size = len(experiment.documents), config.leave_out_group
    removed = config.leave_out_k * size
    groups = [list(range(first, first + size)) for first in range(0, config.leave_out, size)]
    random = np.random.default_rng([config.seed, 4])

    # The seed is the scored model's, so that trainings differ in their documents only.
    def without(name: str, documents: np.ndarray) -> Retraining:
        chosen = np.ones(n, bool)
        chosen[documents] = False
        return Retraining(f"without-{removed}-{name}", chosen, config.seed)

    controls = [
        without(f"random-{i}", random.permutation(n)[:removed])
        for i in range(config.leave_out_controls)
    ]
    tasks = [
        without(
            f"{file_name(name)}-for-{group[0]}-to-{group[-1]}", best_of_all(rows[group], removed)
        )
        for name, rows in scores.items()
        for group in groups
    ]
    losses = losses_of(config, experiment, [*controls, *tasks], "leave-out")[:, : config.leave_out]
    control_losses, method_losses = losses[: len(controls)], losses[len(controls) :]
    by_group = method_losses.reshape(len(scores), len(groups), -1)
    results = {}
    for name, rows in zip(scores, by_group, strict=True):
        of_queries = np.concatenate([row[group] for row, group in zip(rows, groups, strict=True)])
        results[name] = _result(of_queries, control_losses)
    return results


def _result(losses: np.ndarray, controls: np.ndarray) -> LeaveOut:
    rise = losses - controls.mean(axis=0)
    above = float((losses > controls.max(axis=0)).mean())
    return LeaveOut(rise.tolist(), float(rise.mean()), standard_error(rise), above)


def best_of_all(scores: np.ndarray, n: int) -> np.ndarray:
    """Return ``n`` distinct documents: each query's best, then each query's second, and so on."""
    in_turn = np.argsort(-scores, axis=1, kind="stable").T.ravel()
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)[:n]]


def file_name(name: str) -> str:
    """Return a method's name as part of a file name."""
    return name.replace(":", "-").replace("/", "_")
