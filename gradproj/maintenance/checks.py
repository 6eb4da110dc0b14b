"""The checks of ``verify``: units, merged columns and sums, and the files beside them.

Damage is returned, not raised.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from gradproj.coordinator.merge import COVARIANCE_ARRAYS, ranges_of
from gradproj.corpus.index_file import load_index
from gradproj.corpus.tar.paths import INDEX_NAME
from gradproj.errors import CorpusError, DamagedFile, StoreError
from gradproj.maintenance.job_output import Output
from gradproj.storage.contents import read_start, sum_of
from gradproj.store.array_digests import check_digests
from gradproj.store.column_reader import read_column_chunk
from gradproj.store.head_rows import HEAD_MATRIX, HEAD_SCALE
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layout import COLUMNS, METADATA_NAME, STATUS, STATUS_NAMES, column_shape
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import (
    GIVEN_UP_BYTES,
    UnitRecord,
    is_given_up,
    read_record,
    record_name,
)

_STORED = (STATUS["ok"], STATUS["empty"], STATUS["no_target"])


@dataclass(frozen=True)
class Damage:
    """One file that differs from what was committed."""

    kind: str
    """Way to repair it. ``unit``: computing the unit again. ``rows``: the same, for rows that are
    wrong under right checksums. ``columns``: merging again. ``other``: neither."""
    unit: int | None
    path: str
    what: str


# --- one unit ---


@dataclass
class UnitFindings:
    """Content and damage of one unit's record and shard."""

    record: UnitRecord | None = None
    """None if it is damaged."""
    damage: list[Damage] = field(default_factory=list)
    n_bytes: int = 0
    has_shard: bool = False
    statuses: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    """Number of rows of each status code."""
    non_finite: list[list[int]] = field(default_factory=list)
    """``[start, stop)`` ranges of sample ids."""


def check_unit(output: Output, unit: int, merged: "MergedColumns") -> UnitFindings:
    """Read a unit's record and shard and compare them with each other and the merged columns."""
    findings = UnitFindings()
    path = output.path / record_name(unit)

    def damaged(where: Path, what: str, kind: str = "unit") -> None:
        findings.damage.append(Damage(kind, unit, str(where), what))

    try:
        record = read_record(path)
    except DamagedFile as error:
        # Without its way out, which is for one unit: verify prints one for all units at its end.
        damaged(path, error.problem)
        return findings
    except (ValueError, KeyError, TypeError) as error:
        damaged(path, str(error))
        return findings
    except FileNotFoundError:
        damaged(path, "was deleted since the directory was listed")
        return findings
    findings.n_bytes += path.stat().st_size
    problems = _record_problems(output, unit, record)
    for problem in problems:
        damaged(path, problem)
    if problems:
        return findings
    findings.record = record
    findings.statuses += np.bincount(record.columns["status"], minlength=256)
    not_finite = np.flatnonzero(record.columns["status"] == STATUS["non_finite"]) + record.start
    findings.non_finite = ranges_of(not_finite)
    for layout in sharded_layouts(output.layout):
        shard = output.path / layout.shard_name(unit)
        problem, n_bytes = _shard_problem(shard, record.shard_of(layout))
        findings.n_bytes += n_bytes
        findings.has_shard = bool(n_bytes)  # that of the rows comes last
        if problem:
            damaged(shard, problem)
    for name, problem in merged.differences(unit, record):
        damaged(output.store / name, problem, "columns")
    return findings


def _record_problems(output: Output, unit: int, record: UnitRecord) -> list[str]:
    """Return what is wrong in a record whose own checksum is right."""
    layout, problems = output.layout, []
    if record.unit != unit:
        problems.append(f"is the record of unit {record.unit}")
    if record.identity != output.identity_hash:
        problems.append(
            f"was made with other settings ({record.identity}, "
            f"the store has {output.identity_hash})"
        )
    if not output.wants(unit):
        return [*problems, "is of a unit that this store does not want"]
    start, stop = layout.unit_range(unit)
    if record.start != start:
        problems.append(f"starts at sample {record.start}, the unit at {start}")
    shapes = {
        name: (dtype, column_shape(name, stop - start, layout.key_bytes))
        for name, (dtype, _) in COLUMNS.items()
    }
    if {name: (v.dtype, v.shape) for name, v in record.columns.items()} != shapes:
        return [*problems, f"does not hold the columns of {stop - start} documents"]
    status = record.columns["status"]
    if not np.isin(status, list(STATUS_NAMES)).all() or (status == STATUS["missing"]).any():
        problems.append("has documents without a status")
    if np.isin(status, _STORED).any() and record.shard is None:
        problems.append("has rows but names no shard")
    if layout.hidden_width and (record.hidden is None) != (record.shard is None):
        problems.append("names one of the shards of rows and hidden states, not both")
    ok = status == STATUS["ok"]
    if not all(np.isfinite(record.columns[name][ok]).all() for name in ("grad_norm", "row_scale")):
        problems.append("has ok rows whose norm or scale is not finite")
    return problems


def _shard_problem(path: Path, recorded: dict[str, int] | None) -> tuple[str, int]:
    """Return what is wrong with a unit's shard ("" = nothing), and the number of bytes read.

    ``recorded`` is what the unit's record says of it.
    """
    exists = path.exists()
    if recorded is None:
        is_odd = exists and not _is_free(path)
        return ("exists, but its record says that no row is stored" if is_odd else ""), 0
    if not exists:
        return "is gone", 0
    n_bytes = path.stat().st_size
    if n_bytes != recorded["bytes"]:
        return f"has {n_bytes:,} bytes, its record says {recorded['bytes']:,}", 0
    on_disk = sum_of(path)
    if on_disk == recorded:
        return "", n_bytes
    checksums = f"{on_disk['crc32c']:08x}, its record says {recorded['crc32c']:08x}"
    return f"has the checksum {checksums}", n_bytes


def _is_free(path: Path) -> bool:
    """Return whether a shard has no rows because its unit was given up in a bucket."""
    return is_given_up(read_start(path, GIVEN_UP_BYTES))


# --- the merged columns and sums ---


class MergedColumns:
    """The columns on disk, without the values that a reader fills in from the records."""

    def __init__(self, output: Output) -> None:
        self._store, self._layout, self._is_merged = output.store, output.layout, output.is_merged

    def status(self, unit: int) -> np.ndarray | None:
        """Return a unit's merged statuses; None if it was never merged."""
        status = self._read("status", unit)
        return status if status is not None and status.any() else None

    def has(self, unit: int) -> bool:
        """Return whether the unit was merged. True also if its status cannot be read any more."""
        try:
            return unit < self._layout.n_units and self.status(unit) is not None
        except StoreError:
            return True

    def differences(self, unit: int, record: UnitRecord) -> list[tuple[str, str]]:
        """Return ``(column, problem)`` of every column that differs from the record.

        None differs if the unit is not merged yet.
        """
        try:
            # The merge writes a block's status last, so it is read first.
            if self.status(unit) is None:
                return [("status", "the unit was never merged")] if self._is_merged else []
            differences = []
            for name in COLUMNS:
                first = _first_difference(self._read(name, unit), record.columns[name])
                if first is not None:
                    sample = record.start + first
                    problem = f"differs from the unit's record, first at sample {sample}"
                    differences.append((name, problem))
            return differences
        except DamagedFile as error:
            return [(str(error.path.relative_to(self._store)), error.problem)]

    def _read(self, name: str, unit: int) -> np.ndarray | None:
        start, stop = self._layout.unit_range(unit)
        block = start // self._layout.column_rows
        chunk = read_column_chunk(self._store, self._layout, name, block)
        first = start - block * self._layout.column_rows
        return None if chunk is None else chunk[first : first + stop - start]


def _first_difference(merged: np.ndarray | None, recorded: np.ndarray) -> int | None:
    """Return the first row whose bytes differ; None if none does."""
    if merged is None:
        return 0
    rows = len(recorded)
    a, b = (np.ascontiguousarray(v).view(np.uint8).reshape(rows, -1) for v in (merged, recorded))
    different = np.flatnonzero((a != b).any(axis=1))
    return int(different[0]) if len(different) else None


def check_sums(output: Output, sums: dict[str, np.ndarray]) -> list[Damage]:
    """Compare the store's token covariances with the sums of all records, added in unit order."""
    arrays = {COVARIANCE_ARRAYS[name]: values for name, values in sums.items()}
    return _found(
        "columns",
        {output.store / a: partial(_check_sum, output, a, values) for a, values in arrays.items()},
    )


def _check_sum(output: Output, array: str, summed: np.ndarray) -> None:
    with ProjectionStore(output.path) as store:
        if not np.array_equal(store.array(array), summed):
            raise StoreError("is not the sum of the records' covariances")


# --- the group and the files beside it ---


def check_group(output: Output) -> list[Damage]:
    """Check the matrices and bases, the corpus index and the copy of the metadata."""
    return _found(
        "other",
        {
            output.store / "projection_matrices": partial(_check_matrices, output),
            output.store / "basis_matrices": partial(_check_basis, output, "basis"),
            output.store / "basis_eigenvalues": partial(_check_basis, output, "basis_eigenvalues"),
            output.store / HEAD_MATRIX: partial(_check_head, output, HEAD_MATRIX),
            output.store / HEAD_SCALE: partial(_check_head, output, HEAD_SCALE),
            output.path / INDEX_NAME: partial(_check_index, output),
            output.path / METADATA_NAME: partial(_check_metadata, output),
        },
    )


def _found(kind: str, checks: dict[Path, Callable[[], None]]) -> list[Damage]:
    """Run the checks of files, and return the errors that they raise."""
    damage = []
    for path, check in checks.items():
        try:
            check()
        except (StoreError, CorpusError) as error:
            problem = str(error).removeprefix(f"{path.absolute()}: ")
        except (OSError, ValueError) as error:
            problem = f"cannot be read: {error}"
        else:
            continue
        damage.append(Damage(kind, None, str(path), problem))
    return damage


def _check_matrices(output: Output) -> None:
    with ProjectionStore(output.path) as store:
        for name, (p_i, p_o) in store.projection_matrices.items():
            if not (np.isfinite(p_i).all() and np.isfinite(p_o).all()):
                raise StoreError(f"holds values of layer {name} that are not finite")


def _check_basis(output: Output, member: str) -> None:
    with ProjectionStore(output.path) as store:
        for name, pair in (getattr(store, member) or {}).items():
            if not all(np.isfinite(part).all() for part in pair):
                raise StoreError(f"holds values of layer {name} that are not finite")
        check_digests(store, "basis_matrices" if member == "basis" else member)


def _check_head(output: Output, name: str) -> None:
    with ProjectionStore(output.path) as store:
        if store.head is None:
            return
        values, segment = store.array(name), store.head.segment
        sizes = {HEAD_MATRIX: len(values) % segment.k, HEAD_SCALE: len(values) - segment.vocabulary}
        if not len(values) or sizes[name]:
            raise StoreError(f"has {len(values):,} values, which are not those of {segment}")
        if not np.isfinite(values).all() or (name == HEAD_SCALE and (values <= 0).any()):
            raise StoreError("holds values that are not finite, or scales that are not positive")
        check_digests(store, name)


def _check_index(output: Output) -> None:
    index = load_index(output.path / INDEX_NAME)
    wanted = output.attributes.get("corpus", {}).get("fingerprint")
    if index.fingerprint != wanted:
        raise StoreError(
            f"is the index of another corpus ({index.fingerprint}, the store's is {wanted})"
        )


def _check_metadata(output: Output) -> None:
    if json.loads((output.path / METADATA_NAME).read_text()) != output.attributes:
        raise StoreError(
            "is not a copy of the store's attributes; `python -m gradproj merge` writes it again"
        )
