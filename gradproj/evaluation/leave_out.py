"""Leave-out: train without the documents that a method puts first for a query, and see what the query's loss does."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment
from gradproj.evaluation.retraining import Retraining, losses_of
from gradproj.evaluation.statistics import standard_error


@dataclass(frozen=True)
class LeaveOut:
    """What removing a method's top documents does."""

    by_query: list[float]
    """Nats per token that each query's loss is above its mean without as many random documents."""
    mean: float
    standard_error: float
    """Over the queries."""
    share_above_controls: float
    """Of the queries, how many have a higher loss than without any of the random sets."""


def leave_out(
    config: LdsConfig, experiment: Experiment, scores: dict[str, np.ndarray]
) -> dict[str, LeaveOut]:
    """Every method's result for the first ``config.leave_out`` queries; ``scores`` are ``(Q, N)``.

    The queries of a group share a training, which is without the best documents of all of them.
    """
    n, size = len(experiment.documents), config.leave_out_group
    removed = config.leave_out_k * size
    groups = [list(range(first, first + size)) for first in range(0, config.leave_out, size)]
    random = np.random.default_rng([config.seed, 4])
    # The seed is that of the model whose scores are asked: the trainings differ in the documents alone.
    controls = [
        Retraining(
            f"without-{removed}-random-{i}",
            _without(n, random.permutation(n)[:removed]),
            config.seed,
        )
        for i in range(config.leave_out_controls)
    ]
    tasks = [
        Retraining(
            f"without-{removed}-{file_name(name)}-for-{group[0]}-to-{group[-1]}",
            _without(n, best_of_all(found[group], removed)),
            config.seed,
        )
        for name, found in scores.items()
        for group in groups
    ]
    losses = losses_of(config, experiment, [*controls, *tasks], "leave-out")[:, : config.leave_out]
    of_controls, of_methods = losses[: len(controls)], losses[len(controls) :]
    results = {}
    for name, own in zip(scores, of_methods.reshape(len(scores), len(groups), -1), strict=True):
        of_its_group = np.concatenate([row[group] for row, group in zip(own, groups, strict=True)])
        results[name] = _result(of_its_group, of_controls)
    return results


def _result(own: np.ndarray, controls: np.ndarray) -> LeaveOut:
    rise = own - controls.mean(axis=0)
    above = float((own > controls.max(axis=0)).mean())
    return LeaveOut(rise.tolist(), float(rise.mean()), standard_error(rise), above)


def best_of_all(scores: np.ndarray, n: int) -> np.ndarray:
    """``n`` documents, taken in turn: each query's best, each one's second, and so on; none twice.

    Args:
        scores: ``(Q, N)``.
        n: at most N.
    """
    in_turn = np.argsort(-scores, axis=1, kind="stable").T.ravel()
    _, first = np.unique(in_turn, return_index=True)
    return in_turn[np.sort(first)[:n]]


def _without(n: int, removed: Sequence[int] | np.ndarray) -> np.ndarray:
    kept = np.ones(n, bool)
    kept[removed] = False
    return kept


def file_name(name: str) -> str:
    """A method's name in a file's."""
    return name.replace(":", "-")
