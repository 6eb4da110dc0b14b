"""Rows of a store by status, whether it is merged or not."""

import time

import numpy as np

from gradproj.coordinator.units import read_unit
from gradproj.errors import StoreError
from gradproj.maintenance.checks import MergedColumns
from gradproj.maintenance.job_output import Output
from gradproj.store.layout import STATUS
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import record_name


def rows_by_status(
    output: Output, most_s: float | None, problems: list[str]
) -> tuple[dict[str, int], int]:
    """Count the rows of committed units by status, and of how many units that is.

    Args:
        output: OUTPUT. Of units that are not merged the records are read.
        most_s: so many seconds are spent on it; None: as many as it takes.
        problems: gets a line for each unit whose rows cannot be counted.
    """
    committed, missing = output.committed, output.missing
    counts = np.zeros(256, np.int64)
    n_counted = len(committed)
    if output.is_merged and not len(missing):
        with ProjectionStore(output.path) as store:
            by_name = store.status_counts()
            counts[[STATUS[name] for name in by_name]] = list(by_name.values())
    else:
        merged, n_counted = MergedColumns(output), 0
        started = time.monotonic()
        # Spread over the store, so that those counted first are not of one domain.
        for unit in np.random.default_rng(0).permutation(committed).tolist():
            if most_s is not None and time.monotonic() - started > most_s:
                break
            try:
                status = merged.status(unit) if len(missing) else None
                # Where all wait for the merge, the records are looked at: it works by them.
                counts += np.bincount(
                    _recorded_status(output, unit) if status is None else status, minlength=256
                )
                n_counted += 1
            except (StoreError, OSError, ValueError, KeyError) as error:
                problems.append(f"rows of unit {unit} cannot be counted: {error}")
        counts[STATUS["missing"]] += output.n_samples_in(missing)
        # Units that no chosen document lies in have no record; only the merge writes what their rows are.
        counts[STATUS["not_selected"]] += output.layout.n_samples - output.n_samples_in(
            output.wanted
        )
    return {name: int(counts[code]) for name, code in STATUS.items() if counts[code]}, n_counted


def _recorded_status(output: Output, unit: int) -> np.ndarray:
    """The statuses in a unit's record.

    Raises:
        StoreError: the record is damaged or another store's, or its shard is not there.
    """
    record = read_unit(output.path, unit, output.identity_hash)
    shard = output.path / output.layout.shard_name(unit)
    if record.shard is not None and not shard.exists():
        raise StoreError(f"{output.path / record_name(unit)} has no shard: {shard} is gone")
    return record.columns["status"]
