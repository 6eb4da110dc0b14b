"""Reading a store beside a memory-mapped file of the same bytes and beside zarr-python; writing
beside the latter.

    python tests/bench/bench_store.py [--quick] [--proj_dtype float16|bfloat16|float32] [--folder
    DIR]

GPT-2-small's rows (48 layers x 256 values) in the page cache or a memory file system, CPU time of
all threads, in turn. Every scan opens what it reads, so that all sides touch their pages for the
first time; blocks have 512 rows on all sides. The mapped file is one C-ordered array ``[N, D]`` of
the very bytes that the store keeps, read by ``np.memmap``:

- as stored: blocks copied out of the map, beside ``ProjectionStore.scan_stored`` and zarr's own
array;
- as float32: what ``ProjectionStore.scan`` gives, ``stored * row_scale``; the file's and zarr's
blocks are decoded as one would in numpy, and once more by gradproj's own decoder;
- one layer of all rows, single random rows, and 1,000 random rows in one call: as float32 on all
sides.

``write``: ours flushes each shard to disk (free on a memory file system), zarr-python never does.
torch has one thread.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import zarr
from measure import Variant, interleave, print_machine, print_table

from gradproj.files import write_file_durably
from gradproj.store import ProjectionStore
from gradproj.store.encoding import decode_rows
from gradproj.store.layout import (
    STATUS,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    plan_layout,
)
from gradproj.store.row_encoder import RowEncoder
from gradproj.store.writer import create_store, shard_chunks, write_column_block

WIDTH, BLOCK, N_SINGLE, N_MANY = 256, 512, 30, 1_000
MAPPED, DECODED = "mapped file", "mapped file, our decoder"
ZARR_DEFAULTS = {"threading.max_workers": None, "async.concurrency": 10}  # gradproj sets both lower
ZARR, ZARR_SHARDS, ZARR_DECODED = (
    "zarr-python",
    "zarr-python, a shard a block",
    "zarr-python, our decoder",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the rows, 3 rounds instead of 7"
    )
    parser.add_argument(
        "--proj_dtype", default="float16", choices=["float16", "bfloat16", "float32"]
    )
    parser.add_argument(
        "--folder", help="where to write (default: /dev/shm, else a temporary folder)"
    )
    args = parser.parse_args()
    measure(args.quick, args.proj_dtype, args.folder)


def measure(
    quick: bool = False, proj_dtype: str = "float16", parent: str | None = None
) -> dict[str, float]:
    """Return gradproj's speed over each other reader, by kind of read and reader."""
    shared_memory = Path("/dev/shm")
    folder = Path(
        tempfile.mkdtemp(
            prefix="bench_store_", dir=parent or (shared_memory if shared_memory.is_dir() else None)
        )
    )
    zarr.config.set(ZARR_DEFAULTS)
    torch.set_num_threads(1)  # idle threads of a pool spin, which is CPU time too
    try:
        sides = Sides(folder, proj_dtype, 1_024 if quick else 8_192)
        print_machine("numpy", "zarr")
        print(
            f"{len(sides.stored)} x {sides.layout.dim} {proj_dtype}: "
            f"{sides.stored.nbytes / 1e9:.2f} GB in {folder.parent}"
        )
        ratios: dict[str, float] = {}
        for what, variants in sides.tables().items():
            print(f"\n{what}")
            bases = [name for name in (MAPPED, ZARR) if name in variants]
            medians = print_table(interleave(variants, 3 if quick else 7), bases)
            for name, seconds in medians.items():
                if name != "gradproj":
                    ratios[f"{what} / {name}"] = seconds / medians["gradproj"]
            print(
                ", ".join(
                    f"{seconds / medians['gradproj']:.2f} x {name}"
                    for name, seconds in medians.items()
                )
            )
            if "rows" in what:
                n_rows = N_SINGLE if what.startswith("single") else N_MANY
                print(
                    ", ".join(
                        f"{name} {1e6 * s / n_rows:.1f} µs a row" for name, s in medians.items()
                    )
                )
        return ratios
    finally:
        shutil.rmtree(folder)


class Sides:
    """Write the same rows as a gradproj store, as zarr-python's own and as one raw file."""

    def __init__(self, folder: Path, proj_dtype: str, n_rows: int) -> None:
        n_layers = 48
        self.folder, self.proj_dtype = folder, proj_dtype
        config = StoreConfig(encoding="dense", proj_dtype=proj_dtype, rows_per_shard=n_rows // 2)
        self.layout = plan_layout(n_rows, [WIDTH] * n_layers, 16, config)
        rows = np.random.default_rng(0).standard_normal((n_rows, self.layout.dim), np.float32)
        encoded = RowEncoder(self.layout, ()).encode(torch.from_numpy(rows))
        self.stored, self.row_scale = (tensor.numpy() for tensor in encoded)
        self.stored.tofile(folder / "raw")
        for side in ("gradproj", "zarr"):
            (folder / side).mkdir()
            make_store(folder / side, self.layout, n_layers, self.row_scale)
        self.layer = ProjectionStore(folder / "gradproj").layers[n_layers // 2]

    # --- opening ---

    def open_mapped(self) -> np.ndarray:
        return np.memmap(
            self.folder / "raw", self.layout.stored_dtype, "r", shape=self.stored.shape
        )

    def open_store(self) -> ProjectionStore:
        return ProjectionStore(self.folder / "gradproj")

    def open_zarr(self) -> zarr.Array:
        return zarr.open_array(str(self.folder / "zarr" / "projections.zarr" / "projections"))

    # --- decoding ---

    def plainly(self, stored: np.ndarray, at: slice | np.ndarray) -> np.ndarray:
        """``stored * row_scale`` as a person writes it."""
        if self.proj_dtype == "bfloat16":
            stored = (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False) * self.row_scale[at, None]

    def ours(self, stored: np.ndarray, at: slice | np.ndarray) -> np.ndarray:
        return decode_rows(stored, self.row_scale[at], self.proj_dtype)

    # --- what is timed ---

    def tables(self) -> dict[str, dict[str, Variant]]:
        """Table -> variant -> work."""
        self.write_ours(), self.write_zarr()
        return {
            "write": {"gradproj": Variant(self.write_ours), ZARR: Variant(self.write_zarr)},
            "scan as stored": {
                MAPPED: Variant(
                    lambda: exhaust(np.array(b) for b, _ in self.blocks(self.open_mapped()))
                ),
                "gradproj": Variant(lambda: exhaust(self.open_store().scan_stored(BLOCK))),
                ZARR: Variant(lambda: exhaust(self.blocks(self.open_zarr()))),
                ZARR_SHARDS: Variant(
                    lambda: exhaust(self.blocks(self.open_zarr(), self.layout.rows_per_shard))
                ),
            },
            "scan as float32": {
                MAPPED: Variant(
                    lambda: exhaust(self.plainly(*b) for b in self.blocks(self.open_mapped()))
                ),
                DECODED: Variant(
                    lambda: exhaust(self.ours(*b) for b in self.blocks(self.open_mapped()))
                ),
                "gradproj": Variant(lambda: exhaust(self.open_store().scan(BLOCK))),
                ZARR: Variant(
                    lambda: exhaust(self.plainly(*b) for b in self.blocks(self.open_zarr()))
                ),
                ZARR_DECODED: Variant(
                    lambda: exhaust(self.ours(*b) for b in self.blocks(self.open_zarr()))
                ),
            },
            "one layer": self.one_layer(),
            "single random rows": self.single_rows(),
            "1,000 random rows": self.many_rows(),
        }

    def blocks(
        self, array: np.ndarray | zarr.Array, height: int = BLOCK
    ) -> Iterable[tuple[np.ndarray, slice]]:
        for first in range(0, len(self.stored), height):
            at = slice(first, first + height)
            yield array[at], at

    def one_layer(self) -> dict[str, Variant]:
        columns, all_rows = slice(self.layer.slice_start, self.layer.slice_end), slice(None)
        return {
            MAPPED: Variant(lambda: self.plainly(self.open_mapped()[:, columns], all_rows)),
            "gradproj": Variant(lambda: exhaust(self.open_store().scan(layers=[self.layer.name]))),
            ZARR: Variant(lambda: self.plainly(self.open_zarr()[:, columns], all_rows)),
            ZARR_DECODED: Variant(lambda: self.ours(self.open_zarr()[:, columns], all_rows)),
        }

    def single_rows(self) -> dict[str, Variant]:
        ids = np.random.default_rng(1).integers(0, len(self.stored), N_SINGLE).tolist()
        mapped, store, array = self.open_mapped(), self.open_store(), self.open_zarr()
        return {
            "mapped file, as stored": Variant(lambda: [np.array(mapped[i]) for i in ids]),
            MAPPED: Variant(
                lambda: [self.plainly(mapped[i : i + 1], slice(i, i + 1)) for i in ids]
            ),
            "gradproj": Variant(lambda: [store.rows([i]) for i in ids]),
            ZARR: Variant(lambda: [self.plainly(array[i : i + 1], slice(i, i + 1)) for i in ids]),
        }

    def many_rows(self) -> dict[str, Variant]:
        ids = np.random.default_rng(2).integers(0, len(self.stored), N_MANY)
        mapped, store, array = self.open_mapped(), self.open_store(), self.open_zarr()
        return {
            "mapped file, as stored": Variant(lambda: mapped[ids]),
            MAPPED: Variant(lambda: self.plainly(mapped[ids], ids)),
            "gradproj": Variant(lambda: store.rows(ids)),
            ZARR: Variant(lambda: self.plainly(array.oindex[ids], ids)),
        }

    def write_ours(self) -> None:
        for unit in range(self.layout.n_units):
            start, stop = self.layout.unit_range(unit)
            path = self.folder / "gradproj" / self.layout.shard_name(unit)
            write_file_durably(path, shard_chunks(self.stored[start:stop], self.layout))

    def write_zarr(self) -> None:
        self.open_zarr()[...] = self.stored


def make_store(output: Path, layout: StoreLayout, n_layers: int, row_scale: np.ndarray) -> None:
    layers = [
        asdict(LayerSlice(f"h.{n}", "Linear", 16, 16, 16, 16, n * WIDTH, (n + 1) * WIDTH))
        for n in range(n_layers)
    ]
    create_store(
        output / "projections.zarr",
        layout,
        {"layers": layers, "domains": []},
        np.empty(0, np.float32),
    )
    columns = empty_columns(layout.n_samples, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    columns["row_scale"][:] = row_scale
    write_column_block(output / "projections.zarr", layout, 0, columns)


def exhaust(items: Iterable[object]) -> None:
    for _ in items:
        pass


if __name__ == "__main__":
    main()
