"""Verifies every checksum of a store, records against shards, and columns against records."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradproj.coordinator.merge import add_covariances
from gradproj.errors import ConfigError, DamagedFile
from gradproj.flags import flag
from gradproj.formatting import shown
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.checks import (
    Damage,
    MergedColumns,
    UnitFindings,
    check_group,
    check_sums,
    check_unit,
)
from gradproj.maintenance.job_output import Output, read_output
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layout import STATUS_NAMES, UNITS_DIR
from gradproj.store.unit_record import list_given_up, list_shards, record_name

SOUND, DAMAGED, INCOMPLETE = 0, 1, 3
"""Exit codes. 2 is a user's error, as for every command."""

MAX_RANGES_KEPT = 1000
READERS = 4
"""Units checked at once: a single stream does not saturate a network file system."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RecordedRunArgs, title="checks"):
    """Checks to run and repairs to make. Only ``--recompute`` needs the model."""

    repair: bool = flag("Delete damaged units, so that the next run recomputes them.", False)
    recompute: int = flag(
        "Recompute this number of random rows with the recorded model and compare them.",
        0,
        minimum=0,
    )
    seed: int = flag("Seed of the choice of rows to recompute.", 0)
    checksums: bool = flag("Read the whole store and check every checksum.", True)
    as_json: bool = flag("Print one JSON object.", False, name="json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checksums and not self.recompute:
            raise ConfigError(
                "--no-checksums leaves nothing to do: give --recompute K, or leave it out"
            )
        if not self.checksums and self.repair:
            raise ConfigError("--repair needs the checksums: leave --no-checksums out")
        if self.cache_dir:
            raise ConfigError("--cache_dir: verify reads the bucket itself; leave it out")


@dataclass
class BoundedRanges:
    """Ranges of sample ids, the first thousand of them, and the number of all ids."""

    n_ids: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    """``[start, stop)``, in order."""

    def add(self, start: int, stop: int) -> None:
        """Add ids that follow all ids added before."""
        self.n_ids += stop - start
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1][1] = stop
        elif len(self.ranges) < MAX_RANGES_KEPT:
            self.ranges.append([start, stop])


@dataclass
class Verification:
    """Result of ``verify``. ``asdict`` of it is what ``--json`` prints."""

    output: str
    complete: bool
    """Every wanted unit is committed and merged."""
    n_units: int
    n_records: int
    n_shards: int = 0
    n_bytes: int = 0
    """Bytes of records and shards whose checksums were computed."""
    seconds: float = 0.0
    by_status: dict[str, int] = field(default_factory=dict)
    """Rows of committed units."""
    missing: BoundedRanges = field(default_factory=BoundedRanges)
    """Documents of wanted units without a record."""
    non_finite: BoundedRanges = field(default_factory=BoundedRanges)
    shards_without_record: list[int] = field(default_factory=list)
    """Units being committed, or left by a killed process. Readers ignore them."""
    damage: list[Damage] = field(default_factory=list)

    @property
    def damaged_units(self) -> set[int]:
        """Units whose record or shard is damaged."""
        return self._units_of("unit")

    @property
    def wrong_units(self) -> set[int]:
        """Units with intact checksums and rows that differ from recomputed ones."""
        return self._units_of("rows")

    def _units_of(self, kind: str) -> set[int]:
        return {d.unit for d in self.damage if d.kind == kind and d.unit is not None}

    @property
    def exit_code(self) -> int:
        """0 if sound and complete, 3 if sound and incomplete, 1 if damaged."""
        if self.damage:
            return DAMAGED
        return SOUND if self.complete else INCOMPLETE


def verify(path: str | Path, *, checksums: bool = True) -> Verification:
    """Check everything that was committed; writes nothing. Holds a few units in memory.

    Args:
        path: output directory.
        checksums: False only counts what is committed and what is missing.

    Raises:
        StoreError: the directory is no job's output. Damage inside it is returned, not raised.
    """
    started = time.monotonic()
    output = read_output(path)
    result = Verification(
        output=str(output.path),
        complete=output.is_complete,
        n_units=len(output.wanted),
        n_records=len(output.recorded),
    )
    for start, stop in output.id_ranges(output.missing):
        result.missing.add(start, stop)
    if not checksums:
        return result
    merged, sums = MergedColumns(output), dict[str, np.ndarray]()
    statuses = np.zeros(256, np.int64)
    for unit in _checked_units(output, merged):
        result.damage += unit.damage
        result.n_bytes += unit.n_bytes
        result.n_shards += unit.has_shard
        statuses += unit.statuses
        for start, stop in unit.non_finite:
            result.non_finite.add(start, stop)
        if unit.record is not None:
            add_covariances(sums, unit.record.token_covariances)
    result.by_status = {
        STATUS_NAMES.get(code, str(code)): int(n) for code, n in enumerate(statuses) if n
    }
    arrays = [output.store / layout.array for layout in sharded_layouts(output.layout)]
    shards = np.concatenate([list_shards(array) for array in arrays])
    given_up = list_given_up(output.path / UNITS_DIR)[0]
    missing = np.setdiff1d(shards, output.recorded).tolist()
    result.shards_without_record = [unit for unit in missing if unit not in given_up]
    result.damage += _merged_without_record(output, merged)
    if result.complete and not result.damage:
        result.damage += check_sums(output, sums)
    result.damage += check_group(output)
    result.seconds = round(time.monotonic() - started, 3)
    return result


def _checked_units(output: Output, merged: MergedColumns) -> Iterator[UnitFindings]:
    """Yield the findings of every recorded unit in unit order; reads several units at once."""
    units = output.recorded.tolist()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="verify")
    try:
        findings = pool.map(lambda unit: check_unit(output, unit, merged), units)
        yield from shown(findings, len(units), "verify", "units")
    finally:
        pool.shutdown(cancel_futures=True)


def _merged_without_record(output: Output, merged: MergedColumns) -> list[Damage]:
    """Find units that were merged and whose record is missing now."""
    damage = []
    for unit in output.missing.tolist():
        try:
            was_merged = merged.status(unit) is not None
        except DamagedFile as error:
            damage.append(Damage("columns", unit, str(error.path), error.problem))
            continue
        if was_merged:
            path = str(output.path / record_name(unit))
            damage.append(Damage("unit", unit, path, "is gone, though its unit was merged"))
    return damage
