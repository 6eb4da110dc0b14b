"""The merge: what the units' records say becomes the store's columns, sums and statistics.

It is idempotent, its only input are the records, and every sum runs in unit order: so the result is the same
bits whoever computed which unit. One process at a time merges, held by a claim of its own.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.claims import ClaimBoard
from gradproj.coordinator.units import read_unit
from gradproj.store.files import write_and_replace
from gradproj.store.layout import STATUS, STATUS_NAMES, STORE_NAME, StoreLayout, empty_columns
from gradproj.store.opening import read_attributes, read_layout
from gradproj.store.reader import ProjectionStore
from gradproj.store.records import list_records
from gradproj.store.writer import update_attributes, write_array, write_column_block

MERGE_CLAIM = "merge"
COVARIANCE_ARRAYS = {"a": "token_covariance_a", "s": "token_covariance_s"}


def ranges_of(units: np.ndarray) -> list[list[int]]:
    """Sorted units as ``[first, last + 1]`` ranges."""
    if not len(units):
        return []
    starts = np.flatnonzero(np.diff(units, prepend=units[0] - 2) != 1)
    stops = np.append(starts[1:], len(units))
    return [[int(units[a]), int(units[b - 1]) + 1] for a, b in zip(starts, stops, strict=True)]


def units_in(ranges: list[list[int]]) -> np.ndarray:
    """The units of ``[first, last + 1]`` ranges, sorted."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b, dtype=np.int64) for a, b in ranges)])


def wanted_units(attributes: dict[str, Any]) -> np.ndarray:
    """The units that the store's job computes, sorted."""
    return units_in(attributes["wanted_units"])


def is_complete(output: Path) -> bool:
    """Whether every wanted unit has its record."""
    attributes = read_attributes(output / STORE_NAME)
    return not len(np.setdiff1d(wanted_units(attributes), list_records(output / "units")))


def is_merged(output: Path) -> bool:
    """Whether the final merge has run."""
    return bool(read_attributes(output / STORE_NAME).get("complete"))


def finish(output: Path, claims: ClaimBoard, *, wait: bool) -> bool:
    """Run the final merge if every unit is recorded and no other process does.

    Args:
        output: OUTPUT.
        claims: of this process.
        wait: stay until the merge is done, by whomever.

    Returns:
        Whether the store is complete and merged now.
    """
    while is_complete(output) and not is_merged(output):
        if claims.try_claim(MERGE_CLAIM):
            try:
                merge(output)
            finally:
                claims.forget(MERGE_CLAIM)
        elif not wait:
            return False
        else:
            time.sleep(0.5)
    return is_merged(output)


def merge(output: Path) -> dict[str, Any]:
    """Merge the records there are; the columns of missing units stay unknown.

    Returns:
        The statistics that ``projection_stats.json`` holds.
    """
    store = output / STORE_NAME
    attributes, layout = read_attributes(store), read_layout(store)
    recorded = list_records(output / "units")
    wanted = wanted_units(attributes)
    complete = not len(np.setdiff1d(wanted, recorded))
    sums, timing = _Covariances(), _Timing()
    for block in range(layout.n_column_blocks):
        _merge_block(output, layout, block, attributes["identity_hash"], wanted, recorded, sums, timing)
    for name, array in COVARIANCE_ARRAYS.items():
        if name in sums.values:
            write_array(store, array, sums.values[name])
    changes = {"complete": complete, "covariance_tokens": sums.n_tokens, "units_recorded": len(recorded)}
    update_attributes(store, changes)
    stats = {"complete": complete, **column_statistics(output), "timing": timing.summary()}
    _write_json(output / "projection_stats.json", stats)
    write_metadata(output)
    return stats


class _Covariances:
    """Sums of the records' token covariances, in float64 and in the order they come."""

    def __init__(self) -> None:
        self.values: dict[str, np.ndarray] = {}
        self.n_tokens = 0

    def add(self, covariances: dict[str, np.ndarray], n_tokens: int) -> None:
        for name, value in covariances.items():
            if name in self.values:
                self.values[name] += value
            else:
                self.values[name] = value.astype(np.float64)
        self.n_tokens += n_tokens


class _Timing:
    """What the units took. Not a part of what is the same for any number of ranks."""

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


def _merge_block(
    output: Path,
    layout: StoreLayout,
    block: int,
    identity: str,
    wanted: np.ndarray,
    recorded: np.ndarray,
    sums: _Covariances,
    timing: _Timing,
) -> None:
    start, stop = layout.column_block_range(block)
    first, last = start // layout.rows_per_shard, -(-stop // layout.rows_per_shard)
    columns = empty_columns(stop - start, layout.key_bytes)
    if len(wanted) < layout.n_units:
        columns["status"][:] = STATUS["not_selected"]
        for unit in wanted[(wanted >= first) & (wanted < last)].tolist():
            a, b = layout.unit_range(unit)
            columns["status"][a - start : b - start] = STATUS["missing"]
    for unit in recorded[(recorded >= first) & (recorded < last)].tolist():
        record = read_unit(output, unit, identity)
        a, b = layout.unit_range(unit)
        for name, values in record.columns.items():
            columns[name][a - start : b - start] = values
        sums.add(record.token_covariances, record.stats["covariance_tokens"])
        timing.add(record.stats)
    write_column_block(output / STORE_NAME, layout, block, columns)


def column_statistics(output: Path) -> dict[str, Any]:
    """Counts, mean loss and mean norm of the rows, in all and by domain; from the columns alone."""
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
    """``(n_domains + 1, 4)`` float64: ok rows, target tokens, summed loss (nats), summed norm; last = no domain."""
    ok = columns["status"] == STATUS["ok"]
    domain = np.where(columns["domain"] < 0, n_domains, columns["domain"])[ok].astype(np.int64)
    tokens = columns["n_tokens"][ok].astype(np.float64)
    losses = columns["loss"][ok].astype(np.float64) * tokens
    weights = (None, tokens, losses, columns["grad_norm"][ok].astype(np.float64))
    return np.stack([np.bincount(domain, w, n_domains + 1) for w in weights], axis=1).astype(np.float64)


def _summary(row: np.ndarray) -> dict[str, Any]:
    n, tokens, loss, norm = row.tolist()
    return {
        "n_rows": int(n),
        "n_tokens": int(tokens),
        "loss": loss / tokens if tokens else None,
        "mean_grad_norm": norm / n if n else None,
    }


def write_metadata(output: Path) -> None:
    """``metadata.json``: a copy of the Zarr group's attributes."""
    _write_json(output / "metadata.json", read_attributes(output / STORE_NAME))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_and_replace(path, [(json.dumps(content, indent=2, allow_nan=False) + "\n").encode()])
