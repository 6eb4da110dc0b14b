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
) -> tuple[dict[str, LeaveOut], np.ndarray]:
    """``(method -> result, (C, L) losses of the first L queries without random documents)``."""
    n, k, n_queries = len(experiment.documents), config.leave_out_k, config.leave_out
    seed = _seed_of(config)
    random = np.random.default_rng([config.seed, 4])
    controls = [
        Retraining(f"without-{k}-random-{i}", _without(n, random.permutation(n)[:k]), seed)
        for i in range(config.leave_out_controls)
    ]
    tasks = [
        Retraining(f"without-{k}-{plain(name)}-{q}", _without(n, _top(found[q], k)), seed)
        for name, found in scores.items()
        for q in range(n_queries)
    ]
    losses = losses_of(config, experiment, [*controls, *tasks], "leave-out")[:, :n_queries]
    of_controls, of_methods = losses[: len(controls)], losses[len(controls) :]
    blocks = of_methods.reshape(len(scores), n_queries, n_queries)
    results = {
        name: _result(block.diagonal(), of_controls) for name, block in zip(scores, blocks, strict=True)
    }
    return results, of_controls


def _result(own: np.ndarray, controls: np.ndarray) -> LeaveOut:
    rise = own - controls.mean(axis=0)
    above = float((own > controls.max(axis=0)).mean())
    return LeaveOut(rise.tolist(), float(rise.mean()), standard_error(rise), above)


def _seed_of(config: LdsConfig) -> int:
    # That of the model whose scores are asked: the trainings differ in the documents alone.
    return config.seed


def _top(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:k]


def _without(n: int, removed: Sequence[int] | np.ndarray) -> np.ndarray:
    kept = np.ones(n, bool)
    kept[removed] = False
    return kept


def plain(name: str) -> str:
    """A method's name as a file's."""
    return name.replace(":", "-")
