"""The merge: makes the store's columns, sums and statistics from the units' records.

It is idempotent, reads nothing but the records, and sums in unit order, so its result does not
depend on which process computed which unit, to the bit. One process at a time merges, under a claim
of its own.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.failure import delete_failure
from gradproj.coordinator.heartbeats import RankProgress, delete_heartbeat, read_heartbeats
from gradproj.coordinator.units import read_unit
from gradproj.files import write_and_replace
from gradproj.store.layout import (
    HEARTBEATS_DIR,
    METADATA_NAME,
    STATS_NAME,
    STATUS,
    STATUS_NAMES,
    STORE_NAME,
    UNITS_DIR,
    empty_columns,
)
from gradproj.store.metadata import read_attributes, read_layout
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import list_records
from gradproj.store.writer import update_attributes, write_array, write_column_block

MERGE_CLAIM = "merge"
WAIT_S = 0.5
"""Time between two checks whether another process's merge is done."""
COVARIANCE_ARRAYS = {"a": "token_covariance_a", "s": "token_covariance_s"}


def ranges_of(units: np.ndarray) -> list[list[int]]:
    """Return sorted units as ``[first, last + 1]`` ranges."""
    if not len(units):
        return []
    starts = np.flatnonzero(np.diff(units, prepend=units[0] - 2) != 1)
    stops = np.append(starts[1:], len(units))
    return [[int(units[a]), int(units[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def units_in(ranges: list[list[int]]) -> np.ndarray:
    """Return the units of ``[first, last + 1]`` ranges, sorted."""
    return np.concatenate(
        [np.empty(0, np.int64), *(np.arange(a, b, dtype=np.int64) for a, b in ranges)]
    )


def wanted_units(attributes: dict[str, Any]) -> np.ndarray:
    """Return the units that the store's job computes, sorted."""
    return units_in(attributes["wanted_units"])


def is_complete(output: Path) -> bool:
    """Return whether every wanted unit has its record."""
    attributes = read_attributes(output / STORE_NAME)
    return not len(np.setdiff1d(wanted_units(attributes), list_records(output / UNITS_DIR)))


def is_merged(output: Path) -> bool:
    """Return whether the final merge has run."""
    return bool(read_attributes(output / STORE_NAME).get("complete"))


class MergeInterrupted(Exception):
    """The merge was interrupted (stop request or lost claim). The next one starts from scratch."""


def finish(
    output: Path,
    claims: ClaimBoard,
    *,
    wait: bool,
    stopping: Callable[[], bool] = lambda: False,
    progress: RankProgress | None = None,
) -> bool:
    """Run the final merge, if every unit is recorded and no other process runs it.

    Args:
        output: output directory.
        claims: of this process.
        wait: if another process runs the merge, wait until it is done.
        stopping: returns whether the job was asked to stop. Interrupts the merge.
        progress: its counter moves with the merge, so that other processes see this one at work.

    Returns:
        Whether the store is now complete and merged.
    """
    while is_complete(output) and not is_merged(output) and not stopping():
        if claims.try_claim(MERGE_CLAIM):
            try:
                # Another process may have merged between the check above and the claim.
                if not is_merged(output):
                    merge(output, claims, stopping, progress)
            except MergeInterrupted:
                continue
            finally:
                release_merge(output, claims)
        elif not wait:
            return False
        else:
            time.sleep(WAIT_S)
    return is_complete(output) and is_merged(output)


def release_merge(output: Path, claims: ClaimBoard) -> None:
    """Release the merge's claim, or delete its claims once the store is complete."""
    if is_complete(output) and is_merged(output):
        claims.delete(MERGE_CLAIM)
    else:
        claims.release(MERGE_CLAIM)


def merge(
    output: Path,
    claims: ClaimBoard | None = None,
    stopping: Callable[[], bool] = lambda: False,
    progress: RankProgress | None = None,
) -> dict[str, Any]:
    """Merge the existing records. Rows of units without a record keep the fill values.

    Args:
        output: output directory.
        claims: of this process, which holds the merge's claim. None if no other process exists.
        stopping: returns whether the merge was asked to stop.
        progress: its counter moves with the merge.

    Returns:
        The statistics, as in ``projection_stats.json``.

    Raises:
        MergeInterrupted: a stop was requested, or the claim was taken over.
        StoreError: a record is damaged, or the disk is full or read-only.
    """
    try:
        return _Merge(output, claims, stopping, progress or RankProgress()).run()
    except FileNotFoundError as error:
        if claims is None or (claims.scratch.is_dir() and claims.owns(MERGE_CLAIM)):
            raise
        raise MergeInterrupted from error  # fenced: the files about to be published are deleted


class _Merge:
    """One pass over the records. Files are written in the scratch directory, then renamed."""

    def __init__(
        self,
        output: Path,
        claims: ClaimBoard | None,
        stopping: Callable[[], bool],
        progress: RankProgress,
    ) -> None:
        self._output, self._store, self._claims = output, output / STORE_NAME, claims
        self._scratch = None if claims is None else claims.scratch
        self._stopping, self._progress = stopping, progress
        self._attributes, self._layout = read_attributes(self._store), read_layout(self._store)
        self._recorded = list_records(output / UNITS_DIR)
        self._wanted = wanted_units(self._attributes)
        self._sums, self._timing, self._covariance_tokens = CovarianceSums(), _Timing(), 0

    def run(self) -> dict[str, Any]:
        scratch = self._scratch
        for block in range(self._layout.n_column_blocks):
            self._merge_block(block)
            fault_points.reach("block merged")
        self._continue()
        for name, array in COVARIANCE_ARRAYS.items():
            if name in self._sums.values:
                write_array(self._store, array, self._sums.values[name], scratch)
        fault_points.reach("sums merged")
        complete = not len(np.setdiff1d(self._wanted, self._recorded))
        statistics = column_statistics(self._output)
        stats = {"complete": complete, **statistics, "timing": self._timing.summary()}
        self._continue()
        _write_json(self._output / STATS_NAME, stats, scratch)
        fault_points.reach("statistics written")
        changes = {
            "complete": complete,
            "covariance_tokens": self._covariance_tokens,
            "units_recorded": len(self._recorded),
        }
        attributes = {**read_attributes(self._store), **changes}
        _write_json(self._output / METADATA_NAME, attributes, scratch)
        fault_points.reach("metadata written")
        if complete:
            delete_failure(self._output)
            self._delete_heartbeats()
        # Last of all: this write marks the store as complete.
        self._continue()
        update_attributes(self._store, changes, scratch)
        fault_points.reach("attributes updated")
        return stats

    def _delete_heartbeats(self) -> None:
        """Delete the heartbeats that dead ranks left. Live ranks write theirs again in seconds."""
        mine = None if self._claims is None else self._claims.owner
        for owner, _ in read_heartbeats(self._output / HEARTBEATS_DIR):
            if owner != mine:
                delete_heartbeat(self._output / HEARTBEATS_DIR, owner)

    def _continue(self) -> None:
        """Show that this process is alive, and check before a write that it may go on."""
        self._progress.batches += 1
        if self._stopping() or (self._claims is not None and not self._claims.owns(MERGE_CLAIM)):
            raise MergeInterrupted

    def _merge_block(self, block: int) -> None:
        layout = self._layout
        start, stop = layout.column_block_range(block)
        first, last = start // layout.rows_per_shard, -(-stop // layout.rows_per_shard)
        wanted, recorded = (u[(u >= first) & (u < last)] for u in (self._wanted, self._recorded))
        columns = empty_columns(stop - start, layout.key_bytes)
        if len(self._wanted) < layout.n_units:
            columns["status"][:] = STATUS["not_selected"]
            for unit in wanted.tolist():
                a, b = layout.unit_range(unit)
                columns["status"][a - start : b - start] = STATUS["missing"]
        for unit in recorded.tolist():
            self._continue()
            record = read_unit(self._output, unit, self._attributes["identity_hash"])
            a, b = layout.unit_range(unit)
            for name, values in record.columns.items():
                columns[name][a - start : b - start] = values
            self._sums.add(record.token_covariances)
            self._covariance_tokens += record.stats["covariance_tokens"]
            self._timing.add(record.stats)
        self._continue()
        if self._attributes.get("complete"):
            # From the first write on, the columns are a mix of two merges until the end.
            update_attributes(self._store, {"complete": False}, self._scratch)
            self._attributes["complete"] = False
            fault_points.reach("merge reopened")
        write_column_block(self._store, layout, block, columns, self._scratch)


class CovarianceSums:
    """Float64 sums of the records' token covariances. Records must be added in unit order."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}

    def add(self, covariances: dict[str, np.ndarray]) -> None:
        for name, value in covariances.items():
            if name in self.values:
                self.values[name] += value
            else:
                self.values[name] = value.astype(np.float64)


class _Timing:
    """Time that the units took. Differs with the number of ranks, unlike all other statistics."""

    def __init__(self) -> None:
        self.rank_seconds, self.n_tokens, self.units = 0.0, 0, 0
        self.started, self.finished = float("inf"), 0.0

    def add(self, stats: dict[str, Any]) -> None:
        self.rank_seconds += stats["seconds"]
        self.n_tokens += stats["real_tokens"]
        self.units += 1
        self.started = min(self.started, stats["started_at"])
        self.finished = max(self.finished, stats["finished_at"])

    def summary(self) -> dict[str, Any]:
        seconds = max(self.rank_seconds, 1e-9)
        return {
            "units": self.units,
            "rank_seconds": round(self.rank_seconds, 3),
            "seconds_per_unit": round(self.rank_seconds / max(self.units, 1), 3),
            "tokens": self.n_tokens,
            "tokens_per_rank_second": round(self.n_tokens / seconds, 1),
            "wall_seconds": round(max(self.finished - self.started, 0.0), 3) if self.units else 0.0,
        }


def column_statistics(output: Path) -> dict[str, Any]:
    """Return counts, mean loss and mean norm of the rows, in total and by domain.

    Reads the columns only.
    """
    with ProjectionStore(output) as store:
        domains = store.domains
        totals = np.zeros((len(domains) + 1, 4))
        statuses = np.zeros(256, dtype=np.int64)
        for block in range(store.layout.n_column_blocks):
            start, stop = store.layout.column_block_range(block)
            columns = {name: store.column(name, start, stop) for name in _STATISTICS_OF}
            statuses += np.bincount(columns["status"], minlength=256)
            totals += _block_totals(columns, len(domains))
    named = dict(zip([*domains, None], totals, strict=True))
    nothing = named.pop(None)
    return {
        "n_samples": int(statuses.sum()),
        "by_status": {STATUS_NAMES[code]: int(n) for code, n in enumerate(statuses) if n},
        "all": _summary(totals.sum(axis=0)),
        "by_domain": {name: _summary(row) for name, row in named.items() if row[0]},
        **({"without_domain": _summary(nothing)} if nothing[0] else {}),
    }


_STATISTICS_OF = ("status", "domain", "loss", "n_tokens", "grad_norm")


def _block_totals(columns: dict[str, np.ndarray], n_domains: int) -> np.ndarray:
    """Return ``(n_domains + 1, 4)`` float64; the last row is for documents without a domain.

    Its columns: ok rows, target tokens, summed loss (nats), summed norm.
    """
    ok = columns["status"] == STATUS["ok"]
    domain = np.where(columns["domain"] < 0, n_domains, columns["domain"])[ok].astype(np.int64)
    tokens = columns["n_tokens"][ok].astype(np.float64)
    losses = columns["loss"][ok].astype(np.float64) * tokens
    weights = (None, tokens, losses, columns["grad_norm"][ok].astype(np.float64))
    return np.stack([np.bincount(domain, w, n_domains + 1) for w in weights], axis=1).astype(
        np.float64
    )


def _summary(row: np.ndarray) -> dict[str, Any]:
    n, tokens, loss, norm = row.tolist()
    return {
        "n_rows": int(n),
        "n_tokens": int(tokens),
        "loss": loss / tokens if tokens else None,
        "mean_grad_norm": norm / n if n else None,
    }


def write_metadata(output: Path, scratch: Path | None = None) -> None:
    """Write ``metadata.json``, a copy of the Zarr group's attributes."""
    _write_json(output / METADATA_NAME, read_attributes(output / STORE_NAME), scratch)


def _write_json(path: Path, content: dict[str, Any], scratch: Path | None) -> None:
    write_and_replace(
        path, [(json.dumps(content, indent=2, allow_nan=False) + "\n").encode()], scratch
    )
