"""``python -m gradproj verify``: every checksum of a store again, records against shards, columns against records."""

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gradproj.errors import ConfigError, StoreError
from gradproj.formatting import shown
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.checks import (
    CovarianceSums,
    Damage,
    MergedColumns,
    UnitFindings,
    check_group,
    check_unit,
)
from gradproj.maintenance.job_output import Output, read_output
from gradproj.store.layout import STATUS_NAMES
from gradproj.store.unit_record import record_name

SOUND, DAMAGED, INCOMPLETE = 0, 1, 3
"""Exit codes; 2 is a user's mistake, as everywhere."""

MOST_RANGES_KEPT = 1000
READERS = 4
"""Units checked at once: one stream alone does not fill a network file system."""


_SHARD_NAME = re.compile(r"c\.(\d+)\.0")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(RecordedRunArgs):
    """What to check, what to do about damage, and how to say it; the model is needed for ``--recompute`` only."""

    repair: bool = field(
        default=False,
        metadata={
            "help": "turn damaged units into missing ones, which the job's next start computes again"
        },
    )
    recompute: int = field(
        default=0,
        metadata={
            "help": "compute so many random rows again with the recorded model, and compare them"
        },
    )
    seed: int = field(default=0, metadata={"help": "of the choice of those rows"})
    checksums: bool = field(
        default=True, metadata={"help": "read the whole store; without, only --recompute is done"}
    )
    as_json: bool = field(
        default=False, metadata={"flag": "json", "help": "one JSON object for scripts"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recompute < 0:
            raise ConfigError(f"--recompute must be at least 1 row, got {self.recompute}")
        if not self.checksums and not self.recompute:
            raise ConfigError(
                "--no-checksums leaves nothing to do: give --recompute K, or leave it out"
            )
        if not self.checksums and self.repair:
            raise ConfigError("--repair needs the checksums: leave --no-checksums out")


@dataclass
class BoundedRanges:
    """Sample ids as ranges: the first thousand of them, and how many ids there are in all."""

    n_ids: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    """``[start, stop)``, in order."""

    def add(self, start: int, stop: int) -> None:
        """Add ids after all that were added before."""
        self.n_ids += stop - start
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1][1] = stop
        elif len(self.ranges) < MOST_RANGES_KEPT:
            self.ranges.append([start, stop])


@dataclass
class Verification:
    """What was found. ``asdict`` of it is what ``--json`` prints."""

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
    """Units being committed, or left by a killed process; they count for nothing."""
    damage: list[Damage] = field(default_factory=list)

    @property
    def damaged_units(self) -> set[int]:
        """Units whose record or shard is damaged."""
        return self._units_of("unit")

    @property
    def wrong_units(self) -> set[int]:
        """Units with rows that came out otherwise when they were computed again, under right checksums."""
        return self._units_of("rows")

    def _units_of(self, kind: str) -> set[int]:
        return {d.unit for d in self.damage if d.kind == kind and d.unit is not None}

    @property
    def exit_code(self) -> int:
        """0 sound and complete, 3 sound and incomplete, 1 damaged."""
        if self.damage:
            return DAMAGED
        return SOUND if self.complete else INCOMPLETE


def verify(path: str | Path, *, checksums: bool = True) -> Verification:
    """Check everything in OUTPUT that was committed; writes nothing. Memory holds a few units.

    Args:
        path: OUTPUT.
        checksums: False only counts what is committed and what is missing.

    Raises:
        StoreError: there is no job's output there. Damage inside it is not raised but returned.
    """
    started = time.monotonic()
    output = read_output(path)
    found = Verification(
        output=str(output.path),
        complete=not len(output.missing) and output.is_merged,
        n_units=len(output.wanted),
        n_records=len(output.recorded),
    )
    found.missing = _bounded(output.id_ranges(output.missing))
    if not checksums:
        return found
    merged = MergedColumns(output)
    covariances = CovarianceSums()
    statuses = np.zeros(256, np.int64)
    for unit in _checked_units(output, merged):
        found.damage += unit.damage
        found.n_bytes += unit.n_bytes
        found.n_shards += unit.has_shard
        statuses += unit.statuses
        for start, stop in unit.non_finite:
            found.non_finite.add(start, stop)
        covariances.add(unit.record)
    found.by_status = {
        STATUS_NAMES.get(code, str(code)): int(n) for code, n in enumerate(statuses) if n
    }
    found.shards_without_record = _shards_without_record(output)
    found.damage += _merged_without_record(output, merged)
    if found.complete and not found.damage:
        found.damage += covariances.compare(output)
    found.damage += check_group(output)
    found.seconds = round(time.monotonic() - started, 3)
    return found


def _checked_units(output: Output, merged: "MergedColumns") -> Iterator[UnitFindings]:
    """The findings of every recorded unit, in unit order; several units are read at once."""
    units = output.recorded.tolist()
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="verify")
    try:
        found = pool.map(lambda unit: check_unit(output, unit, merged), units)
        yield from shown(found, len(units), "verify", "units")
    finally:
        pool.shutdown(cancel_futures=True)


def _merged_without_record(output: Output, merged: MergedColumns) -> list[Damage]:
    """Units whose rows the columns know and whose record has gone."""
    damage = []
    for unit in output.missing.tolist():
        try:
            lost = merged.status(unit) is not None
        except StoreError as error:
            damage.append(Damage("columns", unit, str(output.store), str(error)))
            continue
        if lost:
            path = str(output.path / record_name(unit))
            damage.append(Damage("unit", unit, path, "is gone, though its unit was merged"))
    return damage


def _shards_without_record(output: Output) -> list[int]:
    with os.scandir(output.store / "projections") as entries:
        matches = (_SHARD_NAME.fullmatch(entry.name) for entry in entries)
        units = np.sort(np.array([int(match[1]) for match in matches if match], np.int64))
    return np.setdiff1d(units, output.recorded).tolist()


def _bounded(ranges: list[list[int]]) -> BoundedRanges:
    bounded = BoundedRanges()
    for start, stop in ranges:
        bounded.add(start, stop)
    return bounded
