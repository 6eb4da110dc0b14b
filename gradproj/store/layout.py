"""The layout of a store: shard and chunk shapes, columns, status codes, names of its files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import ConfigError, StoreError
from gradproj.flags import Flags, flag
from gradproj.store.chunk_shapes import (
    MAX_CHUNK_ROWS,
    choose_chunk_rows,
    choose_chunk_width,
    choose_rows_per_shard,
    packed_chunk_rows,
    packed_widths,
)

FORMAT_VERSION = 2
"""An attribute of the group, of every new store. A reader refuses a newer version, and reads and
continues version 1."""

# Names in an output directory. That of the corpus index is in corpus/tar/paths.py.

STORE_NAME = "projections.zarr"
GROUP_NAME = "zarr.json"
"""The file in the store that makes it one."""
METADATA_NAME = "metadata.json"
RUN_CONFIG_NAME = "run_config.json"
CHAT_TEMPLATE_NAME = "chat_template.jinja"
STATS_NAME = "projection_stats.json"
FAILED_NAME = "failed.json"
UNITS_DIR = "units"
CLAIMS_DIR = "claims"
HEARTBEATS_DIR = "heartbeats"
PARTIAL_DIR = "partial"
SCRATCH_DIR = "tmp"
LOGS_DIR = "logs"
FOLDERS = (UNITS_DIR, CLAIMS_DIR, HEARTBEATS_DIR, PARTIAL_DIR, SCRATCH_DIR, LOGS_DIR)
PRECONDITIONERS_DIR = "preconditioners"
TEXT_DIR = "text"
CURVATURE_DIR = "curvature"
DOMAINS_DIR = "domains"
COLUMNS_DIR = "columns"
REPORT_NAME = "report.html"
LATER_NAMES = (
    PRECONDITIONERS_DIR, TEXT_DIR, CURVATURE_DIR, DOMAINS_DIR, COLUMNS_DIR, REPORT_NAME,
)  # fmt: skip
"""Further names in the output directory, of commands that read the store."""

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

NAN_BITS = 0x7FC0
"""A NaN of bfloat16."""

STORED_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),  # numpy has no bfloat16; these are its bits
    "float32": np.dtype(np.float32),
}

PACKED_BITS = {"signs": 1, "int2": 2, "int4": 4, "int8": 8}
"""Packed encodings -> bits of a value's code."""
ENCODINGS = (*PACKED_BITS, "dense")
NO_ROW_BYTE = 255
"""Every byte of a packed row that does not exist. Its scales are then NaN, and so is the row."""
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

_COLUMN_ROWS = 2**20


@dataclass(frozen=True, kw_only=True)
class StoreConfig(Flags, title="store"):
    """Form of the stored rows. All of it is part of the store's identity."""

    encoding: str = flag(
        "Form of a stored value: its sign, an integer of 2, 4 or 8 bits, each with one scale a "
        "layer, or dense, a number of --proj_dtype.",
        "dense",
        choices=ENCODINGS,
    )
    proj_dtype: str = flag(
        "Type of dense rows; float16 rows carry a power-of-two scale, so small rows keep 11 bits.",
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding != "dense" and self.proj_dtype != StoreConfig.proj_dtype:
            raise ConfigError(
                f"--proj_dtype {self.proj_dtype} is a type of dense rows, and --encoding "
                f"{self.encoding} stores codes: leave it out, or give --encoding dense"
            )


@dataclass(frozen=True)
class LayerSlice:
    """One layer's ``k_o x k_i`` row-major values: ``[slice_start, slice_end)`` of a decoded row.

    In a stored row they are the elements ``[stored_start, stored_end)``, which ``place_stored``
    sets; those of dense rows are the same.
    """

    name: str
    type: str
    n_i: int
    n_o: int
    k_i: int
    k_o: int
    slice_start: int
    slice_end: int
    stored_start: int = -1
    stored_end: int = -1

    def __post_init__(self) -> None:
        if self.stored_end < 0:
            object.__setattr__(self, "stored_start", self.slice_start)
            object.__setattr__(self, "stored_end", self.slice_end)


@dataclass(frozen=True)
class StoreLayout:
    """Shapes of all arrays of a store; equal in every process that works on it."""

    n_samples: int
    dim: int
    """Values of a decoded row."""
    rows_per_shard: int
    chunk_rows: int
    chunk_width: int
    proj_dtype: str
    """Zarr's type of the array ``projections``: ``uint8`` for packed rows."""
    compressor: str
    key_bytes: int
    column_rows: int
    encoding: str = "dense"
    header_width: int = 0
    """Bytes of a packed row before its first layer; they hold the layers' scales."""
    packed_width: int = 0
    """Bytes of a packed row."""
    hidden_width: int = 0
    """Values of a document's hidden state (``hidden_states.py``); 0 if there are none."""
    array: str = "projections"
    """Name of the sharded array."""

    @property
    def n_units(self) -> int:
        return -(-self.n_samples // self.rows_per_shard)

    @property
    def n_column_blocks(self) -> int:
        return -(-self.n_samples // self.column_rows)

    @property
    def is_packed(self) -> bool:
        return self.encoding != "dense"

    @property
    def stored_width(self) -> int:
        """Elements of a stored row: bytes of a packed one, values of a dense one."""
        return self.packed_width or self.dim

    @property
    def stored_dtype(self) -> np.dtype:
        """The numpy type of stored rows; uint16 bits for bfloat16."""
        return np.dtype(np.uint8) if self.is_packed else STORED_DTYPES[self.proj_dtype]

    @property
    def stored_as(self) -> str:
        """The form of a stored value: the encoding of packed rows, the type of dense ones."""
        return self.encoding if self.is_packed else self.proj_dtype

    @property
    def row_bytes(self) -> int:
        return self.stored_width * self.stored_dtype.itemsize

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return PACKED_BITS.get(self.encoding) or 8 * self.stored_dtype.itemsize

    @property
    def fill(self) -> Any:
        """The element that a row which does not exist is full of; such a row decodes to NaN."""
        nan = NAN_BITS if self.proj_dtype == "bfloat16" else math.nan
        return self.stored_dtype.type(NO_ROW_BYTE if self.is_packed else nan)

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
        return f"{STORE_NAME}/{self.array}/c.{unit}.0"


def column_chunk_path(store_path: Path, name: str, block: int) -> Path:
    """Return the chunk file of a column for a block of rows."""
    return store_path / name / (f"c.{block}.0" if name == "key" else f"c.{block}")


def column_shape(name: str, n_rows: int, key_bytes: int) -> tuple[int, ...]:
    """Return the shape of a column's values for ``n_rows`` rows."""
    return (n_rows, key_bytes) if name == "key" else (n_rows,)


def plan_layout(
    n_samples: int,
    widths: Sequence[int],
    key_bytes: int,
    config: StoreConfig,
    more_bytes: int = 0,
    keeps_sums: bool = False,
    hidden_width: int = 0,
) -> StoreLayout:
    """Plan a store of ``n_samples`` rows; ``widths`` are the layers' ``k_i * k_o`` in row order.

    ``more_bytes`` are those of a packed row that follow the layers' codes. ``keeps_sums``: all of a
    unit's rows may be in memory as float32, so the rows of a unit are chosen for that size too, and
    for its hidden states of ``hidden_width`` values, which always are.

    Raises:
        StoreError: there is nothing to store.
    """
    if n_samples < 1:
        raise StoreError("there is no sample to store: the corpus has no document")
    if not widths or min(widths) < 1:
        raise StoreError(
            f"there is nothing to store in a row: the layers' widths are {list(widths)}"
        )
    dim, proj_dtype, header, packed = sum(widths), config.proj_dtype, 0, 0
    if config.encoding == "dense":
        row_bytes = dim * STORED_DTYPES[proj_dtype].itemsize
        chunk_width, chunk_rows = choose_chunk_width(widths), MAX_CHUNK_ROWS
    else:
        bits, proj_dtype = PACKED_BITS[config.encoding], "uint8"
        header, packed, chunk_width = packed_widths(widths, bits, more_bytes)
        row_bytes, chunk_rows = packed, packed_chunk_rows(chunk_width)
    largest = max(row_bytes, 4 * dim * keeps_sums, 4 * hidden_width)
    rows_per_shard = config.rows_per_shard or choose_rows_per_shard(n_samples, largest)
    n_units = -(-n_samples // rows_per_shard)
    return StoreLayout(
        n_samples=n_samples,
        dim=dim,
        rows_per_shard=rows_per_shard,
        chunk_rows=choose_chunk_rows(rows_per_shard, chunk_rows),
        chunk_width=chunk_width,
        proj_dtype=proj_dtype,
        compressor=config.compressor,
        key_bytes=max(1, key_bytes),
        column_rows=rows_per_shard * min(n_units, max(1, _COLUMN_ROWS // rows_per_shard)),
        encoding=config.encoding,
        header_width=header,
        packed_width=packed,
        hidden_width=hidden_width,
    )


def place_stored(layers: Sequence[LayerSlice], layout: StoreLayout) -> list[LayerSlice]:
    """Return the layers with the places of their elements in a stored row of this layout."""
    if not layout.is_packed:
        return list(layers)
    placed, at = [], layout.header_width
    for layer in layers:
        end = at + -(-layer.k_o * layer.k_i * layout.bits // 8)
        placed.append(replace(layer, stored_start=at, stored_end=end))
        at = end
    return placed


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
