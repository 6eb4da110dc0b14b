"""What ``verify`` checks: one unit, the merged columns and sums, the files beside them. Damage is returned."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gradproj.coordinator.merge import COVARIANCE_ARRAYS, ranges_of
from gradproj.corpus.index_file import load_index
from gradproj.errors import CorpusError, StoreError
from gradproj.files import file_sum
from gradproj.maintenance.job_output import Output
from gradproj.store.column_reader import read_column_chunk
from gradproj.store.layout import COLUMNS, STATUS, STATUS_NAMES, column_shape
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import UnitRecord, read_record, record_name

_STORED = (STATUS["ok"], STATUS["empty"], STATUS["no_target"])


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: str
    """``unit`` (compute it again), ``rows`` (the same, though its checksums are right), ``columns`` (merge again) or
    ``other``."""
    unit: int | None
    path: str
    what: str


# --- one unit ---


@dataclass
class UnitFindings:
    """What one unit's record and shard hold, and what is wrong with them."""

    record: UnitRecord | None = None
    """None where it is damaged."""
    damage: list[Damage] = field(default_factory=list)
    n_bytes: int = 0
    has_shard: bool = False
    statuses: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Number of rows of each status code."""
    non_finite: list[list[int]] = field(default_factory=list)
    """``[start, stop)`` ranges of sample ids."""


def check_unit(output: Output, unit: int, merged: "MergedColumns") -> UnitFindings:
    """Read a recorded unit's record and shard, and hold them against each other and the merged columns."""
    found = UnitFindings()
    path = output.path / record_name(unit)

    def damaged(where: Path, what: str, kind: str = "unit") -> None:
        found.damage.append(Damage(kind, unit, str(where), what))

    try:
        record = read_record(path)
    except (StoreError, ValueError, KeyError, TypeError) as error:
        # The reader's way out is for one unit; verify says it for all at its end.
        damaged(path, str(error).removeprefix(f"{path} ").split(". Delete that file", 1)[0])
        return found
    except FileNotFoundError:
        damaged(path, "is gone since the folder was listed")
        return found
    found.n_bytes += path.stat().st_size
    wrong = _wrong_in_record(output, unit, record)
    for what in wrong:
        damaged(path, what)
    if wrong:
        return found
    found.record = record
    found.statuses += np.bincount(record.columns["status"], minlength=256)
    not_finite = np.flatnonzero(record.columns["status"] == STATUS["non_finite"]) + record.start
    found.non_finite = ranges_of(not_finite)
    shard = output.path / output.layout.shard_name(unit)
    what, n_bytes = _wrong_in_shard(shard, record)
    found.n_bytes += n_bytes
    found.has_shard = bool(n_bytes)
    if what:
        damaged(shard, what)
    for name, what in merged.differences(unit, record):
        damaged(output.store / name, what, "columns")
    return found


def _wrong_in_record(output: Output, unit: int, record: UnitRecord) -> list[str]:
    """What does not fit in a record whose own checksum does."""
    layout, wrong = output.layout, []
    if record.unit != unit:
        wrong.append(f"is the record of unit {record.unit}")
    if record.identity != output.identity_hash:
        wrong.append(
            f"was made with other settings ({record.identity}, the store has {output.identity_hash})"
        )
    if not output.wants(unit):
        return [*wrong, "is of a unit that this store does not want"]
    start, stop = layout.unit_range(unit)
    if record.start != start:
        wrong.append(f"starts at sample {record.start}, the unit at {start}")
    shapes = {
        name: (dtype, column_shape(name, stop - start, layout.key_bytes))
        for name, (dtype, _) in COLUMNS.items()
    }
    if {name: (v.dtype, v.shape) for name, v in record.columns.items()} != shapes:
        return [*wrong, f"does not hold the columns of {stop - start} documents"]
    status = record.columns["status"]
    if not np.isin(status, list(STATUS_NAMES)).all() or (status == STATUS["missing"]).any():
        wrong.append("has documents without a status")
    if np.isin(status, _STORED).any() and record.shard is None:
        wrong.append("has rows but names no shard")
    ok = status == STATUS["ok"]
    if not (
        np.isfinite(record.columns["grad_norm"][ok]) & np.isfinite(record.columns["row_scale"][ok])
    ).all():
        wrong.append("calls rows ok whose norm or scale is not finite")
    return wrong


def _wrong_in_shard(path: Path, record: UnitRecord) -> tuple[str, int]:
    """What is wrong with a unit's shard ("" = nothing), and how many bytes were read."""
    exists = path.exists()
    if record.shard is None:
        return ("exists, but its record says that no row is stored" if exists else ""), 0
    if not exists:
        return "is gone", 0
    n_bytes = path.stat().st_size
    if n_bytes != record.shard["bytes"]:
        return f"has {n_bytes:,} bytes, its record says {record.shard['bytes']:,}", 0
    found = file_sum(path)
    if found != record.shard:
        return (
            f"has the checksum {found['crc32c']:08x}, its record says {record.shard['crc32c']:08x}",
            n_bytes,
        )
    return "", n_bytes


# --- the merged columns and sums ---


class MergedColumns:
    """The columns as they lie on disk, without what a reader fills in from the records."""

    def __init__(self, output: Output) -> None:
        self._store, self._layout, self._is_merged = output.store, output.layout, output.is_merged

    def status(self, unit: int) -> np.ndarray | None:
        """A unit's merged statuses; None where none were merged."""
        status = self._read("status", unit)
        return status if status is not None and status.any() else None

    def knows(self, unit: int) -> bool:
        """Whether anything of the unit was merged, or cannot be read any more."""
        try:
            return unit < self._layout.n_units and self.status(unit) is not None
        except StoreError:
            return True

    def differences(self, unit: int, record: UnitRecord) -> list[tuple[str, str]]:
        """``(column, what)`` of every column that differs from the record; none where it is not merged yet."""
        try:
            # The merge writes a block's status last, so it is read first.
            if self.status(unit) is None:
                return [("status", "the unit was never merged")] if self._is_merged else []
            return [
                (name, f"differs from the unit's record, first at sample {record.start + first}")
                for name in COLUMNS
                if (first := _first_difference(self._read(name, unit), record.columns[name]))
                is not None
            ]
        except StoreError as error:
            # Without the reader's way out: verify gives one for all damage at its end.
            file, _, what = str(error).split(". Run `", 1)[0].partition(" is damaged: ")
            return [(file.removeprefix(f"{self._store}/"), f"is damaged: {what}")]

    def _read(self, name: str, unit: int) -> np.ndarray | None:
        start, stop = self._layout.unit_range(unit)
        block = start // self._layout.column_rows
        chunk = read_column_chunk(self._store, self._layout, name, block)
        first = start - block * self._layout.column_rows
        return None if chunk is None else chunk[first : first + stop - start]


def _first_difference(merged: np.ndarray | None, recorded: np.ndarray) -> int | None:
    """The first row whose bytes differ."""
    if merged is None:
        return 0
    rows = len(recorded)
    a, b = (np.ascontiguousarray(v).view(np.uint8).reshape(rows, -1) for v in (merged, recorded))
    different = np.flatnonzero((a != b).any(axis=1))
    return int(different[0]) if len(different) else None


class CovarianceSums:
    """The records' token covariances, summed as the merge sums them: float64, in unit order."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, record: UnitRecord | None) -> None:
        """Add a unit's."""
        for name, values in ({} if record is None else record.token_covariances).items():
            if name in self._sums:
                self._sums[name] += values
            else:
                self._sums[name] = values.astype(np.float64)

    def compare(self, output: Output) -> list[Damage]:
        """Which of the store's sums are not the records'."""
        damage = []
        for name, summed in self._sums.items():
            array = COVARIANCE_ARRAYS[name]
            what = _problem_of(partial(_check_sum, output, array, summed))
            if what:
                damage.append(Damage("columns", None, str(output.store / array), what))
        return damage


def _check_sum(output: Output, array: str, summed: np.ndarray) -> None:
    with ProjectionStore(output.path) as store:
        if not np.array_equal(store.array(array), summed):
            raise StoreError("is not the sum of the records' covariances")


# --- the group and the files beside it ---


def check_group(output: Output) -> list[Damage]:
    """The projection matrices, the corpus index and the copy of the metadata."""
    checks: dict[Path, Callable[[], None]] = {
        output.store / "projection_matrices": partial(_check_matrices, output),
        output.path / "corpus.json": partial(_check_index, output),
        output.path / "metadata.json": partial(_check_metadata, output),
    }
    problems = {path: _problem_of(check) for path, check in checks.items()}
    return [
        Damage("other", None, str(path), what.removeprefix(f"{path.absolute()}: "))
        for path, what in problems.items()
        if what
    ]


def _problem_of(check: Callable[[], None]) -> str:
    try:
        check()
    except (StoreError, CorpusError) as error:
        return str(error)
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return ""


def _check_matrices(output: Output) -> None:
    with ProjectionStore(output.path) as store:
        for name, (p_i, p_o) in store.projection_matrices.items():
            if not (np.isfinite(p_i).all() and np.isfinite(p_o).all()):
                raise StoreError(f"holds values of layer {name} that are not finite")


def _check_index(output: Output) -> None:
    index = load_index(output.path / "corpus.json")
    wanted = output.attributes.get("corpus", {}).get("fingerprint")
    if index.fingerprint != wanted:
        raise StoreError(
            f"is the index of another corpus ({index.fingerprint}, the store was made of {wanted})"
        )


def _check_metadata(output: Output) -> None:
    if json.loads((output.path / "metadata.json").read_text()) != output.attributes:
        raise StoreError(
            "is not a copy of the store's attributes; `python -m gradproj merge` writes it again"
        )
