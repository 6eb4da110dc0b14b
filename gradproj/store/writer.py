"""Writes stores: the empty group, the bytes of a shard, column blocks. Each file has one writer.

Shards are written by hand: chunks in C order, then the index with its crc32c. Any Zarr v3 reader
opens them, they can be memory-mapped, and the caller decides how to flush and publish the file.
(zarr-python writes Morton order, at a third of the speed.)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from gradproj.errors import StoreError
from gradproj.files import crc32c
from gradproj.storage.folders import tree_exists
from gradproj.storage.publish import Publisher, publisher_of
from gradproj.store.bfloat16 import BFloat16
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layer_arrays import pack_layers
from gradproj.store.layout import (
    COLUMNS,
    FORMAT_VERSION,
    GROUP_NAME,
    LayerSlice,
    StoreLayout,
    column_chunk_path,
    column_shape,
)
from gradproj.store.metadata import check_packed, layers_of

_FLAT_KEYS = {"name": "default", "separator": "."}  # "c.12.0": all shards lie in one folder
_EMPTY_CHUNK = 2**64 - 1
_MATRIX_CHUNK_VALUES = 2**22
_BLOSC_LEVEL = 5
_ZSTD_LEVEL = 3


class StoreExists(StoreError):
    """There is a store at this path already; another process may just have made it."""


def shard_chunks(
    stored: np.ndarray, layout: StoreLayout, before_index: bytes = b""
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of one shard file in order, a row of inner chunks at a time.

    The last chunks are padded with the layout's fill; chunks without any row are left out and
    marked as absent in the index. ``stored`` is ``(n, stored width)`` with n <= rows per shard,
    encoded by ``RowEncoder``, and missing rows among them are full of the fill already.
    ``before_index`` are bytes between the chunks and the index, where no reader looks.

    Raises:
        ValueError: the shape or type is not the layout's.
    """
    n_rows, width = stored.shape
    if (
        width != layout.stored_width
        or n_rows > layout.rows_per_shard
        or stored.dtype != layout.stored_dtype
    ):
        raise ValueError(f"{stored.dtype} {stored.shape} is no shard of {layout}")
    height, n_across = layout.chunk_rows, width // layout.chunk_width
    index = np.full((layout.rows_per_shard // height, n_across, 2), _EMPTY_CHUNK, "<u8")
    encoder, _ = _compressors(layout)
    offset = 0
    for band, start in enumerate(range(0, n_rows, height)):
        rows = stored[start : start + height]
        tiles = _band_tiles(rows, n_across, layout)
        if encoder is None:
            sizes = np.full(n_across, height * layout.chunk_width * stored.itemsize, np.uint64)
            yield tiles.view(np.uint8).reshape(-1).data
        else:
            encoded = [encoder.encode(tile) for tile in tiles]
            sizes = np.array([len(chunk) for chunk in encoded], np.uint64)
            yield from encoded
        index[band, :, 0] = offset + np.cumsum(sizes) - sizes
        index[band, :, 1] = sizes
        offset += int(sizes.sum())
    tail = index.tobytes()
    if before_index:
        yield before_index
    yield tail + crc32c(tail).to_bytes(4, "little")


def free_shard(layout: StoreLayout, mark: bytes) -> bytes:
    """Return a shard without any row, which begins with ``mark``: to readers all are missing."""
    return mark + b"".join(
        shard_chunks(np.empty((0, layout.stored_width), layout.stored_dtype), layout)
    )


def _band_tiles(rows: np.ndarray, n_across: int, layout: StoreLayout) -> np.ndarray:
    """Split up to ``chunk_rows`` rows into chunks ``(n_across, chunk_rows, chunk_width)``."""
    shape = (n_across, layout.chunk_rows, layout.chunk_width)
    whole = len(rows) == layout.chunk_rows
    tiles = np.empty(shape, layout.stored_dtype)
    if not whole:
        tiles[...] = layout.fill
    tiles[:, : len(rows)] = rows.reshape(len(rows), n_across, layout.chunk_width).transpose(1, 0, 2)
    return tiles


def _compressors(layout: StoreLayout) -> tuple[Any, BloscCodec | ZstdCodec | None]:
    """Return numcodecs' compressor, which writes chunks, and zarr's codec with its settings."""
    if layout.compressor == "blosc":
        settings: dict[str, Any] = {"cname": "zstd", "clevel": _BLOSC_LEVEL}
        settings["typesize"] = layout.stored_dtype.itemsize
        compressor = numcodecs.Blosc(shuffle=numcodecs.Blosc.SHUFFLE, **settings)
        return compressor, BloscCodec(shuffle="shuffle", **settings)
    if layout.compressor == "zstd":
        return numcodecs.Zstd(level=_ZSTD_LEVEL), ZstdCodec(level=_ZSTD_LEVEL)
    return None, None


def create_store(
    path: Path,
    layout: StoreLayout,
    attributes: Mapping[str, Any],
    matrices: np.ndarray,
    publisher: Publisher | None = None,
    extra_columns: tuple[str, ...] = (),
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Make the whole Zarr group at ``path``, without rows, and publish it at once.

    ``attributes`` are JSON without NaN; readers need ``layers`` (dicts of ``LayerSlice``, placed by
    ``place_stored``) and ``domains`` (names). ``matrices`` are packed by ``pack_matrices``.
    ``publisher`` is the process's own (default: one with unpublished files beside ``path``).
    ``extra_columns`` are int64, with the fill value -1. ``arrays`` are further flat arrays, such as
    those of the basis, packed by ``pack_layers``.

    Raises:
        StoreExists: there is a store already, or another process published one meanwhile.
        StoreError: the disk is full, read-only or not the user's.
    """
    if tree_exists(path, GROUP_NAME):
        raise StoreExists(f"{path} exists already")
    encoding = {
        "name": layout.encoding,
        "bits": layout.bits,
        "header_bytes": layout.header_width,
    }
    attributes = {"format_version": FORMAT_VERSION, "encoding": encoding} | dict(attributes)
    if layout.is_packed:
        check_packed(layout, layers_of(attributes))
    json.dumps(attributes, allow_nan=False)  # other readers refuse NaN, so fail early
    flat = {"projection_matrices": matrices.astype(np.float32, copy=False)}
    files = _group_files(layout, attributes, flat | dict(arrays or {}), extra_columns)
    if not (publisher or publisher_of(path)).create_tree(path, files, GROUP_NAME):
        raise StoreExists(f"{path} exists already: another process has just made it")


def _group_files(
    layout: StoreLayout,
    attributes: dict[str, Any],
    flat_arrays: Mapping[str, np.ndarray],
    extra_columns: tuple[str, ...],
) -> dict[str, bytes]:
    """Return the files of a group without rows, name -> content."""
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=attributes)
    for each in sharded_layouts(layout):
        name = "value" if each.array == layout.array else f"{each.array}_value"
        group.create_array(
            each.array,
            shape=(each.n_samples, each.stored_width),
            dtype=BFloat16() if each.proj_dtype == "bfloat16" else each.proj_dtype,
            shards=(each.rows_per_shard, each.stored_width),
            chunks=(each.chunk_rows, each.chunk_width),
            compressors=_compressors(each)[1],
            fill_value=int(each.fill) if each.is_packed else float("nan"),
            chunk_key_encoding=_FLAT_KEYS,  # type: ignore[arg-type]
            dimension_names=("sample", "byte" if each.is_packed else name),
        )
    extra = dict.fromkeys(extra_columns, (np.dtype(np.int64), -1))
    for name, (dtype, fill) in (COLUMNS | extra).items():
        group.create_array(
            name,
            shape=column_shape(name, layout.n_samples, layout.key_bytes),
            dtype=dtype,
            chunks=column_shape(name, layout.column_rows, layout.key_bytes),
            compressors=None,
            fill_value=fill,
            chunk_key_encoding=_FLAT_KEYS,  # type: ignore[arg-type]
            dimension_names=("sample", "key_byte") if name == "key" else ("sample",),
        )
    for name, values in flat_arrays.items():
        _add_array(group, name, values)
    return _contents(files)


def _contents(files: Mapping[str, Any]) -> dict[str, bytes]:
    """Return what zarr put into a store in memory.

    zarr's own store on disk needs hard links, which not all file systems have. It would also
    recreate a folder after another process has moved it away to fence this one off.
    """
    return {name: content.to_bytes() for name, content in files.items()}


def _add_array(group: zarr.Group, name: str, values: np.ndarray) -> None:
    """Add a small flat array."""
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, min(len(values), _MATRIX_CHUNK_VALUES)),),
        compressors=None,
        chunk_key_encoding=_FLAT_KEYS,  # type: ignore[arg-type]
        dimension_names=(f"{name}_value",),
    )
    if values.size:
        array[...] = values


def write_array(
    store_path: Path, name: str, values: np.ndarray, publisher: Publisher | None = None
) -> None:
    """Add or replace a small flat array in the group, such as a covariance sum.

    Only one process may do so at a time. On disk a reader sees the old array, the new one or, for
    an instant, none; in a bucket for an instant chunks of both.
    """
    files: dict[str, Any] = {}
    _add_array(zarr.create_group(MemoryStore(files)), name, values)
    inner = {
        key.removeprefix(f"{name}/"): content
        for key, content in _contents(files).items()
        if key.startswith(f"{name}/")
    }
    (publisher or publisher_of(store_path)).replace_tree(store_path / name, inner)


def pack_matrices(
    layers: list[LayerSlice], matrices: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Join every layer's ``P_i (k_i, n_i)`` and ``P_o (k_o, n_o)``, in order, to flat float32."""
    return pack_layers("projection_matrices", layers, matrices)


def write_column_block(
    store_path: Path,
    layout: StoreLayout,
    block: int,
    columns: Mapping[str, np.ndarray],
    publisher: Publisher | None = None,
) -> None:
    """Replace a block's chunk of some or all columns: rows ``layout.column_block_range(block)``.

    Each file is replaced as a whole. ``status`` is written last, since a row counts as merged once
    its status is not 0.

    ``columns`` holds the values of every row of the block, in the column's type.

    Raises:
        ValueError: an unknown column, or values of another shape or type.
    """
    start, stop = layout.column_block_range(block)
    unknown = set(columns) - set(COLUMNS)
    publisher = publisher or publisher_of(store_path)
    if unknown:
        raise ValueError(f"no such columns: {sorted(unknown)}")
    for name in (name for name in COLUMNS if name in columns):
        values = columns[name]
        dtype, fill = COLUMNS[name]
        shape = column_shape(name, stop - start, layout.key_bytes)
        if values.dtype != dtype or values.shape != shape:
            raise ValueError(
                f"column {name} of block {block} is {values.dtype} {values.shape}, not {dtype} "
                f"{shape}"
            )
        # Zarr keeps the last chunk at full size.
        chunk = np.full(column_shape(name, layout.column_rows, layout.key_bytes), fill, dtype)
        chunk[: stop - start] = values
        path = column_chunk_path(store_path, name, block)
        publisher.replace(path, [chunk.view(np.uint8).reshape(-1).data])


def update_attributes(
    store_path: Path,
    changes: Mapping[str, Any],
    publisher: Publisher | None = None,
    ends_merge: bool = False,
) -> None:
    """Set attributes of the group and keep the others; the file is replaced atomically.

    Only one process may do so at a time. Values are JSON without NaN (ValueError). ``ends_merge``:
    the mark of ``mark_merger`` goes.
    """

    def changed(content: bytes) -> bytes:
        metadata = json.loads(content)
        metadata["attributes"] = metadata.get("attributes", {}) | dict(changes)
        if ends_merge:
            metadata["attributes"] = without_merger(metadata["attributes"])
        return json.dumps(metadata, indent=2, allow_nan=False).encode()

    (publisher or publisher_of(store_path)).update(store_path / GROUP_NAME, changed)


_MERGER = "merger"


def mark_merger(store_path: Path, name: str, publisher: Publisher) -> None:
    """Take the group's attributes over from an earlier merger, in a bucket."""

    def marked(content: bytes) -> bytes:
        metadata = json.loads(content)
        metadata["attributes"] = {**metadata.get("attributes", {}), _MERGER: name}
        return json.dumps(metadata, indent=2, allow_nan=False).encode()

    publisher.take(store_path / GROUP_NAME, marked)


def without_merger(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes without the mark of a merge that runs, or ended before its time."""
    return {name: value for name, value in attributes.items() if name != _MERGER}
