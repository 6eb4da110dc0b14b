"""Speed of the index's scan beside webdataset's own iteration over the same tars.

    python tests/bench/bench_index_scan.py [--quick]

Every round times each side once, in turn, on files in the page cache (both read every byte). What
is printed are medians with their spread, and the ratio of medians, which is what carries over to
other machines; the target is 10. The scan of one process is `build_index(processes=1)`: headers
checked, payload checksums, keys, domains. The scan of two has the tars ten times over, since it
starts its processes (0.2 s) in each round. webdataset only iterates: nothing is decoded.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import webdataset

from gradproj.corpus.index import build_index

TIMES_OVER = 10
DOMAINS = [f"Domain {i}" for i in range(22)]


def pile(key: str, text: str, domain: str) -> list[tuple[str, bytes]]:
    """A sample as the Pile has it and as prepare writes it: one JSON, its metadata last."""
    return [(f"{key}.json", json.dumps({"text": text, "meta": {"pile_set_name": domain}}).encode())]


def metadata_first(key: str, text: str, domain: str) -> list[tuple[str, bytes]]:
    """Return a document with its metadata first: the whole JSON must be parsed."""
    return [(f"{key}.json", json.dumps({"meta": {"pile_set_name": domain}, "text": text}).encode())]


def more_metadata(key: str, text: str, domain: str) -> list[tuple[str, bytes]]:
    """Metadata that differs in every document, as prepare writes it for records with ids."""
    meta = {"id": key, "url": f"https://example.org/{key}", "pile_set_name": domain}
    return [(f"{key}.json", json.dumps({"text": text, "meta": meta}).encode())]


def two_members(key: str, text: str, domain: str) -> list[tuple[str, bytes]]:
    """A text and its metadata as two members."""
    meta = json.dumps({"meta": {"pile_set_name": domain}}).encode()
    return [(f"{key}.txt", text.encode()), (f"{key}.json", meta)]


CASES: dict[str, tuple[Callable[[str, str, str], list[tuple[str, bytes]]], float]] = {
    "json, metadata last": (pile, 0),
    "json, more metadata": (more_metadata, 0),
    "json, metadata first": (metadata_first, 0),
    "txt and json": (two_members, 0),
    # A time with a fraction makes tarfile (and webdataset's writer) put a pax header before every
    # member.
    "json, pax headers": (pile, 1.5),
}


def write_corpus(folder: Path, case: str, n_samples: int, n_tars: int) -> list[Path]:
    members, mtime = CASES[case]
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(3000)]
    paths = []
    for number in range(n_tars):
        paths.append(folder / f"{number:03d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for i in range(number, n_samples, n_tars):
                text = " ".join(rng.choices(words, k=rng.randrange(2000, 8000) // 6))
                for name, data in members(f"{i:09d}", text, rng.choice(DOMAINS)):
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(data), mtime  # type: ignore[assignment]
                    tar.addfile(info, BytesIO(data))
    return paths


def iterate(paths: list[Path]) -> int:
    return sum(1 for _ in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))


def scan(paths: list[Path], processes: int) -> int:
    return build_index(paths, processes=processes, progress=False).n_samples


def seconds(side: Callable[[], int], n_samples: int) -> float:
    """For one time over all samples."""
    start = time.perf_counter()
    n_found = side()
    elapsed = time.perf_counter() - start
    if n_found == n_samples:
        return elapsed
    if n_found == n_samples * TIMES_OVER:
        return elapsed / TIMES_OVER
    raise RuntimeError(f"found {n_found} samples of {n_samples}")


def measure(paths: list[Path], n_samples: int, rounds: int) -> dict[str, list[float]]:
    sides: dict[str, Callable[[], int]] = {
        "webdataset": lambda: iterate(paths),
        "scan": lambda: scan(paths, 1),
        "scan, 2 processes": lambda: scan(paths * TIMES_OVER, 2),
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # the first warms the page cache and the imports
        for name, side in sides.items():
            times[name].append(seconds(side, n_samples))
    return {name: values[1:] for name, values in times.items()}


def report(case: str, paths: list[Path], n_samples: int, times: dict[str, list[float]]) -> None:
    n_bytes = sum(path.stat().st_size for path in paths)
    print(f"\n{case}: {n_samples:,} samples, {n_bytes / 1e6:.0f} MB in {len(paths)} tars")
    base = statistics.median(times["webdataset"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(
            f"  {name:18s} {middle * 1e3:8.1f} ms ({min(values) * 1e3:.1f} to "
            f"{max(values) * 1e3:.1f})"
            f"  {n_samples / middle / 1e3:7.0f} k samples/s  {n_bytes / middle / 1e9:5.2f} GB/s"
            f"  {base / middle:5.1f} x webdataset"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first case only, 10k samples, 3 rounds"
    )
    parser.add_argument("--n_samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    cases = list(CASES)[:1] if args.quick else list(CASES)
    n_samples, rounds = (10_000, 3) if args.quick else (args.n_samples, args.rounds)
    packages = " ".join(
        f"{name} {version(name)}" for name in ("webdataset", "numpy", "google-crc32c", "msgspec")
    )
    cpus = len(os.sched_getaffinity(0))
    print(
        f"Python {platform.python_version()}, {packages}, {cpus} CPUs; {rounds} rounds, medians "
        "(least to most)"
    )
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            paths = write_corpus(Path(folder), case, n_samples, 2)
            report(case, paths, n_samples, measure(paths, n_samples, rounds))


if __name__ == "__main__":
    main()
