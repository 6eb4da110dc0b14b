"""The layout of a store: shard and chunk shapes, columns, status codes, names of its files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import StoreError
from gradproj.flags import Flags, flag

FORMAT_VERSION = 1
"""An attribute of the group. A reader refuses a newer version."""

# Names in an output directory. That of the corpus index is in corpus/tar/paths.py.

STORE_NAME = "projections.zarr"
METADATA_NAME = "metadata.json"
RUN_CONFIG_NAME = "run_config.json"
STATS_NAME = "projection_stats.json"
FAILED_NAME = "failed.json"
UNITS_DIR = "units"
CLAIMS_DIR = "claims"
HEARTBEATS_DIR = "heartbeats"
PARTIAL_DIR = "partial"
SCRATCH_DIR = "tmp"
LOGS_DIR = "logs"
FOLDERS = (UNITS_DIR, CLAIMS_DIR, HEARTBEATS_DIR, PARTIAL_DIR, SCRATCH_DIR, LOGS_DIR)

STATUS = {
    "missing": 0,
    "ok": 1,
    "empty": 2,
    "no_target": 3,
    "not_selected": 4,
    "non_finite": 5,
    "bad_input": 6,
    "out_of_memory": 7,
}
STATUS_NAMES = {code: name for name, code in STATUS.items()}

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has no bfloat16; these are its bits
    "float32": np.dtype(np.float32),
}

COMPRESSORS = ("none", "blosc", "zstd")

COLUMNS: dict[str, tuple[np.dtype, float]] = {
    "loss": (np.dtype(np.float32), math.nan),
    "n_tokens": (np.dtype(np.int32), 0),
    "domain": (np.dtype(np.int16), -1),
    "grad_norm": (np.dtype(np.float32), math.nan),
    "row_scale": (np.dtype(np.float32), math.nan),
    "tar": (np.dtype(np.int32), -1),
    "key": (np.dtype(np.uint8), 0),
    # Last on purpose: a block's status is written after its other columns, and a row whose status
    # is still 0 is read from its unit's record. So an interrupted merge shows no half-merged row.
    "status": (np.dtype(np.uint8), STATUS["missing"]),
}
"""Column name -> (dtype, fill value). ``key`` is ``[N, key_bytes]``, the others ``[N]``."""

_MAX_SHARD_BYTES = 512_000_000
_MAX_ROWS_PER_SHARD = 4096
_MIN_ROWS_PER_SHARD = 16
_MIN_UNITS = 64
_MAX_CHUNK_ROWS = 512
_COLUMN_ROWS = 2**20


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Flags, title="store"):
    """Form of the stored rows. All of it is part of the store's identity."""

    proj_dtype: str = flag(
        "Type of the stored rows; float16 rows carry a power-of-two scale, so small rows keep 11 "
        "bits.",
        "float16",
        choices=STORED_DTYPES,
    )
    compressor: str = flag(
        "Compression of the rows. They shrink little, and compressed rows cannot be memory-mapped.",
        "none",
        choices=COMPRESSORS,
    )
    rows_per_shard: int = flag(
        "Rows of a shard, which is also one unit of work; 0 = chosen from the store's size.",
        0,
        minimum=1,
        why="leave it out to have it chosen",
    )


@dataclass(frozen=True)
class LayerSlice:
    """One layer's ``k_o x k_i`` row-major values: ``[slice_start, slice_end)`` of a row."""

    name: str
    type: str
    n_i: int
    n_o: int
    k_i: int
    k_o: int
    slice_start: int
    slice_end: int


@dataclass(frozen=True)
class StoreLayout:
    """Shapes of all arrays of a store; equal in every process that works on it."""

    n_samples: int
    dim: int
    rows_per_shard: int
    chunk_rows: int
    chunk_width: int
    proj_dtype: str
    compressor: str
    key_bytes: int
    column_rows: int

    @property
    def n_units(self) -> int:
        return -(-self.n_samples // self.rows_per_shard)

    @property
    def n_column_blocks(self) -> int:
        return -(-self.n_samples // self.column_rows)

    @property
    def stored_dtype(self) -> np.dtype:
        """The numpy type of stored rows; uint16 bits for bfloat16."""
        return STORED_DTYPES[self.proj_dtype]

    def unit_range(self, unit: int) -> tuple[int, int]:
        """Return the first sample id of a unit and the one after its last."""
        return self._ids("unit", unit, self.n_units, self.rows_per_shard)

    def n_samples_in(self, units: np.ndarray) -> int:
        """Return the number of samples of sorted units; the store's last unit may be short."""
        has_last = bool(len(units) and units[-1] == self.n_units - 1)
        short = self.n_units * self.rows_per_shard - self.n_samples
        return len(units) * self.rows_per_shard - short * has_last

    def column_block_range(self, block: int) -> tuple[int, int]:
        """Return the first sample id of a block of column rows and the one after its last."""
        return self._ids("column block", block, self.n_column_blocks, self.column_rows)

    def _ids(self, what: str, number: int, n: int, height: int) -> tuple[int, int]:
        if not 0 <= number < n:
            raise IndexError(f"{what} {number} of a store with {n}")
        return number * height, min((number + 1) * height, self.n_samples)

    def shard_name(self, unit: int) -> str:
        """Return the unit's shard file, relative to the output directory."""
        return f"{STORE_NAME}/projections/c.{unit}.0"


def column_chunk_path(store_path: Path, name: str, block: int) -> Path:
    """Return the chunk file of a column for a block of rows."""
    return store_path / name / (f"c.{block}.0" if name == "key" else f"c.{block}")


def column_shape(name: str, n_rows: int, key_bytes: int) -> tuple[int, ...]:
    """Return the shape of a column's values for ``n_rows`` rows."""
    return (n_rows, key_bytes) if name == "key" else (n_rows,)


def choose_rows_per_shard(n_samples: int, dim: int, itemsize: int) -> int:
    """Return the largest power of two <= 4096 with shards <= 512 MB and >= 64 shards; >= 16."""
    rows = _MAX_ROWS_PER_SHARD
    while rows > _MIN_ROWS_PER_SHARD and (
        rows * dim * itemsize > _MAX_SHARD_BYTES or n_samples < _MIN_UNITS * rows
    ):
        rows //= 2
    return rows


def choose_chunk_width(widths: Sequence[int]) -> int:
    """Return the layers' common width, else their gcd if at least 64, else the whole row's."""
    common = math.gcd(*widths)
    if len(set(widths)) == 1 or common >= 64:
        return common
    return sum(widths)


def plan_layout(
    n_samples: int, widths: Sequence[int], key_bytes: int, config: StoreConfig
) -> StoreLayout:
    """Plan a store of ``n_samples`` rows; ``widths`` are the layers' ``k_i * k_o`` in row order.

    Raises:
        StoreError: there is nothing to store.
    """
    if n_samples < 1:
        raise StoreError("there is no sample to store: the corpus has no document")
    if not widths or min(widths) < 1:
        raise StoreError(
            f"there is nothing to store in a row: the layers' widths are {list(widths)}"
        )
    dim = sum(widths)
    itemsize = STORED_DTYPES[config.proj_dtype].itemsize
    rows_per_shard = config.rows_per_shard or choose_rows_per_shard(n_samples, dim, itemsize)
    n_units = -(-n_samples // rows_per_shard)
    return StoreLayout(
        n_samples=n_samples,
        dim=dim,
        rows_per_shard=rows_per_shard,
        chunk_rows=_choose_chunk_rows(rows_per_shard),
        chunk_width=choose_chunk_width(widths),
        proj_dtype=config.proj_dtype,
        compressor=config.compressor,
        key_bytes=max(1, key_bytes),
        column_rows=rows_per_shard * min(n_units, max(1, _COLUMN_ROWS // rows_per_shard)),
    )


def _choose_chunk_rows(rows_per_shard: int) -> int:
    if rows_per_shard <= _MAX_CHUNK_ROWS:
        return rows_per_shard
    # A shard is a whole number of chunks; chunks of a few rows would make the index as large as
    # the data.
    divisors = (rows for rows in range(_MAX_CHUNK_ROWS, 63, -1) if rows_per_shard % rows == 0)
    return next(divisors, rows_per_shard)


def empty_columns(n_rows: int, key_bytes: int) -> dict[str, np.ndarray]:
    """Return every column for ``n_rows`` missing rows (the fill values)."""
    return {
        name: np.full(column_shape(name, n_rows, key_bytes), fill, dtype)
        for name, (dtype, fill) in COLUMNS.items()
    }


def encode_keys(keys: Sequence[str], key_bytes: int) -> np.ndarray:
    """Return the bytes of WebDataset keys, zero-padded: ``(len(keys), key_bytes)`` uint8.

    They are those of the tar, UTF-8 or not: Python reads other bytes as lone surrogates.

    Raises:
        ValueError: a key is longer.
    """
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    longest = max(map(len, encoded), default=0)
    if longest > key_bytes:
        raise ValueError(f"a key has {longest} bytes, the store holds {key_bytes}")
    padded = b"".join(key.ljust(key_bytes, b"\0") for key in encoded)
    return np.frombuffer(padded, np.uint8).reshape(len(keys), key_bytes)


def decode_key(row: np.ndarray) -> str:
    """Return the key in one row of the ``key`` column, as ``encode_keys`` took it."""
    return row.tobytes().rstrip(b"\0").decode("utf-8", "surrogateescape")
