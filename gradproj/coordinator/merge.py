"""The merge: makes the store's columns, sums and statistics from the units' records.

It is idempotent, reads nothing but the records, and sums in unit order, so its result does not
depend on which process computed which unit, to the bit. One process at a time merges, under a claim
of its own.
"""

import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator import fault_points
from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.failure import delete_failure
from gradproj.coordinator.heartbeats import RankProgress, delete_heartbeat, read_heartbeats
from gradproj.coordinator.units import read_units
from gradproj.storage.publish import Outdated, Publisher, publisher_of
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
from gradproj.store.unit_record import list_records
from gradproj.store.writer import (
    mark_merger,
    update_attributes,
    without_merger,
    write_array,
    write_column_block,
)

MERGE_CLAIM = "merge"
COVARIANCE_ARRAYS = {"a": "token_covariance_a", "s": "token_covariance_s"}


def ranges_of(units: np.ndarray) -> list[list[int]]:
    """Return sorted units as ``[first, last + 1]`` ranges."""
    if not len(units):
        return []
    starts = np.flatnonzero(np.diff(units, prepend=units[0] - 2) != 1)
    stops = np.append(starts[1:], len(units))
    return [[int(units[a]), int(units[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def wanted_units(attributes: dict[str, Any]) -> np.ndarray:
    """Return the units that the store's job computes, sorted; the inverse of ``ranges_of``."""
    ranges = (np.arange(a, b, dtype=np.int64) for a, b in attributes["wanted_units"])
    return np.concatenate([np.empty(0, np.int64), *ranges])


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

    With ``wait``, another process's merge is waited for. The counter of ``progress`` moves with the
    merge, so that other processes see this one at work; ``stopping`` interrupts it.

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
            time.sleep(claims.commits.pace.merge_wait_s)
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

    The process holds the merge's claim; ``claims`` is None if no other process exists.

    Returns:
        The statistics, as in ``projection_stats.json``.

    Raises:
        MergeInterrupted: a stop was requested, or the claim was taken over.
        StoreError: a record is damaged, or the disk is full or read-only.
    """
    try:
        return _Merge(output, claims, stopping, progress or RankProgress()).run()
    except Outdated as error:
        raise MergeInterrupted from error
    except FileNotFoundError as error:
        if claims is None or (not claims.commits.was_fenced() and claims.owns(MERGE_CLAIM)):
            raise
        raise MergeInterrupted from error  # fenced: the files about to be published are deleted


def merge_publisher(output: Path, claims: ClaimBoard | None) -> Publisher:
    """Return what publishes the files that only the holder of the merge's claim may replace.

    Raises:
        MergeInterrupted, Outdated: another process has taken the claim over.
    """

    def check() -> None:
        if claims is not None and not claims.owns(MERGE_CLAIM):
            raise MergeInterrupted

    if claims is None:
        return publisher_of(output)
    publisher = claims.commits.publisher.guarded(check)
    # An earlier merger that hangs would otherwise mark as complete what this one is changing.
    mark_merger(output / STORE_NAME, f"{claims.owner.name}-{secrets.token_hex(4)}", publisher)
    return publisher


class _Merge:
    """One pass over the records."""

    def __init__(
        self,
        output: Path,
        claims: ClaimBoard | None,
        stopping: Callable[[], bool],
        progress: RankProgress,
    ) -> None:
        self._output, self._store, self._claims = output, output / STORE_NAME, claims
        self._publisher = merge_publisher(output, claims)
        self._stopping, self._progress = stopping, progress
        self._attributes, self._layout = read_attributes(self._store), read_layout(self._store)
        self._recorded = list_records(output / UNITS_DIR)
        self._wanted = wanted_units(self._attributes)
        self._ask_at = 0.0
        self._sums: dict[str, np.ndarray] = {}
        self._times: list[list[float]] = []
        self._covariance_tokens = 0
        self._statistics = _Statistics(self._attributes.get("domains", []))

    def run(self) -> dict[str, Any]:
        publisher = self._publisher
        for block in range(self._layout.n_column_blocks):
            self._merge_block(block)
            fault_points.reach("block merged")
        self._continue()
        for name, array in COVARIANCE_ARRAYS.items():
            if name in self._sums:
                write_array(self._store, array, self._sums[name], publisher)
        fault_points.reach("sums merged")
        complete = not len(np.setdiff1d(self._wanted, self._recorded))
        stats = {
            "complete": complete,
            **self._statistics.summary(),
            "timing": _timing(self._times),
        }
        self._continue()
        _write_json(self._output / STATS_NAME, stats, publisher)
        fault_points.reach("statistics written")
        changes = {
            "complete": complete,
            "covariance_tokens": self._covariance_tokens,
            "units_recorded": len(self._recorded),
        }
        attributes = without_merger({**read_attributes(self._store), **changes})
        _write_json(self._output / METADATA_NAME, attributes, publisher)
        fault_points.reach("metadata written")
        if complete:
            delete_failure(self._output)
            # Those that dead ranks left. Live ranks write theirs again in seconds.
            for owner, _ in read_heartbeats(self._output / HEARTBEATS_DIR):
                if self._claims is None or owner != self._claims.owner:
                    delete_heartbeat(self._output / HEARTBEATS_DIR, owner)
        # Last of all: this write marks the store as complete.
        self._continue()
        update_attributes(self._store, changes, publisher, ends_merge=True)
        fault_points.reach("attributes updated")
        return stats

    def _continue(self) -> None:
        """Show that this process is alive, and check before a write that it may go on."""
        self._progress.batches += 1
        if self._stopping():
            raise MergeInterrupted
        # In a bucket the question has its price, and every replacement asks it anyway.
        now = time.monotonic()
        if self._claims is not None and now >= self._ask_at:
            self._ask_at = now + self._claims.commits.pace.ask_every_s
            if not self._claims.owns(MERGE_CLAIM):
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
        identity = self._attributes["identity_hash"]
        for record in read_units(self._output, recorded.tolist(), identity):
            self._continue()
            a, b = layout.unit_range(record.unit)
            for name, values in record.columns.items():
                columns[name][a - start : b - start] = values
            add_covariances(self._sums, record.token_covariances)
            self._covariance_tokens += record.stats["covariance_tokens"]
            self._times.append([record.stats[name] for name in _TIMES])
        self._continue()
        if self._attributes.get("complete"):
            # From the first write on, the columns are a mix of two merges until the end.
            update_attributes(self._store, {"complete": False}, self._publisher)
            self._attributes["complete"] = False
            fault_points.reach("merge reopened")
        write_column_block(self._store, layout, block, columns, self._publisher)
        self._statistics.add(columns)


def add_covariances(sums: dict[str, np.ndarray], covariances: dict[str, np.ndarray]) -> None:
    """Add a record's token covariances to float64 sums. Records must come in unit order."""
    for name, value in covariances.items():
        sums[name] = sums[name] + value if name in sums else value.astype(np.float64)


_TIMES = ("seconds", "real_tokens", "started_at", "finished_at")


def _timing(times: list[list[float]]) -> dict[str, Any]:
    """Summarize the units' ``_TIMES``, which unlike all other statistics differ with the ranks."""
    seconds, tokens, started, finished = np.reshape(times, (-1, len(_TIMES))).T
    total_s, n_tokens = float(seconds.sum()), int(tokens.sum())
    wall_s = float(finished.max() - started.min()) if times else 0.0
    return {
        "units": len(times),
        "rank_seconds": round(total_s, 3),
        "seconds_per_unit": round(total_s / max(len(times), 1), 3),
        "tokens": n_tokens,
        "tokens_per_rank_second": round(n_tokens / max(total_s, 1e-9), 1),
        "wall_seconds": round(max(wall_s, 0.0), 3),
    }


class _Statistics:
    """Counts, mean loss and mean norm of the rows, in total and by domain, from the columns."""

    def __init__(self, domains: list[str]) -> None:
        self._domains = domains
        self._statuses = np.zeros(256, np.int64)
        self._totals = np.zeros((len(domains) + 1, 4))
        """A row for each domain, the last one for documents without. Its columns: ok rows, target
        tokens, summed loss (nats), summed norm."""

    def add(self, columns: dict[str, np.ndarray]) -> None:
        n_domains, ok = len(self._domains), columns["status"] == STATUS["ok"]
        domain = np.where(columns["domain"] < 0, n_domains, columns["domain"])[ok].astype(np.int64)
        tokens = columns["n_tokens"][ok].astype(np.float64)
        losses = columns["loss"][ok].astype(np.float64) * tokens
        weights = (None, tokens, losses, columns["grad_norm"][ok].astype(np.float64))
        self._totals += np.stack([np.bincount(domain, w, n_domains + 1) for w in weights], axis=1)
        self._statuses += np.bincount(columns["status"], minlength=256)

    def summary(self) -> dict[str, Any]:
        *named, nothing = map(_summary, self._totals)
        by_domain = dict(zip(self._domains, named, strict=True))
        return {
            "n_samples": int(self._statuses.sum()),
            "by_status": {STATUS_NAMES[code]: int(n) for code, n in enumerate(self._statuses) if n},
            "all": _summary(self._totals.sum(axis=0)),
            "by_domain": {name: of for name, of in by_domain.items() if of["n_rows"]},
            **({"without_domain": nothing} if nothing["n_rows"] else {}),
        }


def _summary(row: np.ndarray) -> dict[str, Any]:
    n, tokens, loss, norm = row.tolist()
    return {
        "n_rows": int(n),
        "n_tokens": int(tokens),
        "loss": loss / tokens if tokens else None,
        "mean_grad_norm": norm / n if n else None,
    }


def write_metadata(output: Path, publisher: Publisher | None = None) -> None:
    """Write ``metadata.json``, a copy of the Zarr group's attributes."""
    publisher = publisher or publisher_of(output)
    attributes = without_merger(read_attributes(output / STORE_NAME))
    _write_json(output / METADATA_NAME, attributes, publisher)


def _write_json(path: Path, content: dict[str, Any], publisher: Publisher) -> None:
    publisher.replace(path, [(json.dumps(content, indent=2, allow_nan=False) + "\n").encode()])
