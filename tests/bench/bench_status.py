"""Time of ``python -m gradproj status`` on a store of the Pile's size that was never computed.

    python tests/bench/bench_status.py [--units 51000] [--folder DIR]

The store has 4,096 rows a unit. Every record is a link to one file of 130 kB, so its content lies
in the page cache: what a slow file system adds is the folder listings, the claims and heartbeats,
and fewer records counted in the second that is given to them. Times are those of the whole command
with the interpreter's start, medians of 5.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.process_id import Owner
from gradproj.store.layout import (
    STATUS,
    STORE_NAME,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    plan_layout,
)
from gradproj.store.unit_record import UnitRecord, encode_record, record_name
from gradproj.store.writer import create_store, update_attributes

ROWS_PER_UNIT, WIDTH, N_RANKS, ROUNDS = 4096, 256, 256, 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--units", type=int, default=51_000)
    parser.add_argument("--folder", help="where to make the store (default: a temporary folder)")
    args = parser.parse_args()
    output = Path(tempfile.mkdtemp(prefix="bench_status_", dir=args.folder))
    try:
        layout = make_output(output, args.units)
        print(f"{layout.n_units:,} units of {ROWS_PER_UNIT:,} rows, {layout.n_samples:,} documents")
        measure("nothing committed", output)
        commit(output, layout, range(layout.n_units // 2))
        work(output, range(layout.n_units // 2, layout.n_units // 2 + N_RANKS))
        measure(f"half committed, {N_RANKS} ranks at work", output)
        measure(f"half committed, {N_RANKS} ranks at work", output, "--no-rows")
        commit(output, layout, range(layout.n_units // 2, layout.n_units))
        measure("all committed, not merged", output)
        merge(output, layout)
        measure("complete", output)
    finally:
        shutil.rmtree(output)


def make_output(output: Path, n_units: int) -> StoreLayout:
    config = StoreConfig(encoding="dense", rows_per_shard=ROWS_PER_UNIT)
    layout = plan_layout(n_units * ROWS_PER_UNIT, [WIDTH] * 48, 8, config)
    layers = [
        LayerSlice(f"h.{i}", "Linear", 16, 16, 16, 16, i * WIDTH, (i + 1) * WIDTH)
        for i in range(48)
    ]
    attributes = {
        "layers": [asdict(layer) for layer in layers],
        "domains": ["one"],
        "identity_hash": "x",
        "wanted_units": [[0, n_units]],
        "complete": False,
    }
    create_store(output / STORE_NAME, layout, attributes, np.zeros(48 * 512, np.float32))
    for name in ("units", "claims", "heartbeats", "partial", "tmp", "logs"):
        (output / name).mkdir()
    return layout


def commit(output: Path, layout: StoreLayout, units: range) -> None:
    columns = empty_columns(ROWS_PER_UNIT, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    first = output / record_name(units[0])
    first.write_bytes(
        encode_record(UnitRecord(units[0], units[0] * ROWS_PER_UNIT, "x", None, columns))
    )
    for unit in units[1:]:
        os.link(first, output / record_name(unit))


def work(output: Path, units: range) -> None:
    """Claims and heartbeats of ranks of another host, and partial rows of every fourth."""
    for rank, unit in enumerate(units):
        owner = Owner("job", 0, rank, f"node{rank // 8}", "boot", 1000 + rank, 1)
        (output / "claims" / f"{unit:08d}.0").write_text(json.dumps(asdict(owner)))
        beat = {
            "owner": asdict(owner),
            "progress": asdict(RankProgress(batches=9, unit=unit, unit_samples=99, seconds=9)),
        }
        (output / "heartbeats" / f"{owner.name}.json").write_text(json.dumps(beat))
        if rank % 4 == 0:
            folder = output / "partial" / f"{unit:08d}"
            folder.mkdir()
            (folder / "000000-000009.00000000.safetensors").write_bytes(b"")


def merge(output: Path, layout: StoreLayout) -> None:
    block = np.full(layout.column_rows, STATUS["ok"], np.uint8).tobytes()
    for number in range(layout.n_column_blocks):
        (output / STORE_NAME / "status" / f"c.{number}").write_bytes(block)
    update_attributes(output / STORE_NAME, {"complete": True})


def measure(label: str, output: Path, *flags: str) -> None:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "gradproj", "status", str(output), *flags],
            capture_output=True,
            text=True,
        )
        seconds.append(time.perf_counter() - started)
    rows = next((line for line in done.stdout.splitlines() if line.startswith("rows")), "")
    print(f"{' '.join([label, *flags]):<50} {statistics.median(seconds):6.2f} s  {rows}")


if __name__ == "__main__":
    main()
