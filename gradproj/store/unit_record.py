"""A unit's record: committed after its shard; a unit is done if and only if its record exists.

A record is a safetensors file, which any safetensors reader opens, with a crc32c of the whole file
in the header's metadata. So a torn or altered record is always detected.
"""

import errno
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load

from gradproj.errors import DamagedFile, damaged
from gradproj.files import crc32c
from gradproj.storage.contents import read_start
from gradproj.storage.object_path import ObjectPath, names_in
from gradproj.store.hidden_states import HIDDEN_STATE
from gradproj.store.layout import UNITS_DIR, StoreLayout

RECORD_VERSION = 1

# The checksum comes first: 8 hexadecimal digits at a fixed offset, computed with zeros there.
_HEAD = b'{"__metadata__":{"crc32c":"'
_NO_CHECKSUM = b"00000000"
_CHECKSUM_AT = 8 + len(_HEAD)
_ABOUT = ("unit", "start", "identity", "shard", "stats")
_STATS_BYTES = 4096
_GIVEN_UP = b"given up "
GIVEN_UP_BYTES = len(_GIVEN_UP) + 16
MIN_RECORD_BYTES = 64
"""Objects in place of a record with fewer bytes are marks of units that were given up."""
_MAX_HEADER_BYTES = 2**24
_RECORD_NAME = re.compile(r"(\d{8,})\.safetensors")
_SHARD_NAME = re.compile(r"c\.(\d+)\.0")


@dataclass
class UnitRecord:
    """A unit's columns, statistics and covariance sums, and the checksum of its shard."""

    unit: int
    start: int
    """First sample id."""
    identity: str
    """Hash of the settings that the rows depend on."""
    shard: dict[str, int] | None
    """``{"bytes", "crc32c"}`` of the shard file; None if no row of the unit is stored."""
    columns: dict[str, np.ndarray]
    """Every column of ``layout.COLUMNS`` for the unit's rows."""
    stats: dict[str, Any] = field(default_factory=dict)
    """JSON: seconds, tokens, the process that wrote it."""
    token_covariances: dict[str, np.ndarray] = field(default_factory=dict)
    """``a`` and ``s``: each layer's k x k sum over tokens, flat, one after the other."""
    hidden: dict[str, int] | None = None
    """``shard`` of its hidden states; None if there are none."""

    def shard_of(self, layout: StoreLayout) -> dict[str, int] | None:
        """Return what is recorded of the shard of an array, ``sharded_layouts``'s."""
        return self.hidden if layout.array == HIDDEN_STATE else self.shard


def record_name(unit: int) -> str:
    """Return the path of a unit's record, relative to the output directory."""
    return f"{UNITS_DIR}/{unit:08d}.safetensors"


def is_recorded(output: Path, unit: int) -> bool:
    """Return whether the unit has a record."""
    path = output / record_name(unit)
    if not isinstance(path, ObjectPath):
        return path.is_file()
    meta = path.meta()
    return meta is not None and meta["size"] >= MIN_RECORD_BYTES


def list_records(units_dir: Path) -> np.ndarray:
    """Return the units that have a record, sorted int64; none if the folder does not exist."""
    return _units_named(names_in(units_dir, MIN_RECORD_BYTES), _RECORD_NAME)


def list_shards(projections_dir: Path) -> np.ndarray:
    """Return the units that have a shard, recorded or not, sorted int64."""
    return _units_named(names_in(projections_dir), _SHARD_NAME)


def _units_named(names: list[str], pattern: re.Pattern[str]) -> np.ndarray:
    matches = map(pattern.fullmatch, names)
    units = [int(match[1]) for match in matches if match]
    return np.sort(np.array(units, np.int64))


# --- given up, in a bucket ---


def list_given_up(units_dir: Path) -> tuple[set[int], set[int]]:
    """Return the units that were given up and not computed again, and those with a record."""
    recorded = set(list_records(units_dir).tolist())
    return set(_units_named(names_in(units_dir), _RECORD_NAME).tolist()) - recorded, recorded


def given_up_mark(repair: str) -> bytes:
    """Return what takes a record's place in a bucket once its unit was given up.

    ``repair`` are 16 characters that no other repair has. On disk the record is deleted.
    """
    return _GIVEN_UP + repair.encode()


def is_given_up(data: bytes) -> bool:
    """Return whether this is a mark, not a record."""
    return data.startswith(_GIVEN_UP) and len(data) == GIVEN_UP_BYTES


def encode_record(record: UnitRecord) -> bytes:
    """Return the bytes of a record's file."""
    tensors = {f"column.{name}": values for name, values in record.columns.items()}
    tensors |= {f"covariance.{name}": values for name, values in record.token_covariances.items()}
    # Widest types first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    about = {name: getattr(record, name) for name in _ABOUT}
    if record.hidden is not None:
        about["hidden"] = record.hidden
    metadata = {
        "crc32c": _NO_CHECKSUM.decode(),
        "record_version": str(RECORD_VERSION),
        "about": json.dumps(about, allow_nan=False),
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, values in ordered:
        header[name] = {
            "dtype": f"{values.dtype.kind.upper()}{8 * values.dtype.itemsize}",  # F32, U8
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(
        [struct.pack("<Q", len(text)), text, *(values.tobytes() for _, values in ordered)]
    )
    return data[:_CHECKSUM_AT] + b"%08x" % crc32c(data) + data[_CHECKSUM_AT + 8 :]


def decode_record(data: bytes, source: str | Path = "a unit's record") -> UnitRecord:
    """Decode a record, which ``source`` names in errors.

    Raises:
        StoreError: the bytes are not a whole record, or were written by a newer gradproj.
    """
    _check_whole(data, source)
    (header_bytes,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    if int(metadata["record_version"]) > RECORD_VERSION:
        raise DamagedFile(
            source, "was written by a newer gradproj", "Update gradproj to read this store"
        )
    groups: dict[str, dict[str, np.ndarray]] = {"column": {}, "covariance": {}}
    for full_name, values in load(data).items():
        group, name = full_name.split(".", 1)
        groups[group][name] = values
    about = json.loads(metadata["about"])
    return UnitRecord(columns=groups["column"], token_covariances=groups["covariance"], **about)


def read_record(path: Path) -> UnitRecord:
    """Read a record from its file; a FileNotFoundError if there is none."""
    data = path.read_bytes()
    if is_given_up(data):
        raise FileNotFoundError(errno.ENOENT, "the unit was given up", str(path))
    return decode_record(data, path)


def read_stats(path: Path) -> dict[str, Any]:
    """Read a record's ``stats`` from the beginning of its file, without its large columns.

    The checksum is not checked, since that needs the whole file.

    Raises:
        StoreError: the file does not begin like a record.
    """
    data = read_start(path, _STATS_BYTES)
    try:
        (header_bytes,) = struct.unpack_from("<Q", data)
        if header_bytes > len(data) - 8:
            data = read_start(path, 8 + min(header_bytes, _MAX_HEADER_BYTES))
        about = json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"]["about"])
        return dict(about["stats"])
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"it does not begin like a record ({error})") from error


def _check_whole(data: bytes, source: str | Path) -> None:
    after = _CHECKSUM_AT + 8
    checksum = b"%08x" % crc32c(data[:_CHECKSUM_AT] + _NO_CHECKSUM + data[after:])
    if data[8:after] != _HEAD + checksum:
        raise DamagedFile(
            source,
            f"is damaged (torn or altered; {len(data)} bytes)",
            "Delete that file and start the job again: its unit is then computed again, all others "
            "are kept",
        )
