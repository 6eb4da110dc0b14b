"""gradproj's own scores by its own path: the job makes two stores, ``gradproj.analysis`` scores one for the other."""

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
        """From ``SCORE@K`` or ``SCORE@K:DAMPING``; None where the name has another form."""
        found = _SPECIFIED.fullmatch(name)
        if found is None:
            return None
        kind, damping = found["score"], found["damping"]
        if kind not in SCORES:
            raise ConfigError(
                f"--methods: {name}: there is no score {kind!r}; choose one of {', '.join(SCORES)}"
            )
        if damping is not None and SCORES[kind].curvature is None:
            raise ConfigError(
                f"--methods: {name}: {kind} has no damping; write {kind}@{found['k']}"
            )
        if found["k"] != FULL and int(found["k"]) < 1:
            raise ConfigError(f"--methods: {name}: K must be at least 1")
        try:
            return cls(kind, found["k"], "auto" if damping in (None, "auto") else float(damping))
        except ValueError as error:
            raise ConfigError(f"--methods: {name}: {damping!r} is no number") from error


class GradientStores:
    """The stores of documents and queries, made on first use, at every size that is asked for."""

    def __init__(self, config: LdsConfig, experiment: Experiment, model: Path) -> None:
        self._config, self._experiment, self._model = config, experiment, model
        self._fitted: dict[tuple[str, str], Preconditioner] = {}

    def scores(self, method: GradientMethod) -> np.ndarray:
        """``(Q, N)`` float32."""
        with (
            self._open("documents", method.k) as documents,
            self._open("queries", method.k) as queries,
        ):
            asked = queries.rows(np.arange(len(queries)))
            kind = SCORES[method.score].curvature
            if kind is None:
                found = score(asked, documents, score=method.score)
            else:
                if (kind, method.k) not in self._fitted:
                    self._fitted[kind, method.k] = Preconditioner.fit(documents, kind)
                fitted = self._fitted[kind, method.k].with_damping(method.damping)
                found = score(asked, documents, score=method.score, preconditioner=fitted)
        return np.asarray(found)

    def column(self, name: str, k: str) -> np.ndarray:
        """``(N,)`` of the documents' store."""
        with self._open("documents", k) as store:
            return store.column(name)

    def _open(self, what: str, k: str) -> ProjectionStore:
        output = Path(self._config.output_dir) / "stores" / f"{what}-{k}"
        experiment = self._experiment
        tars = experiment.document_tars if what == "documents" else experiment.query_tars
        self._make(tars, output, k)
        store = ProjectionStore(output)
        lost = int((store.column("status") != STATUS["ok"]).sum())
        if lost:
            raise StoreError(
                f"{output}: {lost:,} of {len(store):,} documents have no row, so no score is whole"
            )
        return store

    def _make(self, tars: Path, output: Path, k: str) -> None:
        """Run the job; on a finished store it only looks."""
        if output.is_dir() and _is_finished(output):
            return
        config = self._config
        flags = {
            "shards": tars, "output_dir": output, "model": self._model, "device": config.device,
            "max_length": config.max_length, "threads": 1, **_size(k, config.n_embd),
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "gradproj.run",
            *(str(x) for f, v in flags.items() for x in (f"--{f}", v)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StoreError(f"the job for {output} failed:\n{done.stderr.strip()[-2000:]}")


def _size(k: str, n_embd: int) -> dict[str, object]:
    if k != FULL:
        return {"proj_rank_total": int(k) ** 2, "proj_rank_min": int(k)}
    # A GPT-2 block's widest matrix; orthonormal and square, the projections turn gradients and lose nothing.
    return {"proj_rank_total": 4 * n_embd**2, "proj_kind": "orthonormal", "proj_dtype": "float32"}


def _is_finished(output: Path) -> bool:
    try:
        with ProjectionStore(output) as store:
            return not len(store.missing_ranges())
    except StoreError:
        return False
