"""Stores for the tests of the store: a small job's output, made with the public functions a job uses."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradproj.files import publish_exclusively, temporary_beside, write_file_durably
from gradproj.store.layout import (
    STATUS,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    encode_keys,
    plan_layout,
)
from gradproj.store.unit_record import UnitRecord, encode_record, record_name
from gradproj.store.writer import (
    create_store,
    decode_rows,
    encode_rows,
    pack_matrices,
    shard_chunks,
    write_column_block,
)

DOMAINS = ["ArXiv", "Github"]


def make_layers(widths: list[tuple[int, int]]) -> list[LayerSlice]:
    """Layers of the given ``(k_o, k_i)``."""
    layers, at = [], 0
    for number, (k_o, k_i) in enumerate(widths):
        end = at + k_o * k_i
        layers.append(LayerSlice(f"h.{number}.mlp", "Linear", k_i + 3, k_o + 2, k_i, k_o, at, end))
        at = end
    return layers


def make_rows(n_samples: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows whose sizes go from 1e-12 to 1e12."""
    generator = np.random.default_rng(seed)
    sizes = 10.0 ** generator.uniform(-12, 12, (n_samples, 1))
    return (generator.standard_normal((n_samples, dim)) * sizes).astype(np.float32)


def make_columns(
    layout: StoreLayout, start: int, stop: int, row_scale: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns in which each value tells its sample id."""
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
    """An ``OUTPUT/`` with a store that holds ``rows``; units are committed and merged as a test wants."""

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
        config = config or StoreConfig(rows_per_shard=16)
        self.layout = layout or plan_layout(
            n_samples, [k_o * k_i for k_o, k_i in widths], 8, config
        )
        self.rows = make_rows(n_samples, self.layout.dim)
        self.stored, self.row_scale = encode_rows(self.rows, self.layout.proj_dtype)
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
        """What every reading has to give: the stored rows by the definition."""
        return decode_rows(self.stored, self.row_scale, self.layout.proj_dtype)

    @property
    def store_path(self) -> Path:
        return self.path / "projections.zarr"

    def commit(self, unit: int, with_shard: bool = True) -> None:
        """Publish a unit's shard and record, as a job does."""
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
        """Write the column blocks with what these units recorded, and throw their records away."""
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
