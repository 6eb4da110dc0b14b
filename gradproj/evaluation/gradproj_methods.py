"""gradproj's own scores: the job writes two stores, which ``gradproj.analysis`` scores."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.analysis import SCORES, Preconditioner, score
from gradproj.errors import ConfigError, StoreError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment
from gradproj.store import STATUS, ProjectionStore

FULL = "full"
_SPECIFIED = re.compile(r"(?P<score>\w+)@(?P<k>\d+|full)(:(?P<damping>[\d.e-]+|auto))?")


@dataclass(frozen=True)
class GradientMethod:
    """One of gradproj's scores at one size."""

    score: str
    k: str
    """Values kept on each side of a layer, or ``full``."""
    damping: float | str = "auto"

    @classmethod
    def of(cls, name: str) -> "GradientMethod | None":
        """Parse ``SCORE@K`` or ``SCORE@K:DAMPING``; None for names of another form."""
        match = _SPECIFIED.fullmatch(name)
        if match is None:
            return None
        kind, damping = match["score"], match["damping"]
        if kind not in SCORES:
            raise ConfigError(
                f"--methods: {name}: there is no score {kind!r}; choose one of {', '.join(SCORES)}"
            )
        if damping is not None and SCORES[kind].curvature is None:
            raise ConfigError(
                f"--methods: {name}: {kind} has no damping; write {kind}@{match['k']}"
            )
        if match["k"] != FULL and int(match["k"]) < 1:
            raise ConfigError(f"--methods: {name}: K must be at least 1")
        try:
            return cls(kind, match["k"], "auto" if damping in (None, "auto") else float(damping))
        except ValueError as error:
            raise ConfigError(f"--methods: {name}: {damping!r} is not a number") from error


class GradientStores:
    """Stores of documents and queries at every requested size, written on first use."""

    def __init__(self, config: LdsConfig, experiment: Experiment, model: Path) -> None:
        self._config, self._experiment, self._model = config, experiment, model
        self._fitted: dict[tuple[str, str], Preconditioner] = {}

    def scores(self, method: GradientMethod) -> np.ndarray:
        """Return ``(Q, N)`` float32."""
        with (
            self._open("documents", method.k) as documents,
            self._open("queries", method.k) as queries,
        ):
            query_rows = queries.rows(np.arange(len(queries)))
            kind, fitted = SCORES[method.score].curvature, None
            if kind is not None:
                if (kind, method.k) not in self._fitted:
                    self._fitted[kind, method.k] = Preconditioner.fit(documents, kind)
                fitted = self._fitted[kind, method.k].with_damping(method.damping)
            scores = score(query_rows, documents, score=method.score, preconditioner=fitted)
        return np.asarray(scores)

    def column(self, name: str, k: str) -> np.ndarray:
        """Return a column of the documents' store, ``(N,)``."""
        with self._open("documents", k) as store:
            return store.column(name)

    def _open(self, side: str, k: str) -> ProjectionStore:
        output = Path(self._config.output_dir) / "stores" / f"{side}-{k}"
        experiment = self._experiment
        tars = experiment.document_tars if side == "documents" else experiment.query_tars
        self._make(tars, output, k)
        store = ProjectionStore(output)
        lost = int((store.column("status") != STATUS["ok"]).sum())
        if lost:
            raise StoreError(
                f"{output}: {lost:,} of {len(store):,} documents have no row, so scores would be "
                "incomplete"
            )
        return store

    def _make(self, tars: Path, output: Path, k: str) -> None:
        if output.is_dir() and _is_finished(output):
            return
        config = self._config
        flags = {
            "shards": tars, "output_dir": output, "model": self._model, "device": config.device,
            "max_length": config.max_length, "threads": 1, **_size(k, config.n_embd),
        }  # fmt: skip
        arguments = [str(x) for flag, value in flags.items() for x in (f"--{flag}", value)]
        command = [sys.executable, "-m", "gradproj.run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StoreError(f"the job for {output} failed:\n{done.stderr.strip()[-2000:]}")


def _size(k: str, n_embd: int) -> dict[str, object]:
    if k != FULL:
        return {"proj_rank_total": int(k) ** 2, "proj_rank_min": int(k)}
    # As wide as a GPT-2 block's widest matrix: square orthonormal projections lose nothing.
    return {"proj_rank_total": 4 * n_embd**2, "proj_kind": "orthonormal", "proj_dtype": "float32"}


def _is_finished(output: Path) -> bool:
    try:
        with ProjectionStore(output) as store:
            return not len(store.missing_ranges())
    except StoreError:
        return False
