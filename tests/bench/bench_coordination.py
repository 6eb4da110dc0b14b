"""Cost of claims, heartbeats and the merge for a job of 512 ranks and 51,000 units of 100 s,
without a model.

    python tests/bench/bench_coordination.py [--quick] [--folder DIR]

Four of the ranks are this process's own and run gradproj's code: each walks through the units,
claims, commits a record of 4,096 rows (no shard: that is the rows' cost) and goes on, while the
other 508 leave the same files behind them, made as cheaply as can be. The clock is virtual: in
every round each rank finishes the unit it has and takes another, until none is left. CPU seconds
and file operations are those of the four, on a memory file system.

The merge is run on two sizes of store with all their records, which shows how it grows, and
extrapolated. Shares are of a rank's time (units a rank x 100 s). An operation on a network file
system is taken to last 1 ms; on a local disk it lasts microseconds, and is in the CPU seconds.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import print_machine

from gradproj.coordinator.heartbeats import (
    INTERVAL_S,
    ON_DISK,
    Heartbeat,
    RankProgress,
    read_heartbeats,
)
from gradproj.coordinator.merge import merge
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.progress import take_snapshot
from gradproj.coordinator.units import UnitQueue, UnitRows
from gradproj.store.layout import (
    FOLDERS,
    STATUS,
    STORE_NAME,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    plan_layout,
)
from gradproj.store.unit_record import UnitRecord, encode_record, record_name
from gradproj.store.writer import create_store

N_RANKS, N_UNITS, UNIT_S, NETWORK_S = 512, 51_000, 100.0, 1e-3
OBSERVED, ROWS, LAYERS, WIDTH = 4, 4096, 48, 256
EVENTS = {
    "open",
    "os.scandir",
    "os.listdir",
    "os.rename",
    "os.link",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the ranks and units")
    parser.add_argument(
        "--folder", help="where to work (default: /dev/shm, else a temporary folder)"
    )
    args = parser.parse_args()
    scale = 10 if args.quick else 1
    measure(
        N_RANKS // scale,
        N_UNITS // scale,
        (256, 512) if args.quick else (1_024, 4_096),
        args.folder,
    )


def measure(
    n_ranks: int, n_units: int, merged: tuple[int, int] = (1_024, 4_096), parent: str | None = None
) -> dict[str, float]:
    """Shares of a job's time, by what they are spent on."""
    print_machine()
    job_s = n_units / n_ranks * UNIT_S
    print(f"{n_ranks} ranks, {n_units:,} units of {UNIT_S:.0f} s: {job_s:,.0f} s a rank")
    shares: dict[str, float] = {}
    with Cost() as cost, temporary(parent) as folder:
        simulation = Simulation(folder, n_ranks, n_units)
        n_committed = simulation.run(cost)
        show("claim and commit of a unit", cost, n_committed, job_s / UNIT_S, job_s, shares)
        heartbeat = Heartbeat(folder / "heartbeats", simulation.queues[0].owner, RankProgress())
        repeat(cost, heartbeat.write, 200)
        show("heartbeat of a rank", cost, 200, job_s / INTERVAL_S, job_s, shares)
        display = (folder, simulation.layout, np.arange(n_units))
        repeat(cost, lambda: take_snapshot(*display, read_heartbeats(heartbeat.folder)), 5)
        show("rank 0's look at all others", cost, 5, job_s / ON_DISK.line_every_s, job_s, shares)
        repeat(cost, simulation.wait_once, 5)
        looks = UNIT_S / ON_DISK.wait_s[1]
        show("a look for units that come back, at the end", cost, 5, looks, job_s, shares)
    seconds = [merge_seconds(n, parent) for n in merged]
    per_unit = (seconds[1] - seconds[0]) / (merged[1] - merged[0])
    for n, took in zip(merged, seconds, strict=True):
        print(f"merge of {n:,} units: {took:.2f} s, {1e3 * took / n:.2f} ms a unit")
    shares["merge"] = (seconds[1] + per_unit * (n_units - merged[1])) / job_s
    print(
        f"merge of {n_units:,} units: {shares['merge'] * job_s:.1f} s, {100 * shares['merge']:.2f} "
        "% of a job"
    )
    shares["all"] = sum(shares.values())
    print(f"all of it, for rank 0 and on its local disk: {100 * shares['all']:.2f} % of a job")
    return shares


class Cost:
    """CPU seconds and file operations while it is counting."""

    def __init__(self) -> None:
        self.cpu_s, self.n_operations, self._counting = 0.0, 0, False
        sys.addaudithook(self._hook)
        self._stat = os.stat

    def __enter__(self) -> "Cost":
        def stat(*args: Any, **kwargs: Any) -> os.stat_result:
            self.n_operations += self._counting
            return self._stat(*args, **kwargs)

        os.stat = stat
        return self

    def __exit__(self, *_: object) -> None:
        os.stat = self._stat

    def _hook(self, event: str, _: object) -> None:
        if self._counting and event in EVENTS:
            self.n_operations += 1

    @contextmanager
    def counted(self) -> Iterator[None]:
        self._counting, started = True, time.process_time()
        try:
            yield
        finally:
            self.cpu_s += time.process_time() - started
            self._counting = False

    def take(self) -> tuple[float, int]:
        """Return the counts and reset them."""
        taken = self.cpu_s, self.n_operations
        self.cpu_s, self.n_operations = 0.0, 0
        return taken


def repeat(cost: Cost, work: Any, times: int) -> None:
    with cost.counted():
        for _ in range(times):
            work()


def show(
    what: str, cost: Cost, done: int, times: float, job_s: float, shares: dict[str, float]
) -> None:
    """One line.

    What it costs each time, how often a rank does it, and what share of its time that is.
    """
    cpu_s, n_operations = cost.take()
    shares[what] = cpu_s / done * times / job_s
    network = n_operations / done * times * NETWORK_S / job_s
    print(
        f"{what:44} {1e3 * cpu_s / done:8.3f} ms CPU  {n_operations / done:8.1f} file operations  "
        f"x {times:6,.0f}"
        f"  = {100 * shares[what]:6.3f} % of a rank  ({100 * network:6.3f} % where one takes 1 ms)",
        flush=True,
    )


class Waiting(Exception):
    """A rank has nothing to claim and is about to pause."""


class Simulation:
    """An output on which many ranks are at work; some of them are gradproj's own code."""

    def __init__(self, folder: Path, n_ranks: int, n_units: int) -> None:
        self.folder, self.n_ranks, self.n_units = folder, n_ranks, n_units
        self.layout = make_output(folder, n_units)
        me = Owner.this_process("bench", 0, 0)
        ranks = np.linspace(0, n_ranks - 1, OBSERVED).astype(int).tolist()
        self.owners = [
            replace(
                me,
                rank=rank,
                **({} if rank in ranks else {"host": f"node{rank // 8}", "boot_id": "other"}),
            )
            for rank in range(n_ranks)
        ]
        for owner in self.owners:
            Heartbeat(folder / "heartbeats", owner, RankProgress(batches=1)).write()
        self.queues = [
            UnitQueue(folder, self.layout, "x", np.arange(n_units), self.owners[rank])
            for rank in ranks
        ]
        self._others = [rank for rank in range(n_ranks) if rank not in ranks]
        self._pool = np.random.default_rng(0).permutation(n_units).tolist()
        self._taken: set[int] = set()
        self._running: dict[int, int] = {}
        (folder / "a record").write_bytes(encode_record(make_record(0, self.layout)))

    def run(self, cost: Cost) -> int:
        """Until no unit is left; how many units the observed ranks have committed."""
        walks = [queue.take() for queue in self.queues]
        now: list[int | None] = [None] * len(walks)
        committed = 0
        while len(self._pool) >= self.n_ranks:
            for rank in self._others:
                self._turn(rank)
            for i, (queue, walk) in enumerate(zip(self.queues, walks, strict=True)):
                rows = None if now[i] is None else UnitRows(make_record(now[i], self.layout), None)
                with cost.counted():
                    if rows is not None:
                        committed += queue.commit(rows)
                    now[i] = next(walk, None)
                self._taken.add(-1 if now[i] is None else now[i])
        for unit in (
            set(self._pool) - self._taken
        ):  # the last round ends with a unit in every rank's hands
            os.link(self.folder / "a record", self.folder / record_name(unit))
        return committed

    def _turn(self, rank: int) -> None:
        """Another rank commits its unit and claims the next."""
        unit = self._running.pop(rank, None)
        if unit is not None:
            os.link(self.folder / "a record", self.folder / record_name(unit))
            os.unlink(self.folder / "claims" / f"{unit:08d}.0")
        while self._pool and (unit := self._pool.pop()) in self._taken:
            unit = None
        if unit is not None and unit not in self._taken:
            self._taken.add(unit)
            self._running[rank] = unit
            (self.folder / "claims" / f"{unit:08d}.0").write_text(
                json.dumps(asdict(self.owners[rank]))
            )

    def wait_once(self) -> None:
        """One look of a rank that finds every unit claimed by another."""
        queue = UnitQueue(
            self.folder, self.layout, "x", np.arange(self.n_units), self.queues[0].owner
        )

        def waiting(_: float) -> None:
            raise Waiting

        queue._pause = waiting  # type: ignore[method-assign]
        try:
            unit = next(queue.take())
        except Waiting:
            return
        raise RuntimeError(f"unit {unit} was free")


def make_output(folder: Path, n_units: int) -> StoreLayout:
    """An output as rank 0 makes it."""
    for name in FOLDERS:
        (folder / name).mkdir()
    layout = plan_layout(
        n_units * ROWS, [WIDTH] * LAYERS, 12, StoreConfig(encoding="dense", rows_per_shard=ROWS)
    )
    layers = [
        asdict(LayerSlice(f"h.{i}", "Linear", 16, 16, 16, 16, i * WIDTH, (i + 1) * WIDTH))
        for i in range(LAYERS)
    ]
    attributes = {
        "layers": layers,
        "domains": ["a", "b"],
        "identity": {},
        "identity_hash": "x",
        "wanted_units": [[0, n_units]],
        "complete": False,
    }
    create_store(folder / STORE_NAME, layout, attributes, np.empty(0, np.float32))
    return layout


def make_record(unit: int, layout: StoreLayout) -> UnitRecord:
    """A unit's record as the projector makes it."""
    columns = empty_columns(ROWS, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    for name in ("loss", "grad_norm", "row_scale"):
        columns[name][:] = 1
    columns["n_tokens"][:], columns["domain"][:] = 500, 0
    stats = {
        "seconds": UNIT_S,
        "real_tokens": 2_000_000,
        "covariance_tokens": 2_000_000,
        "started_at": 0.0,
        "finished_at": 1.0,
    }
    covariances = {name: np.ones(LAYERS * WIDTH) for name in ("a", "s")}
    return UnitRecord(unit, unit * ROWS, "x", None, columns, stats, covariances)


def merge_seconds(n_units: int, parent: str | None) -> float:
    """CPU seconds of the merge of a store of so many units."""
    with temporary(parent) as folder:
        layout = make_output(folder, n_units)
        for unit in range(n_units):
            (folder / record_name(unit)).write_bytes(encode_record(make_record(unit, layout)))
        started = time.process_time()
        queue = UnitQueue(
            folder, layout, "x", np.arange(n_units), Owner.this_process("bench", 0, 0)
        )
        assert queue.claims.try_claim("merge")
        assert merge(folder, queue.claims)["complete"]
        return time.process_time() - started


@contextmanager
def temporary(parent: str | None) -> Iterator[Path]:
    shared_memory = Path("/dev/shm")
    parent = parent or (str(shared_memory) if shared_memory.is_dir() else None)
    folder = Path(tempfile.mkdtemp(prefix="bench_coordination_", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
