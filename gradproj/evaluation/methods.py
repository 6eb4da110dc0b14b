"""Computes ``(Q, N)`` scores of a method by its name, cached in files."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradproj.distributed import World
from gradproj.errors import ConfigError, StoreError
from gradproj.evaluation.baselines import bm25, hidden_cosine, ngram_overlap, text_kernel
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, unpadded
from gradproj.evaluation.gradproj_methods import GradientStores
from gradproj.evaluation.kronfluence import STRATEGIES, kronfluence_scores
from gradproj.evaluation.leave_out import file_name
from gradproj.evaluation.method_names import FORM, GradientMethod, RowKind
from gradproj.flags import split_list
from gradproj.storage.results import load_array, save_array
from gradproj.text.z_scores import sums_of_z_scores

EXACT = {"exact_kfac": "kfac", "exact_ekfac": "ekfac"}
"""Method -> curvature of whole gradients (``gradproj.curvature``)."""
OTHERS = (
    "random", "loss", "grad_norm", "hidden", "bm25", "ngram", "text", "text_prompt", *EXACT,
    *STRATEGIES,
)  # fmt: skip
"""Methods that are not gradproj's own."""
JOINED = "+"
"""Joins two methods whose scores are added."""
OPTIONAL = {"bm25": "bm25s"} | dict.fromkeys(STRATEGIES, "kronfluence")
"""Method -> the library that it needs, of the extra ``evaluation``."""


def names_of(listed: str, flag: str) -> list[str]:
    """Parse a comma-separated list of methods."""
    names = list(split_list(listed))
    if not names:
        raise ConfigError(f"{flag} is empty; name at least one method")
    for name in names:
        if name.count(JOINED) > 1:
            raise ConfigError(f"{flag}: {name} adds more than two methods")
        for part in name.split(JOINED):
            if part not in OTHERS and GradientMethod.of(part) is None:
                raise ConfigError(
                    f"{flag}: unknown method {part!r}; choose from {', '.join(OTHERS)}, and {FORM} "
                    f"such as kfac@64/signs or dot@full; A{JOINED}B adds two"
                )
        if names.count(name) > 1:
            raise ConfigError(f"{flag} names {name} twice")
    return names


class Methods:
    """Scores of the methods of one experiment."""

    def __init__(self, config: LdsConfig, experiment: Experiment, model: Path) -> None:
        self._config, self._experiment, self._model = config, experiment, model
        self._folder = Path(config.output_dir) / "scores"
        self._stores = GradientStores(config, experiment, model)

    def randomized_scores(self, name: str) -> np.ndarray | None:
        """Return a method's scores with random weights in the model; None if it has no rows."""
        method = GradientMethod.of(name)
        if method is None:
            return None
        path = self._folder / f"{file_name(name)}-randomized.npy"
        if not path.is_file():
            stores = GradientStores(self._config, self._experiment, self._model, randomized=True)
            save_array(path, stores.scores(method).astype(np.float32))
        return load_array(path)

    def scores(self, name: str) -> np.ndarray:
        """Return ``(Q, N)`` float32, from an earlier call's file if there is one."""
        path = self._folder / f"{file_name(name)}.npy"
        if not path.is_file():
            self._folder.mkdir(exist_ok=True)
            scores = self._compute(name).astype(np.float32)
            if not np.isfinite(scores).all():
                raise StoreError(f"method {name} returned scores that are not finite")
            save_array(path, scores)
        return load_array(path)

    def row_bytes(self, name: str) -> int | None:
        """Return the bytes of a document that a method reads; None if it reads no rows."""
        methods = [method for part in name.split(JOINED) if (method := GradientMethod.of(part))]
        read = {method.rows: method for method in methods}  # both may read the same rows
        return sum(map(self._stores.row_bytes, read.values())) if read else None

    def _compute(self, name: str) -> np.ndarray:
        if JOINED in name:
            return sum_of_z_scores(*(self.scores(part) for part in name.split(JOINED)))
        config, experiment = self._config, self._experiment
        documents, queries = experiment.documents, experiment.queries
        shape, small = (len(queries), len(documents)), RowKind("16")
        # A document's own loss and norm are the same for every query.
        makers: dict[str, Callable[[], np.ndarray]] = {
            "random": lambda: np.random.default_rng([config.seed, 2]).standard_normal(shape),
            "loss": lambda: np.broadcast_to(self._stores.column("loss", small), shape),
            "grad_norm": lambda: np.broadcast_to(self._stores.column("grad_norm", small), shape),
            "hidden": lambda: hidden_cosine(self._model, documents, queries, config.device),
            "bm25": lambda: bm25(documents, queries),
            "ngram": lambda: ngram_overlap(documents, queries),
            "text": lambda: text_kernel(unpadded(documents), unpadded(queries), experiment.first),
            "text_prompt": lambda: text_kernel(unpadded(documents), unpadded(queries)),
        }
        if name in makers:
            return makers[name]()
        if name in STRATEGIES:
            work = Path(config.output_dir) / "kronfluence"
            labels = experiment.query_labels
            return kronfluence_scores(name, self._model, documents, queries, labels, work)
        if name in EXACT:
            return self._stores.exact(EXACT[name])
        method = GradientMethod.of(name)
        assert method is not None
        scores = self._stores.scores(method)
        if not method.rescored:
            return scores
        return rescored(scores, self.scores("exact_ekfac"), method.rescored)


def rescored(scores: np.ndarray, exact: np.ndarray, n: int) -> np.ndarray:
    """Return scores ``(Q, N)`` with the exact ones of each query's ``n`` best documents.

    The others are brought to the exact ones' unit by the factor that fits the n best by least
    squares, as a second stage would have it.
    """
    result = scores.astype(np.float64)
    for row, whole in zip(result, exact, strict=True):
        best = np.argsort(-row, kind="stable")[:n]
        length = row[best] @ row[best]
        row *= row[best] @ whole[best] / length if length > 0 else 1.0
        row[best] = whole[best]
    return result


def sum_of_z_scores(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the score ``A+B`` of ``gradproj query`` of two ``(Q, N)`` scores."""
    blocks = sums_of_z_scores(iter([(0, one)]), iter([(0, other)]), World(), io.BytesIO())
    return next(blocks)[1]
