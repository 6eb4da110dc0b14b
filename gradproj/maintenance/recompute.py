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
from gradproj.formatting import count, shown
from gradproj.job.recorded import config_from, recorded_engine, recorded_index
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.job.unit_projector import UnitProjector
from gradproj.job.unit_reader import UnitReader, UnitSettings
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.maintenance.checks import Damage
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.row_comparison import RowCheck, RowComparison, unreadable_row
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.hidden_view import HiddenStates
from gradproj.store.row_encoder import RowEncoder

MAX_SHOWN = 10
_SPREAD = 4
"""Candidates drawn from a unit for each row wanted from it."""


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
        hidden = HiddenStates(output.path) if output.layout.hidden_width else None
        compare = RowComparison(store, run.model.model_dtype, usual_norm, hidden)
        limit = compare.tolerance.row
        result = Recomputation(seed, str(recorded.device), limit, wrong=unreadable)
        with recorded.engine:
            encoder = RowEncoder(output.layout, store.layers)
            made = recorded.model, recorded.engine, settings, encoder, RankProgress()
            head = None
            if recorded.head is not None and store.head is not None:
                head = recorded.head, store.head.segment
            projector = UnitProjector(*made, head=head, hidden=run.store.hidden_state)
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
            unreadable.append(unreadable_row(start, unit, error))
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
