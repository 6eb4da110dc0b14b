"""Small outputs for the tests of the store, made with the public functions that a job uses.

``READER_CASES`` has a store of each kind that the reader must read alike.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import zarr
from helpers.encoding import decode, encode

from gradproj.files import publish_exclusively, temporary_beside, write_file_durably
from gradproj.store.append_store import AppendStore, create_row_store
from gradproj.store.layout import (
    STATUS,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    encode_keys,
    place_stored,
    plan_layout,
)
from gradproj.store.unit_record import UnitRecord, encode_record, record_name
from gradproj.store.writer import create_store, pack_matrices, shard_chunks, write_column_block

DOMAINS = ["ArXiv", "Github"]


def make_layers(widths: list[tuple[int, int]]) -> list[LayerSlice]:
    """Return layers of the given ``(k_o, k_i)``."""
    layers, at = [], 0
    for number, (k_o, k_i) in enumerate(widths):
        end = at + k_o * k_i
        layers.append(LayerSlice(f"h.{number}.mlp", "Linear", k_i + 3, k_o + 2, k_i, k_o, at, end))
        at = end
    return layers


def make_rows(n_samples: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return rows of magnitudes from 1e-12 to 1e12."""
    generator = np.random.default_rng(seed)
    sizes = 10.0 ** generator.uniform(-12, 12, (n_samples, 1))
    return (generator.standard_normal((n_samples, dim)) * sizes).astype(np.float32)


def make_columns(
    layout: StoreLayout, start: int, stop: int, row_scale: np.ndarray
) -> dict[str, np.ndarray]:
    """Return columns whose values depend on the sample id."""
    columns = empty_columns(stop - start, layout.key_bytes)
    ids = np.arange(start, stop)
    columns["loss"][:] = ids / 8
    columns["n_tokens"][:] = ids + 1
    columns["domain"][:] = ids % 3 - 1
    columns["status"][:] = STATUS["ok"]
    columns["grad_norm"][:] = ids / 4
    columns["row_scale"][:] = row_scale
    columns["tar"][:] = ids // 7
    columns["key"][:] = encode_keys([f"é{sample_id}" for sample_id in ids], layout.key_bytes)
    return columns


class Output:
    """An output directory with a store for ``rows``; tests commit and merge its units."""

    def __init__(
        self,
        path: Path,
        n_samples: int = 70,
        widths: tuple[tuple[int, int], ...] = ((2, 3), (2, 3)),
        config: StoreConfig | None = None,
        layout: StoreLayout | None = None,
    ) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "units").mkdir()
        self.layers = make_layers(list(widths))
        config = config or StoreConfig(encoding="dense", rows_per_shard=16)
        self.layout = layout or plan_layout(
            n_samples, [k_o * k_i for k_o, k_i in widths], 8, config
        )
        self.rows = make_rows(n_samples, self.layout.dim)
        self.layers = place_stored(self.layers, self.layout)
        self.stored, self.row_scale = encode(self.rows, self.layout, self.layers)
        self.matrices = {
            layer.name: (make_rows(layer.k_i, layer.n_i, 1), make_rows(layer.k_o, layer.n_o, 2))
            for layer in self.layers
        }
        attributes = {
            "layers": [asdict(layer) for layer in self.layers],
            "domains": DOMAINS,
            "note": "kept",
        }
        create_store(
            self.store_path, self.layout, attributes, pack_matrices(self.layers, self.matrices)
        )

    def decoded(self) -> np.ndarray:
        """Return the rows that every reader must return, decoded by the definition."""
        return decode(self.stored, self.row_scale, self.layout, self.layers)

    @property
    def store_path(self) -> Path:
        return self.path / "projections.zarr"

    def commit(self, unit: int, with_shard: bool = True) -> None:
        """Publish a unit's shard and record like a job."""
        start, stop = self.layout.unit_range(unit)
        shard = None
        if with_shard:
            final = self.path / self.layout.shard_name(unit)
            tmp = temporary_beside(final)
            shard = write_file_durably(tmp, shard_chunks(self.stored[start:stop], self.layout))
            assert publish_exclusively(tmp, final)
        columns = make_columns(self.layout, start, stop, self.row_scale[start:stop])
        record = UnitRecord(unit, start, "identity", shard, columns, {"seconds": 1.5})
        (self.path / record_name(unit)).write_bytes(encode_record(record))

    def merge(self, units: list[int]) -> None:
        """Write the column blocks of these units, and delete their records."""
        for block in range(self.layout.n_column_blocks):
            start, stop = self.layout.column_block_range(block)
            columns = empty_columns(stop - start, self.layout.key_bytes)
            for unit in units:
                first, last = self.layout.unit_range(unit)
                if start <= first < stop:
                    made = make_columns(self.layout, first, last, self.row_scale[first:last])
                    for name, values in made.items():
                        columns[name][first - start : last - start] = values
            write_column_block(self.store_path, self.layout, block, columns)
        for unit in units:
            (self.path / record_name(unit)).unlink()

    def fill(self) -> "Output":
        """Commit and merge every unit."""
        units = list(range(self.layout.n_units))
        for unit in units:
            self.commit(unit)
        self.merge(units)
        return self


def filled(path: Path, **settings) -> Output:
    """Return an output with every unit committed and merged."""
    return Output(path, **settings).fill()


MISSING = [*range(32, 48), *range(64, 70)]
"""Samples without a row in ``make_unfinished``."""


def make_unfinished(path: Path) -> Output:
    """Return units 0 and 3 merged, 1 recorded only, 2 nothing, 4 a shard without a record."""
    output = Output(path)
    output.commit(0)
    output.commit(3)
    output.merge([0, 3])
    output.commit(1)
    output.commit(4)
    (path / record_name(4)).unlink()
    return output


def stored_part(output: Output, layers: list[LayerSlice]) -> np.ndarray:
    """Return the stored elements of some layers; those of packed rows begin with the header."""
    parts = [output.stored[:, x.stored_start : x.stored_end] for x in layers]
    return np.concatenate([output.stored[:, : output.layout.header_width], *parts], axis=1)


def rewrite_with_zarr(output: Output, stored: np.ndarray, index_location="end", **config) -> None:
    """Replace our shards with zarr-python's, whose chunks have Morton order."""
    shutil.rmtree(output.store_path / "projections")
    layout = output.layout
    array = zarr.create_array(
        str(output.store_path / "projections"),
        shape=stored.shape,
        dtype=stored.dtype,
        chunks=(layout.rows_per_shard, layout.stored_width),
        fill_value=layout.fill,
        compressors=None,
        config=config or None,
        serializer=zarr.codecs.ShardingCodec(
            chunk_shape=(layout.chunk_rows, layout.chunk_width),
            codecs=[zarr.codecs.BytesCodec()],
            index_location=index_location,
        ),
    )
    array[...] = stored


def written_by_zarr(path: Path, **settings) -> Output:
    """Return an output whose shards are zarr-python's."""
    output = filled(path, **settings)
    rewrite_with_zarr(output, output.stored)
    return output


def training_store(path: Path, **settings) -> Output:
    """Return a training run's store, whose rows were appended in parts."""
    output = Output(path / "job", **settings)
    n = output.layout.n_samples
    layout = replace(output.layout, n_samples=16, key_bytes=1, column_rows=16)
    attributes = {"layers": [asdict(layer) for layer in output.layers], "domains": []}
    folder = path / "run"
    create_row_store(folder, layout, attributes, pack_matrices(output.layers, output.matrices))
    store = AppendStore(folder, 0, 1)
    for start in range(0, n, 9):
        ids = np.arange(start, min(start + 9, n))
        columns = {
            "status": np.full(len(ids), STATUS["ok"]),
            "loss": ids / 8,
            "n_tokens": ids + 1,
            "grad_norm": ids / 4,
            "step": ids // 5,
            "sample_id": ids[::-1],
        }
        store.add(output.rows[ids], columns)
    store.close()
    output.path = folder
    return output


def packed(encoding: str, rows_per_shard: int = 16, **settings) -> StoreConfig:
    return StoreConfig(encoding=encoding, rows_per_shard=rows_per_shard, **settings)


PACKED_CHUNKS = {"n_samples": 40, "widths": ((32, 32),) * 60}
"""Sixty layers of 128 bytes of signs: wide enough for a chunk of its own for each."""
MANY_CHUNKS = {
    "n_samples": 150,
    "layout": StoreLayout(150, 12, 64, 32, 6, "float16", "none", 8, 128),
}

READER_CASES: dict[str, Callable[[Path], Output]] = {
    "float16": filled,
    "bfloat16": partial(
        filled, config=StoreConfig(encoding="dense", proj_dtype="bfloat16", rows_per_shard=16)
    ),
    "float32": partial(
        filled, config=StoreConfig(encoding="dense", proj_dtype="float32", rows_per_shard=16)
    ),
    "blosc": partial(
        filled, config=StoreConfig(encoding="dense", compressor="blosc", rows_per_shard=16)
    ),
    "zstd bfloat16": partial(
        filled,
        config=StoreConfig(
            encoding="dense", compressor="zstd", proj_dtype="bfloat16", rows_per_shard=16
        ),
    ),
    "whole rows in a chunk": partial(filled, widths=((3, 5), (1, 7), (4, 1)), n_samples=50),
    "several chunks a layer": partial(filled, widths=((8, 8), (16, 8), (8, 24)), n_samples=50),
    "one row a shard": partial(
        filled, config=StoreConfig(encoding="dense", rows_per_shard=1), n_samples=9
    ),
    "one sample": partial(filled, n_samples=1),
    "many chunks a shard": partial(filled, **MANY_CHUNKS),
    "written by zarr-python": partial(written_by_zarr, **MANY_CHUNKS),
    "training store": training_store,
    "signs in whole rows": partial(filled, widths=((3, 5), (1, 7), (4, 1)), config=packed("signs")),
    "signs, a chunk a layer": partial(filled, **PACKED_CHUNKS, config=packed("signs", 32)),
    "int2 blosc": partial(
        filled, widths=((3, 5), (1, 7)), config=packed("int2", compressor="blosc")
    ),
    "int4 written by zarr-python": partial(
        written_by_zarr, **PACKED_CHUNKS, config=packed("int4", 32)
    ),
    "int8 training store": partial(training_store, widths=((3, 5), (1, 7)), config=packed("int8")),
}
