"""Speed of scans of packed rows beside float16 rows of the same coordinates.

    python tests/bench/bench_packed.py [--quick] [--threads N] [--folder DIR]

Rows of 48 layers x (64 x 64) values, in the system's cache: one store of each encoding with the
same documents. ``top_k`` of 1 and of 16 queries by the plain product, every file opened again, the
sides in turn. Printed: the documents a second of each encoding over those of float16, by CPU time
(by the wall clock with several threads), and the spread of that ratio over the rounds. The best
documents of each encoding are compared with those of its decoded rows.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from measure import Variant, interleave, print_machine

from gradproj import ProjectionStore
from gradproj.analysis import top_k
from gradproj.files import write_file_durably
from gradproj.store.layout import (
    STATUS,
    LayerSlice,
    StoreConfig,
    empty_columns,
    place_stored,
    plan_layout,
)
from gradproj.store.row_encoder import RowEncoder
from gradproj.store.writer import create_store, shard_chunks, write_column_block

N_LAYERS, SIDE, UNIT, N_UNITS, K = 48, 64, 512, 8, 20
FLOAT16 = "float16"
ENCODINGS = (FLOAT16, "signs", "int2", "int4", "int8")
QUERIES = (1, 16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="signs alone, 3 rounds instead of 9")
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch, and of gradproj's kernels"
    )
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    measure(args.quick, args.threads, args.folder)


def measure(quick: bool = False, threads: int = 1, parent: str | None = None) -> dict[str, float]:
    """Return documents a second over those of float16 rows, by ``ENCODING Q=n``."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench_packed_", dir=parent) as name:
        encodings = ENCODINGS[:2] if quick else ENCODINGS
        stores = {x: write_store(Path(name) / x, x, N_UNITS * UNIT) for x in encodings}
        print_machine("numpy", "numba")
        print(f"{N_UNITS * UNIT} rows of {N_LAYERS} x {SIDE} x {SIDE} values")
        print(f"{'':8} {'Q':>3} {'bytes a row':>12} {'median ms':>10} {'x float16':>10}  by round")
        for n_queries in QUERIES:
            queries = np.random.default_rng(5).standard_normal(
                (n_queries, N_LAYERS * SIDE**2), np.float32
            )
            variants = {x: Variant(Asked(store, queries)) for x, store in stores.items()}
            times = interleave(variants, 3 if quick else 9, clock)
            check(stores, queries)
            for x, seconds in times.items():
                by_round = [a / b for a, b in zip(times[FLOAT16], seconds, strict=True)]
                ratios[f"{x} Q={n_queries}"] = ratio = statistics.median(by_round)
                print(
                    f"{x:8} {n_queries:>3} {stores[x].layout.row_bytes:>12,} "
                    f"{1e3 * statistics.median(seconds):>10.1f} {ratio:>10.2f}  "
                    f"{min(by_round):.2f} to {max(by_round):.2f}",
                    flush=True,
                )
    return ratios


class Asked:
    """A question to a store whose files are opened for it."""

    def __init__(self, store: ProjectionStore, queries: np.ndarray) -> None:
        self._store, self._queries = store, queries

    def __call__(self) -> None:
        self._store.close()
        top_k(self._queries, self._store, K, score="dot")


def check(stores: dict[str, ProjectionStore], queries: np.ndarray) -> None:
    """Compare the answers with those of decoded rows in float64."""
    for store in stores.values():
        best = top_k(queries, store, K, score="dot")
        rows = store.rows(best.ids[0]).astype(np.float64)
        exact = rows @ queries[0].astype(np.float64)
        assert np.abs(best.scores[0] - exact).max() < 1e-5 * np.abs(exact).max(), store


def write_store(folder: Path, encoding: str, n_rows: int) -> ProjectionStore:
    """Write the same random rows in one encoding."""
    packed = {} if encoding == FLOAT16 else {"encoding": encoding}
    dense = {"encoding": "dense", "proj_dtype": FLOAT16} if encoding == FLOAT16 else {}
    config = StoreConfig(rows_per_shard=UNIT, **packed, **dense)
    dim, layout = N_LAYERS * SIDE**2, plan_layout(n_rows, [SIDE**2] * N_LAYERS, 16, config)
    layers = place_stored(
        [
            LayerSlice(
                f"layer.{i}", "Linear", SIDE, SIDE, SIDE, SIDE, i * SIDE**2, (i + 1) * SIDE**2
            )
            for i in range(N_LAYERS)
        ],
        layout,
    )
    folder.mkdir()
    attributes = {"layers": [asdict(layer) for layer in layers], "domains": []}
    path = folder / "projections.zarr"
    create_store(path, layout, attributes, np.empty(0, np.float32))
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((UNIT, dim), np.float32))
    stored, row_scale = RowEncoder(layout, layers).encode(rows)
    for unit in range(layout.n_units):  # each begins with another of the same rows
        turned = stored.roll(unit, 0).numpy()
        write_file_durably(folder / layout.shard_name(unit), shard_chunks(turned, layout))
    columns = empty_columns(n_rows, layout.key_bytes)
    columns["row_scale"][:] = torch.cat([row_scale.roll(n) for n in range(layout.n_units)])
    columns["status"][:] = STATUS["ok"]
    write_column_block(path, layout, 0, columns)
    return ProjectionStore(folder)


if __name__ == "__main__":
    main()
