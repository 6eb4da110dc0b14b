"""Computes random rows again with the recorded model and settings, and compares them.

No checksum can tell whether the rows are those that the recorded inputs give; this check can.
Documents go through the job's own reader, batches and engine, one at a time, so memory holds the
model and one document.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.units import UnitRows
from gradproj.engine.batching import fit_padding
from gradproj.errors import StoreError
from gradproj.formatting import count, escaped, shown
from gradproj.job.recorded import config_from, recorded_engine, recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.job.unit_projector import UnitProjector
from gradproj.job.unit_reader import UnitReader, UnitSettings
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.maintenance.checks import Damage
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.row_tolerance import COMPUTED, ROUNDING, RowTolerance, tolerance_of
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.hidden_view import HiddenStates
from gradproj.store.layout import STATUS_NAMES, decode_key
from gradproj.store.row_encoder import RowEncoder

FLOOR = 1e-2
"""Fraction of the median norm below which errors are relative to that fraction instead of the row.
The gradient of a memorised document is a difference of nearly equal numbers, mostly rounding."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

MAX_SHOWN = 10
_SPREAD = 4
"""Candidates drawn from a unit for each row wanted from it."""
_NO_NUMBER = 1e30
"""Stands for an infinite or undefined error, for which JSON has no number."""
_EXACT = ("n_tokens", "domain", "tar", "key")
_WITHOUT_MEMORY = STATUS["out_of_memory"]


@dataclass(frozen=True)
class RowCheck:
    """A row that was computed again."""

    sample_id: int
    unit: int
    key: str
    status: str
    """Stored status."""
    error: float
    """``|again - stored| / |again|``, in float32 after decoding both."""
    what: str
    """The difference; empty if there is none."""


@dataclass
class Recomputation:
    """Result of a recomputation. ``asdict`` of it is a part of ``--json``."""

    seed: int
    device: str
    tolerance: float
    """Largest relative error that rounding explains."""
    n_rows: int = 0
    """Rows of status ok."""
    n_others: int = 0
    """Documents of other statuses, whose status and row must be equal."""
    n_without_memory: int = 0
    """Documents that ran out of memory, here or in the job. They are not compared."""
    max_error: float = 0.0
    median_error: float = 0.0
    seconds: float = 0.0
    worst: list[RowCheck] = field(default_factory=list)
    """The ok rows with the largest errors, largest first."""
    wrong: list[RowCheck] = field(default_factory=list)
    """Everything beyond the tolerance, or with another status."""


def recompute(
    inputs: RecordedRunArgs, n_rows: int, seed: int, skip: set[int] | None = None
) -> Recomputation:
    """Compute random committed rows again and compare them with what is stored.

    Args:
        inputs: the output, and the present places of its model and tars.
        n_rows: number of ok rows; all if there are fewer. At most as many rows of other statuses
            are added.
        seed: of the random choice.
        skip: units known to be damaged.

    Raises:
        StoreError: there is no committed row.
        ModelError: the model or tokenizer is not the recorded one.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    started, output = time.monotonic(), read_output(inputs.output)
    run = config_from(inputs)
    prepare_torch(run.job.threads, run.job.deterministic)
    with ProjectionStore(output.path) as store:
        ids, usual_norm, unreadable = _choose(output, store, n_rows, seed, skip or set())
        index = recorded_index(output.path, inputs.shards)
        recorded = recorded_engine(store, run, inputs.device)
        # A document may have several sequences: windows, or two answers.
        batch = fit_padding(recorded.model, recorded.batch)
        settings = UnitSettings(
            output.layout,
            output.identity_hash,
            batch,
            run.model.special_tokens,
            recorded.vocabulary,
            index.domains,
            run.corpus.chosen_domains,
            run.limits,
            run.rules,
        )
        reader = UnitReader(index, recorded.tokenizer, settings)
        tolerance = tolerance_of(output.layout, len(store.layers), run.model.model_dtype)
        result = Recomputation(seed, str(recorded.device), tolerance.row, wrong=unreadable)
        loss_tolerance = LOSS_TOLERANCE[run.model.model_dtype]
        hidden = HiddenStates(output.path) if output.layout.hidden_width else None
        hidden_tolerance = ROUNDING["float16"] + COMPUTED[run.model.model_dtype]
        sizes = loss_tolerance, FLOOR * usual_norm
        compare = _Comparison(store, tolerance, *sizes, hidden, hidden_tolerance)
        with recorded.engine:
            encoder = RowEncoder(output.layout, store.layers)
            made = recorded.model, recorded.engine, settings, encoder, RankProgress()
            projector = UnitProjector(*made, hidden=run.store.hidden_state)
            checks = (
                compare(int(i), _project(projector, reader, output, int(i)))
                for i in shown(ids, len(ids), "recompute", "documents")
            )
            _summarize(result, checks)
    result.seconds = round(time.monotonic() - started, 3)
    return result


def _project(
    projector: UnitProjector, reader: UnitReader, output: Output, sample_id: int
) -> UnitRows:
    unit = sample_id // output.layout.rows_per_shard
    prepared = reader.read_samples(unit, sample_id, sample_id + 1)
    assert prepared is not None  # nothing requests a stop
    projected = projector.project(prepared)
    assert projected is not None
    return projected.on_host()


def _choose(
    output: Output, store: ProjectionStore, n_rows: int, seed: int, skip: set[int]
) -> tuple[np.ndarray, float, list[RowCheck]]:
    """Draw rows from as many random units as rows are wanted, so that no column is read whole.

    Returns:
        Sorted sample ids, the median norm of the ok rows they were drawn from, and a check for each
        unit whose columns cannot be read.
    """
    generator = np.random.default_rng(seed)
    units = np.setdiff1d(output.committed, np.fromiter(skip, np.int64, len(skip)))
    if not len(units):
        raise StoreError(f"{output.path} has no committed unit whose rows could be computed again")
    n_units = min(n_rows, len(units))
    each = _SPREAD * -(-n_rows // n_units)
    ok, others, norms = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    unreadable, n_ok = [], 0
    for visited, unit in enumerate(generator.permutation(units).tolist()):
        if visited >= n_units and n_ok >= n_rows:
            break
        start, stop = output.layout.unit_range(unit)
        try:
            status = store.column("status", start, stop)
            norm = store.column("grad_norm", start, stop)
        except StoreError as error:
            unreadable.append(_unreadable(start, unit, error))
            continue
        for code in np.unique(status).tolist():
            rows = generator.permutation(np.flatnonzero(status == code))
            if code == STATUS["ok"]:
                ok.append(start + rows[:each])
                norms.append(norm[rows[:each]])
                n_ok += len(ok[-1])
            else:
                others.append(start + rows[: each // _SPREAD])
    chosen = [generator.permutation(np.concatenate(part))[:n_rows] for part in (ok, others)]
    usual_norm = float(np.median(np.concatenate(norms))) if n_ok else 0.0
    return np.sort(np.concatenate(chosen)), usual_norm, unreadable


def _unreadable(sample_id: int, unit: int, error: StoreError) -> RowCheck:
    return RowCheck(sample_id, unit, "", "missing", _NO_NUMBER, f"cannot be read: {error}")


@dataclass(frozen=True)
class _Comparison:
    """Compares recomputed rows with stored ones."""

    store: ProjectionStore
    tolerance: RowTolerance
    loss_tolerance: float
    floor: float
    hidden: HiddenStates | None
    hidden_tolerance: float

    def __call__(self, sample_id: int, again: UnitRows) -> tuple[RowCheck, bool]:
        """Return ``(check, whether the document ran out of memory, here or in the job)``."""
        names = ("status", "loss", *_EXACT)
        stored = {name: v[0] for name, v in self.store.columns_at(names, [sample_id]).items()}
        computed = {name: again.record.columns[name][0] for name in names}
        status = int(stored["status"])
        without_memory = _WITHOUT_MEMORY in (status, int(computed["status"]))
        unit = again.record.unit
        try:
            row = self.store.rows([sample_id], missing="nan")[0]
        except StoreError as unreadable:
            return _unreadable(sample_id, unit, unreadable), without_memory
        error, what = self._difference(row, self._decoded(again), status == STATUS["ok"])
        what = what or self._hidden_difference(sample_id, again)
        if status != computed["status"]:
            what = f"has status {STATUS_NAMES[int(computed['status'])]} now"
        elif not what:
            what = self._column_difference(stored, computed)
        key = escaped(decode_key(stored["key"]))
        check = RowCheck(sample_id, unit, key, STATUS_NAMES[status], error, what)
        return check, without_memory

    def _decoded(self, rows: UnitRows) -> np.ndarray:
        """Return the row as a reader of the store decodes it, ``(D,)`` float32."""
        if rows.stored is None:
            return np.full(self.store.dim, np.nan, np.float32)
        return self.store.decode(rows.stored, rows.record.columns["row_scale"])[0]

    def _difference(self, stored: np.ndarray, again: np.ndarray, is_ok: bool) -> tuple[float, str]:
        if not is_ok:
            same = np.array_equal(stored, again, equal_nan=True)
            return 0.0, "" if same else "has another row now"
        exact = again.astype(np.float64)
        tiny = float(np.finfo(np.float32).tiny)
        norm = max(float(np.linalg.norm(exact)), self.floor, tiny)
        error = float(np.linalg.norm(exact - stored)) / norm
        moved = float(np.linalg.norm(self._layer_norms(exact) - self._layer_norms(stored))) / norm
        if not np.isfinite(error):
            return _NO_NUMBER, "is not finite, or was not"
        if error > self.tolerance.row:
            return error, f"is {error:.1e} from its row now"
        if moved > self.tolerance.layer_norms:
            return error, f"has layers whose norms are {moved:.1e} from those now"
        return error, ""

    def _hidden_difference(self, sample_id: int, again: UnitRows) -> str:
        if self.hidden is None:
            return ""
        none = np.full((1, self.hidden.dim), np.nan)
        now = none if again.hidden is None else again.hidden.astype(np.float64)
        stored = self.hidden.rows([sample_id], missing="nan").astype(np.float64)
        if np.isnan(now).all() and np.isnan(stored).all():
            return ""
        error = np.linalg.norm(now - stored) / max(float(np.linalg.norm(now)), 1e-30)
        if error <= self.hidden_tolerance:
            return ""
        return f"has a hidden state that is {error:.1e} from its now"

    def _layer_norms(self, row: np.ndarray) -> np.ndarray:
        layers = self.store.layers
        return np.array([np.linalg.norm(row[x.slice_start : x.slice_end]) for x in layers])

    def _column_difference(
        self, stored: dict[str, np.ndarray], computed: dict[str, np.ndarray]
    ) -> str:
        for name in _EXACT:
            if not np.array_equal(stored[name], computed[name]):
                return f"has another {name} now"
        a, b = float(stored["loss"]), float(computed["loss"])
        if (np.isnan(a) and np.isnan(b)) or abs(a - b) <= self.loss_tolerance * max(abs(b), FLOOR):
            return ""
        return f"has the loss {b:.6g} now, stored is {a:.6g}"


def _summarize(result: Recomputation, checks: Iterator[tuple[RowCheck, bool]]) -> None:
    errors = []
    for check, without_memory in checks:
        if without_memory:
            result.n_without_memory += 1
            continue
        if check.status == "ok":
            errors.append(check.error)
            result.worst = sorted([*result.worst, check], key=lambda c: -c.error)[:MAX_SHOWN]
        elif check.status != "missing":
            result.n_others += 1
        if check.what:
            result.wrong.append(check)
    result.n_rows = len(errors)
    if errors:
        result.max_error, result.median_error = max(errors), float(np.median(errors))


def wrong_rows(result: Recomputation, output: Output) -> list[Damage]:
    """Return the units of wrong rows, as damage that ``verify`` reports and ``repair`` removes."""
    samples: dict[int, list[int]] = {}
    for check in result.wrong:
        samples.setdefault(check.unit, []).append(check.sample_id)
    return [
        Damage(
            "rows",
            unit,
            str(output.path / output.layout.shard_name(unit)),
            f"holds {count(len(ids), 'row')} that come out otherwise now, first sample {min(ids)}",
        )
        for unit, ids in sorted(samples.items())
    ]
