"""gradproj's own scores: the job writes stores, which ``gradproj.analysis`` scores."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from gradproj.analysis import SCORES, Preconditioner, score
from gradproj.corpus.content import IGNORE
from gradproj.curvature.fit import CurvatureConfig, fit_curvature
from gradproj.curvature.rescore import exact_scores
from gradproj.errors import ConfigError, StoreError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, unpadded
from gradproj.evaluation.method_names import FULL, GradientMethod, RowKind
from gradproj.model.sequences import TokenSequence
from gradproj.query.projector import QueryProjector
from gradproj.query.queries import Query
from gradproj.storage.results import load_array, save_array, save_arrays
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.head_rows import HeadQueries

SMALLEST = RowKind("16", "signs", "eigen", "sum")
HEAD_ROWS = "64x64"


class GradientStores:
    """Stores of documents and rows of queries of every requested kind, written on first use.

    Args:
        config: the experiment's settings.
        experiment: documents and queries.
        model: directory of the model whose gradients these are.
        randomized: whether its weights are random instead.
    """

    def __init__(
        self, config: LdsConfig, experiment: Experiment, model: Path, randomized: bool = False
    ) -> None:
        self._config, self._experiment, self._model = config, experiment, model
        self._init = {"init": "random"} if randomized else {}
        name = "stores-randomized" if randomized else "stores"
        self._folder = Path(config.output_dir) / name
        self._fitted: dict[tuple[str, RowKind], Preconditioner] = {}

    def scores(self, method: GradientMethod) -> np.ndarray:
        """Return ``(Q, N)`` float32."""
        with self.open(method.rows) as documents:
            queries, head = self._query_rows(documents, method.rows)
            if method.head == "only":
                queries = np.zeros_like(queries)
            kind, fitted = SCORES[method.score].curvature, None
            if kind is not None:
                if (kind, method.rows) not in self._fitted:
                    self._fitted[kind, method.rows] = Preconditioner.fit(documents, kind)
                fitted = self._fitted[kind, method.rows].with_damping(method.damping)
            found = score(
                queries, documents, score=method.score, preconditioner=fitted,
                reduction=method.reduction, head=head if method.head else None,
                head_sum="equal" if method.head == "equal" else "plain",
            )  # fmt: skip
            return np.asarray(found)

    def exact(self, kind: str) -> np.ndarray:
        """Return scores of whole gradients with curvature ``kfac`` or ``ekfac``, ``(Q, N)``."""
        with self.open(SMALLEST) as store:  # for its model and tars
            output = str(store.path.parent)
        config = CurvatureConfig(output=output, device=self._config.device)
        fit_curvature(config, lambda _: None)
        queries = [
            TokenSequence.of(ids, owner=number, first=first)
            for number, (ids, first) in enumerate(_with_first(self._experiment))
        ]
        return exact_scores(config, queries, kind=kind).scores

    def column(self, name: str, rows: RowKind) -> np.ndarray:
        """Return a column of the documents' store, ``(N,)``."""
        with self.open(rows) as store:
            return store.column(name)

    def row_bytes(self, method: GradientMethod) -> int:
        """Return the bytes of a document that a method reads."""
        with self.open(method.rows) as store:
            of_head = 0 if store.head is None else store.head.segment.n_bytes
            if method.head == "only":
                return of_head
            return store.layout.row_bytes - (0 if method.head else of_head)

    def open(self, rows: RowKind) -> ProjectionStore:
        """Return the documents' store, complete."""
        output = self._output(rows)
        if not _is_finished(output):
            self._make(output, rows)
        store = ProjectionStore(output)
        lost = int((store.column("status") != STATUS["ok"]).sum())
        if lost:
            raise StoreError(
                f"{output}: {lost:,} of {len(store):,} documents have no row, so scores would be "
                "incomplete"
            )
        return store

    def _output(self, rows: RowKind) -> Path:
        """Return the store's folder, which may be one that has head rows beside the same rows."""
        output, with_head = (
            self._folder / f"documents-{kind.name}" for kind in (rows, replace(rows, head=True))
        )
        return with_head if not output.is_dir() and _is_finished(with_head) else output

    def _query_rows(
        self, documents: ProjectionStore, rows: RowKind
    ) -> tuple[np.ndarray, HeadQueries | None]:
        """Return the queries' rows ``(Q, D)`` in the coordinates of the store, and head rows."""
        # A store that was made again may have another basis: its rows are not the first one's.
        path = self._folder / f"queries-{rows.name}-{documents.attributes.get('store_id')}.npy"
        head_path = path.with_name(f"{path.stem}-head.npz")
        if not path.is_file() or (rows.head and not head_path.is_file()):
            projector = QueryProjector(documents, device=self._config.device)
            found = projector.rows(_queries(self._experiment))
            if found.head is not None:
                save_arrays(head_path, ids=found.head.ids, values=found.head.values)
            save_array(path, found.rows)
        if not rows.head:
            return load_array(path), None
        head = np.load(head_path, allow_pickle=False)
        return load_array(path), HeadQueries(head["ids"], head["values"])

    def _make(self, output: Path, rows: RowKind) -> None:
        config = self._config
        flags = {
            "shards": self._experiment.document_tars, "output_dir": output, "model": self._model,
            "device": config.device, "max_length": config.max_length, "threads": 1,
            "encoding": rows.encoding, "basis": rows.basis, "loss_reduction": rows.loss_reduction,
            **_size(rows, config), **({"head_rows": HEAD_ROWS} if rows.head else {}), **self._init,
        }  # fmt: skip
        arguments = [str(x) for flag, value in flags.items() for x in (f"--{flag}", value)]
        command = [sys.executable, "-m", "gradproj.run", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise StoreError(f"the job for {output} failed:\n{done.stderr.strip()[-2000:]}")


def _queries(experiment: Experiment) -> list[Query]:
    return [
        Query.of(str(i), input_ids=ids.tolist(), labels=[IGNORE] * first + ids[first:].tolist())
        for i, (ids, first) in enumerate(_with_first(experiment))
    ]


def _with_first(experiment: Experiment) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each query's ids and its first target."""
    return zip(unpadded(experiment.queries), experiment.first.tolist(), strict=True)


def _size(rows: RowKind, config: LdsConfig) -> dict[str, object]:
    if rows.k != FULL:
        return {"proj_rank_total": int(rows.k) ** 2, "proj_rank_min": int(rows.k)}
    if config.model:
        raise ConfigError("--methods: K = full is for lds's own GPT-2; take exact_kfac")
    # As wide as a GPT-2 block's widest matrix: square orthonormal projections lose nothing.
    precise = {"proj_dtype": "float32"} if rows.encoding == "dense" else {}
    return {"proj_rank_total": 4 * config.n_embd**2, "proj_kind": "orthonormal", **precise}


def _is_finished(output: Path) -> bool:
    if not output.is_dir():
        return False
    try:
        with ProjectionStore(output) as store:
            return not len(store.missing_ranges())
    except StoreError:
        return False
