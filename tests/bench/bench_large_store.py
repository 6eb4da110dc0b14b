"""A question to a store that is larger than memory: how much memory it takes, and how near it comes
to the disk.

    python tests/bench/bench_large_store.py [--gigabytes 20] [--folder DIR] [--rounds 2] [--fit]

Synthetic float16 rows of GPT-2-small's size go through the real writer into ``--folder`` (default:
the system's temporary folder) and are deleted at the end. Then, each time with nothing of the store
in the system's cache:

- disk: every shard read once by ``os.preadv`` into one buffer of 8 MB, one thread, told the kernel
as sequential;
- each question: ``top_k`` in a process of its own, dot, kfac and relatif, 1 and 16 queries, one
thread; also ``scan_stored`` and ``scan_bands`` alone.

Memory is the process's largest RSS, which counts mapped files, and its largest anonymous part, both
of the whole process, Python and torch included (what they take after the imports stands beside it).
The best document of every query, which is one of the store's own rows changed a little, must be
that row, and its score what float64 makes of it. ``--fit`` also fits the second moments, a scan of
its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from bench_query import add_covariances
from measure import print_machine

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, top_k
from gradproj.files import write_file_durably
from gradproj.store.layout import STATUS, LayerSlice, StoreConfig, empty_columns, plan_layout
from gradproj.store.row_encoder import RowEncoder
from gradproj.store.writer import create_store, shard_chunks, write_column_block

N_LAYERS, WIDTH = 48, 256
QUESTIONS = [("dot", 1), ("dot", 16), ("kfac", 1), ("kfac", 16), ("relatif", 1), ("relatif", 16)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--folder", help="where there is as much room")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument(
        "--child", nargs=3, metavar=("STORE", "WORK", "QUERIES"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Path(args.child[0]), args.child[1], int(args.child[2]))))
        return
    measure(args.gigabytes, args.folder, args.rounds, args.fit)


def measure(
    gigabytes: float, parent: str | None = None, rounds: int = 2, fit: bool = False
) -> dict[str, dict]:
    """By what was done: medians of seconds, and the most memory."""
    with tempfile.TemporaryDirectory(prefix="bench_large_", dir=parent) as folder:
        output = Path(folder)
        started = time.perf_counter()
        n_bytes = write_store(output, gigabytes)
        print_machine("numpy")
        print(
            f"{n_bytes / 1e9:.1f} GB in {parent or 'temporary'}, written in "
            f"{time.perf_counter() - started:.0f} s"
        )
        works = [
            ("disk", 0),
            ("scan_bands", 0),
            ("scan_stored", 0),
            *QUESTIONS,
            *([("fit", 0)] if fit else []),
        ]
        runs: dict[str, list[dict]] = {}
        for _ in range(rounds):
            for work, n_queries in works:
                drop_from_cache(output)
                name = f"{work} Q={n_queries}" if n_queries else work
                runs.setdefault(name, []).append(run_child(output, work, n_queries))
                print(f"{name}: {runs[name][-1]}", flush=True)
        return print_runs(runs, n_bytes)


def print_runs(runs: dict[str, list[dict]], n_bytes: int) -> dict[str, dict]:
    found = {}
    for name, several in runs.items():
        found[name] = {
            key: statistics.median(run[key] for run in several) for key in ("wall", "cpu")
        }
        found[name] |= {
            key: max(run[key] for run in several) for key in ("rss", "anonymous", "imports")
        }
    disk = found["disk"]["wall"]
    print("\nnothing cached     wall s  CPU s  GB/s  / disk  most RSS MB  anonymous  after imports")
    for name, run in found.items():
        run["of_disk"] = disk / run["wall"]
        print(
            f"{name:16} {run['wall']:8.1f} {run['cpu']:6.1f} {n_bytes / run['wall'] / 1e9:5.2f} "
            f"{run['of_disk']:7.2f} {run['rss'] / 1e6:12.0f} {run['anonymous'] / 1e6:10.0f} "
            f"{run['imports'] / 1e6:14.0f}",
            flush=True,
        )
    return found


def write_store(output: Path, gigabytes: float) -> int:
    """Bytes of the rows.

    Each shard has the first one's values, turned along the row, and sizes of its own.
    """
    generator = np.random.default_rng(0)
    dim = N_LAYERS * WIDTH
    n_rows = max(64, round(gigabytes * 1e9 / dim / 2))
    layout = plan_layout(n_rows, [WIDTH] * N_LAYERS, 8, StoreConfig(encoding="dense"))
    layers = [
        asdict(LayerSlice(f"h.{n}", "Linear", 16, 16, 16, 16, n * WIDTH, (n + 1) * WIDTH))
        for n in range(N_LAYERS)
    ]
    path = output / "projections.zarr"
    create_store(path, layout, {"layers": layers, "domains": []}, np.empty(0, np.float32))
    first = generator.standard_normal((layout.rows_per_shard, dim), np.float32)
    encoded = RowEncoder(layout, ()).encode(torch.from_numpy(first))
    stored, scale = (tensor.numpy() for tensor in encoded)
    columns = empty_columns(layout.n_samples, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    shifts = generator.permutation(dim)  # no row is there twice
    for unit in range(layout.n_units):
        start, stop = layout.unit_range(unit)
        rows = np.roll(stored, int(shifts[unit]), axis=1)[: stop - start]
        sizes = 2.0 ** generator.integers(-1, 1, stop - start)
        columns["row_scale"][start:stop] = scale[: stop - start] * sizes
        write_file_durably(output / layout.shard_name(unit), shard_chunks(rows, layout))
    for block in range(layout.n_column_blocks):
        start, stop = layout.column_block_range(block)
        write_column_block(
            path, layout, block, {name: values[start:stop] for name, values in columns.items()}
        )
    add_covariances(path, N_LAYERS)
    return n_rows * dim * 2


def drop_from_cache(output: Path) -> None:
    for path in (output / "projections.zarr" / "projections").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run_child(output: Path, work: str, n_queries: int) -> dict:
    command = [sys.executable, __file__, "--child", str(output), work, str(n_queries)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


# --- in a process of its own ---


def child(output: Path, work: str, n_queries: int) -> dict:
    """Do it, and say what it took."""
    torch.set_num_threads(1)
    torch.rand(8, 8) @ torch.rand(8, 8)
    imports = memory()["VmRSS"]
    with ProjectionStore(output) as store, Watch() as watch:
        wall, cpu = time.perf_counter(), time.process_time()
        if work == "disk":
            read_plainly(store)
        elif work == "fit":
            Preconditioner.fit(store, "second_moment")
        elif work.startswith("scan"):
            scan(store, work)
        else:
            ask(store, work, n_queries)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "wall": wall,
        "cpu": cpu,
        "imports": imports,
        "rss": memory()["VmHWM"],
        "anonymous": watch.most,
    }


def read_plainly(store: ProjectionStore) -> None:
    buffer = bytearray(2**23)
    for unit in range(store.layout.n_units):
        descriptor = os.open(store.path.parent / store.layout.shard_name(unit), os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        at = 0
        while n_read := os.preadv(descriptor, [buffer], at):
            at += n_read
        os.close(descriptor)


def scan(store: ProjectionStore, work: str) -> None:
    if work == "scan_stored":
        for _ in store.scan_stored():
            pass
    else:
        for band in store.scan_bands():
            for _ in band.tiles:
                pass


def ask(store: ProjectionStore, score: str, n_queries: int) -> None:
    """The best documents of changed rows are those rows, with the score of float64."""
    wanted = np.random.default_rng(2).integers(0, len(store), n_queries)
    rows = store.rows(wanted)
    noise = np.random.default_rng(3).standard_normal(rows.shape, np.float32)
    queries = rows + 0.1 * noise * np.abs(rows).mean(axis=1, keepdims=True)
    found = top_k(queries, store, 20, score=score)
    turned, fitted = torch.from_numpy(queries).double(), None
    if score in ("kfac", "relatif"):
        fitted = Preconditioner.fit(store)
        turned = fitted.solve(turned)
    best = np.asarray(found.ids)
    for query in range(n_queries):
        rows = torch.from_numpy(store.rows(best[query])).double()
        exact = rows @ turned[query]
        if score == "relatif":
            exact /= fitted.self_products(rows).sqrt()
        np.testing.assert_allclose(found.scores[query], exact, rtol=1e-4)
        closest = np.argmax(exact / rows.norm(dim=1))  # a row of twice its length may score higher
        assert best[query, closest] == wanted[query]


def memory() -> dict[str, int]:
    """Bytes by the kernel's names."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")
    }


class Watch:
    """The largest anonymous part of the memory, looked at every 20 ms."""

    def __enter__(self) -> "Watch":
        self.most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            self.most = max(self.most, memory()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


if __name__ == "__main__":
    main()
