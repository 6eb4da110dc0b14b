"""Speed of the row store beside zarr-python's, on this machine's memory file system.

    python tests/bench/bench_store.py [--quick]

Both sides do the same work on the same rows, in turn (A B A B ...); what is printed are medians, and the ratio of
medians, which is what carries over to other machines.
Ours flushes each shard to disk (free on a memory file system), zarr-python never does.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import zarr

from gradproj.store import LayerSlice, ProjectionStore, StoreConfig, create_store, plan_layout
from gradproj.store.encoding import decode_rows, encode_rows
from gradproj.store.files import write_file_durably
from gradproj.store.layout import STATUS, StoreLayout, empty_columns
from gradproj.store.records import UnitRecord, decode_record, encode_record
from gradproj.store.writer import shard_chunks, write_column_block

WIDTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the rows, 3 rounds instead of 7")
    parser.add_argument("--proj_dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--folder", help="where to write (default: /dev/shm, else a temporary folder)")
    args = parser.parse_args()
    shared_memory = Path("/dev/shm")
    parent = args.folder or (shared_memory if shared_memory.is_dir() else None)
    folder = Path(tempfile.mkdtemp(prefix="bench_store_", dir=parent))
    try:
        run(folder, args.proj_dtype, *((1_024, 12, 3) if args.quick else (8_192, 48, 7)))
    finally:
        shutil.rmtree(folder)


def run(folder: Path, proj_dtype: str, n_rows: int, n_layers: int, n_rounds: int) -> None:
    config = StoreConfig(proj_dtype=proj_dtype, rows_per_shard=n_rows // 2)
    layout = plan_layout(n_rows, [WIDTH] * n_layers, 16, config)
    rows = np.random.default_rng(0).standard_normal((n_rows, layout.dim), np.float32)
    stored, row_scale = encode_rows(rows, proj_dtype)
    print(
        f"{n_rows} x {layout.dim} {proj_dtype}, {stored.nbytes / 1e9:.3f} GB stored, {n_rounds} rounds in {folder}"
    )
    for side in ("ours", "zarr"):
        (folder / side).mkdir()
        make_store(folder / side, layout, n_layers, row_scale)
    sides = {side: str(folder / side / "projections.zarr" / "projections") for side in ("ours", "zarr")}
    array = zarr.open_array(sides["zarr"])
    store = ProjectionStore(folder / "ours")
    gigabytes = stored.nbytes / 1e9

    def write_ours() -> None:
        for unit in range(layout.n_units):
            start, stop = layout.unit_range(unit)
            path = folder / "ours" / layout.shard_name(unit)
            write_file_durably(path, shard_chunks(stored[start:stop], layout))

    def write_zarr() -> None:
        array[...] = stored

    compare("write", write_ours, write_zarr, n_rounds, gigabytes, "GB/s")
    height = layout.chunk_rows

    def scan_zarr() -> None:
        for start in range(0, n_rows, height):
            decode_rows(array[start : start + height], row_scale[start : start + height], proj_dtype)

    compare("scan to float32", lambda: exhaust(store.scan()), scan_zarr, n_rounds, gigabytes, "GB/s")
    name = store.layers[n_layers // 2].name
    columns = slice(store.layers[n_layers // 2].slice_start, store.layers[n_layers // 2].slice_end)

    def layer_zarr() -> None:
        decode_rows(array[:, columns], row_scale, proj_dtype)

    compare(
        "one layer",
        lambda: exhaust(store.scan(layers=[name])),
        layer_zarr,
        n_rounds,
        gigabytes / n_layers,
        "GB/s",
    )
    ids = np.random.default_rng(1).integers(0, n_rows, 20).tolist()
    compare(
        "random rows, one by one",
        lambda: [store.rows([sample_id]) for sample_id in ids],
        lambda: [decode_rows(array[[i]], row_scale[[i]], proj_dtype) for i in ids],
        n_rounds,
        len(ids),
        "rows/s",
    )
    alone(
        "rows of 1,000 random ids",
        lambda: store.rows(np.random.default_rng(2).integers(0, n_rows, 1_000)),
        1_000,
        "rows/s",
    )
    alone("encode", lambda: encode_rows(rows, proj_dtype), gigabytes, "GB/s of stored rows")
    alone("decode", lambda: decode_rows(stored, row_scale, proj_dtype), gigabytes, "GB/s of stored rows")
    record = encode_record(make_record(n_layers))
    alone(f"read a record of {len(record) // 1000} kB", lambda: decode_record(record), 1, "records/s")


def make_store(output: Path, layout: StoreLayout, n_layers: int, row_scale: np.ndarray) -> None:
    layers = [
        asdict(LayerSlice(f"h.{n}", "Linear", 16, 16, 16, 16, n * WIDTH, (n + 1) * WIDTH))
        for n in range(n_layers)
    ]
    create_store(
        output / "projections.zarr", layout, {"layers": layers, "domains": []}, np.empty(0, np.float32)
    )
    columns = empty_columns(layout.n_samples, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    columns["row_scale"][:] = row_scale
    write_column_block(output / "projections.zarr", layout, 0, columns)


def make_record(n_layers: int) -> UnitRecord:
    covariances = {name: np.zeros(n_layers * WIDTH, np.float32) for name in ("a", "s")}
    return UnitRecord(
        0, 0, "", {"bytes": 1, "crc32c": 1}, empty_columns(1_024, 16), {"seconds": 1.0}, covariances
    )


def compare(
    what: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    n_rounds: int,
    amount: float,
    unit: str,
) -> None:
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    ours(), theirs()
    for _ in range(n_rounds):
        seconds["ours"].append(timed(ours))
        seconds["theirs"].append(timed(theirs))
    mine, other = (amount / statistics.median(values) for values in seconds.values())
    print(
        f"{what:28} ours {mine:10.3f} {unit:8} zarr-python {other:10.3f} {unit:8} ratio {mine / other:8.2f}"
    )


def alone(what: str, work: Callable[[], object], amount: float, unit: str, n_rounds: int = 7) -> None:
    work()
    print(f"{what:28} ours {amount / statistics.median([timed(work) for _ in range(n_rounds)]):10.3f} {unit}")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def exhaust(blocks: object) -> None:
    for _ in blocks:  # type: ignore[attr-defined]
        pass


if __name__ == "__main__":
    main()
