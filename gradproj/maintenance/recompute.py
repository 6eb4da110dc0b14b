"""``verify --recompute K``: some rows once more, by the recorded model and settings, held against the stored ones.

It is the one check that a checksum cannot make: that the rows are what the recorded inputs give. Documents go through
the job's own reader, batches and engine, one at a time, so memory holds the model and one document.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gradproj.coordinator.heartbeats import Progress
from gradproj.coordinator.partial_rows import PartialLog, PartialRows
from gradproj.coordinator.units import UnitRows
from gradproj.errors import StoreError
from gradproj.formatting import count, shown
from gradproj.job.recorded import config_from, recorded_engine, recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.job.unit_projector import UnitProjector
from gradproj.job.unit_reader import UnitReader, UnitSettings
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.maintenance.checks import Damage
from gradproj.maintenance.job_output import Output, read_output
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.encoding import decode_rows
from gradproj.store.layout import STATUS_NAMES, StoreLayout, decode_key

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""``--proj_dtype`` -> the largest relative error of one stored value."""
COMPUTED = {"float32": 1e-4, "bfloat16": 5e-2}
"""``--model_dtype`` -> how far a row may be from itself in another batch, on another device or version of torch."""
FLOOR = 1e-2
"""Errors of rows shorter than this part of a usual row are taken relative to it: the gradient of a document known by
heart is a difference of nearly equal numbers, and rounding is all that is left of it."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

MOST_SHOWN = 10
_SPREAD = 4
"""Candidates drawn from a unit for each row that is wanted of it."""
_NO_NUMBER = 1e30
"""Stands for an error that is infinite or undefined, which JSON has no number for."""
_EXACT = ("n_tokens", "domain", "tar", "key")
_WITHOUT_MEMORY = STATUS["out_of_memory"]


@dataclass(frozen=True)
class RowCheck:
    """One row that was computed again."""

    sample_id: int
    unit: int
    key: str
    status: str
    """As stored."""
    error: float
    """``|again - stored| / |again|``, in float32 after decoding both."""
    what: str
    """What differs, empty where nothing does."""


@dataclass
class Recomputation:
    """What was computed again and how far it is from the store. ``asdict`` of it is a part of ``--json``."""

    seed: int
    device: str
    tolerance: float
    """Largest relative error that rounding explains."""
    n_rows: int = 0
    """Rows of status ok."""
    n_others: int = 0
    """Documents of other statuses, whose status and row must be the same."""
    n_without_memory: int = 0
    """Documents that did not fit the memory, here or in the job; nothing is said of them."""
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
        inputs: the output, and where its model and tars lie now.
        n_rows: ok rows wanted; all there are if there are fewer. At most as many of other statuses come along.
        seed: of the choice.
        skip: units to leave alone, known to be damaged.

    Raises:
        StoreError: no committed row to compare.
        ModelError: the model or tokenizer is not the recorded one.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    started, output = time.monotonic(), read_output(inputs.output)
    run = config_from(inputs)
    prepare_torch(run.job.threads, run.job.deterministic)
    with ProjectionStore(output.path) as store:
        choice = _choose(output, store, n_rows, seed, skip or set())
        index = recorded_index(output.path, run)
        recorded = recorded_engine(store, run, inputs.device)
        settings = UnitSettings(
            output.layout, output.identity_hash, run.batch, run.model.special_tokens, recorded.vocabulary,
            index.domains, run.corpus.chosen_domains, run.limits,
        )  # fmt: skip
        reader = UnitReader(index, recorded.tokenizer, settings)
        tolerance = ROUNDING[output.layout.proj_dtype] + COMPUTED[run.model.model_dtype]
        found = Recomputation(seed, str(recorded.device), tolerance, wrong=choice.unreadable)
        compare = _Comparison(
            store, tolerance, LOSS_TOLERANCE[run.model.model_dtype], FLOOR * choice.usual_norm
        )
        with recorded.engine:
            projector = UnitProjector(recorded.model, recorded.engine, settings, Progress())
            checks = (
                compare(int(i), _project(projector, reader, output, int(i)))
                for i in shown(choice.ids, len(choice.ids), "recompute", "documents")
            )
            _sum_up(found, checks)
    found.seconds = round(time.monotonic() - started, 3)
    return found


class _NothingSaved(PartialLog):
    """Of one document, nothing is taken up and nothing is kept."""

    def __init__(self) -> None:
        pass

    def read(self) -> tuple[int, list[PartialRows]]:
        return 0, []


def _project(
    projector: UnitProjector, reader: UnitReader, output: Output, sample_id: int
) -> UnitRows:
    unit = sample_id // output.layout.rows_per_shard
    projected = projector.project(
        reader.read_samples(unit, sample_id, sample_id + 1), _NothingSaved()
    )
    assert projected is not None  # nobody asks this projector to stop
    return projected.on_host()


@dataclass
class _Choice:
    """Which documents to compute again."""

    ids: np.ndarray
    """Sample ids, sorted."""
    usual_norm: float
    """The median norm of the ok rows they were drawn from."""
    unreadable: list[RowCheck]
    """A check for each unit whose columns cannot be read."""


def _choose(
    output: Output, store: ProjectionStore, n_rows: int, seed: int, skip: set[int]
) -> _Choice:
    """Draw from as many random units as rows are wanted, so that no column is read whole."""
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
    return _Choice(np.sort(np.concatenate(chosen)), usual_norm, unreadable)


def _unreadable(sample_id: int, unit: int, error: StoreError) -> RowCheck:
    return RowCheck(sample_id, unit, "", "missing", _NO_NUMBER, f"cannot be read: {error}")


class _Comparison:
    """Holds a row computed again against the stored one."""

    def __init__(
        self, store: ProjectionStore, tolerance: float, loss_tolerance: float, floor: float
    ) -> None:
        self._store, self._layout = store, store.layout
        self._tolerance, self._loss_tolerance, self._floor = tolerance, loss_tolerance, floor

    def __call__(self, sample_id: int, again: UnitRows) -> tuple[RowCheck, bool]:
        """``(the check, whether one of the two did not fit the memory)``."""
        names = ("status", "loss", *_EXACT)
        stored = {name: v[0] for name, v in self._store.columns_at(names, [sample_id]).items()}
        computed = {name: again.record.columns[name][0] for name in names}
        status = int(stored["status"])
        without_memory = _WITHOUT_MEMORY in (status, int(computed["status"]))
        unit = sample_id // self._layout.rows_per_shard
        try:
            row = self._store.rows([sample_id], missing="nan")[0]
        except StoreError as unreadable:
            return _unreadable(sample_id, unit, unreadable), without_memory
        error, what = self._difference(row, _decoded(again, self._layout), status == STATUS["ok"])
        if status != computed["status"]:
            what = f"has status {STATUS_NAMES[int(computed['status'])]} now"
        elif not what:
            what = self._column_difference(stored, computed)
        check = RowCheck(
            sample_id,
            unit,
            decode_key(stored["key"], self._store.path),
            STATUS_NAMES[status],
            error,
            what,
        )
        return check, without_memory

    def _difference(self, stored: np.ndarray, again: np.ndarray, is_ok: bool) -> tuple[float, str]:
        if not is_ok:
            same = np.array_equal(stored, again, equal_nan=True)
            return 0.0, "" if same else "has another row now"
        norm = float(np.linalg.norm(again.astype(np.float64)))
        shortest = float(np.finfo(np.float32).tiny)
        error = float(np.linalg.norm(again.astype(np.float64) - stored)) / max(
            norm, self._floor, shortest
        )
        if error <= self._tolerance:
            return error, ""
        if not np.isfinite(error):
            return _NO_NUMBER, "is not finite, or was not"
        return error, f"is {error:.1e} from its row now"

    def _column_difference(
        self, stored: dict[str, np.ndarray], computed: dict[str, np.ndarray]
    ) -> str:
        for name in _EXACT:
            if not np.array_equal(stored[name], computed[name]):
                return f"has another {name} now"
        a, b = float(stored["loss"]), float(computed["loss"])
        if (np.isnan(a) and np.isnan(b)) or abs(a - b) <= self._loss_tolerance * max(abs(b), FLOOR):
            return ""
        return f"has the loss {b:.6g} now, stored is {a:.6g}"


def _decoded(rows: UnitRows, layout: StoreLayout) -> np.ndarray:
    """The row as a reader of the store would get it, ``(D,)`` float32."""
    if rows.stored is None:
        return np.full(layout.dim, np.nan, np.float32)
    return decode_rows(rows.stored, rows.record.columns["row_scale"], layout.proj_dtype)[0]


def _sum_up(found: Recomputation, checks: Iterator[tuple[RowCheck, bool]]) -> None:
    errors = []
    for check, without_memory in checks:
        if without_memory:
            found.n_without_memory += 1
            continue
        if check.status == "ok":
            errors.append(check.error)
            found.worst = sorted([*found.worst, check], key=lambda c: -c.error)[:MOST_SHOWN]
        elif check.status != "missing":
            found.n_others += 1
        if check.what:
            found.wrong.append(check)
    found.n_rows = len(errors)
    if errors:
        found.max_error, found.median_error = max(errors), float(np.median(errors))


def wrong_rows(found: Recomputation, output: Output) -> list[Damage]:
    """The units of wrong rows, as damage that ``verify`` reports and ``repair`` mends."""
    samples: dict[int, list[int]] = {}
    for check in found.wrong:
        samples.setdefault(check.unit, []).append(check.sample_id)
    return [
        Damage(
            "rows", unit, str(output.path / output.layout.shard_name(unit)),
            f"holds {count(len(ids), 'row')} that come out otherwise now, first sample {min(ids)}",
        )
        for unit, ids in sorted(samples.items())
    ]  # fmt: skip
