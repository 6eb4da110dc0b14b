"""Fill stores without a model, and interrupt the processes that fill them."""

import dataclasses
import itertools
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from helpers.encoding import encode_rows

from gradproj.coordinator.merge import finish
from gradproj.coordinator.partial_rows import PartialRows
from gradproj.coordinator.process_id import Owner, process_start
from gradproj.coordinator.units import UnitQueue, UnitRows
from gradproj.storage.contents import sum_of
from gradproj.store.layout import (
    FOLDERS,
    STATUS,
    STORE_NAME,
    LayerSlice,
    StoreConfig,
    empty_columns,
    plan_layout,
)
from gradproj.store.unit_record import UnitRecord, list_records, read_record, record_name
from gradproj.store.writer import create_store, pack_matrices

IDENTITY = "identity"
LAYERS = [
    LayerSlice("h.0.mlp", "Linear", 5, 6, 2, 3, 0, 6),
    LayerSlice("h.1.mlp", "Linear", 5, 6, 2, 3, 6, 12),
]
"""Two layers of 2 x 3 values."""


def make_store(
    output: Path, n_samples: int = 40, rows_per_shard: int = 16, identity: str = IDENTITY
):
    """Create an output with an empty store, as a start leaves it. Returns the layout."""
    layout = plan_layout(
        n_samples, [6, 6], 12, StoreConfig(encoding="dense", rows_per_shard=rows_per_shard)
    )
    for folder in FOLDERS:
        (output / folder).mkdir(parents=True, exist_ok=True)
    matrices = {
        layer.name: (np.ones((layer.k_i, layer.n_i)), np.ones((layer.k_o, layer.n_o)))
        for layer in LAYERS
    }
    attributes = {
        "layers": [dataclasses.asdict(layer) for layer in LAYERS],
        "domains": ["a", "b"],
        "identity_hash": identity,
        "store_id": secrets.token_hex(16),
        "wanted_units": [[0, layout.n_units]],
        "complete": False,
    }
    create_store(output / STORE_NAME, layout, attributes, pack_matrices(LAYERS, matrices))
    return layout


def fake_rows(layout: Any, unit: int, writer: int = 0, identity: str = IDENTITY) -> UnitRows:
    """Return a unit's rows. Another writer's differ, as on devices that are not deterministic."""
    start, stop = layout.unit_range(unit)
    generator = np.random.default_rng([unit, writer])
    stored, scale = encode_rows(
        generator.standard_normal((stop - start, layout.dim), np.float32), layout.proj_dtype
    )
    columns = empty_columns(stop - start, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    columns["row_scale"][:] = scale
    columns["loss"][:] = writer
    columns["grad_norm"][:] = 1
    columns["n_tokens"][:] = 3
    columns["tar"][:] = unit
    columns["domain"][:] = np.arange(start, stop) % 2
    columns["key"][:, 0] = 65 + np.arange(start, stop) % 26
    stats = {
        "seconds": 1.0,
        "started_at": 0.0,
        "finished_at": 1.0,
        "real_tokens": 4,
        "covariance_tokens": 3,
    }
    covariances = {
        "a": generator.standard_normal(8, np.float32),
        "s": generator.standard_normal(18, np.float32),
    }
    return UnitRows(UnitRecord(unit, start, identity, None, columns, stats, covariances), stored)


def fake_owner(number: int, **changes: Any) -> Owner:
    """Return an owner on another machine, of which only the heartbeat is visible."""
    here = Owner.this_process(f"job{number}", 0, number)
    away = {"host": f"host{number}", "machine": f"machine{number}", "boot_id": f"boot{number}"}
    return dataclasses.replace(here, **{**away, **changes})


def dead_owner(**changes: Any) -> Owner:
    """Return the owner of a process of this machine that has exited."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    identity = {"pid": process.pid, "pid_start": process_start(process.pid)}
    process.communicate(b"\n")
    return dataclasses.replace(Owner.this_process("gone", 0, 0), **identity, **changes)


def fill(output: Path, layout: Any, owner: Owner, writer: int = 0, **options: Any) -> bool:
    """Do a rank's work without a model. Returns whether the store is complete."""
    queue = UnitQueue(output, layout, IDENTITY, range(layout.n_units), owner, **options)
    try:
        for unit in queue.take():
            queue.commit(fake_rows(layout, unit, writer))
        return finish(output, queue.claims, wait=True)
    finally:
        queue.release()


def inconsistent_units(output: Path, layout: Any) -> list[str]:
    """List units whose record does not match their shard, or with rows of two writers."""
    problems = []
    for unit in list_records(output / "units").tolist():
        record = read_record(output / record_name(unit))
        if record.shard != sum_of(output / layout.shard_name(unit)):
            problems.append(f"unit {unit}: the shard is not its record's")
        if len(set(record.columns["loss"].tolist())) != 1:
            problems.append(f"unit {unit}: rows of several writers")
    return problems


# --- interruptions ---

CHANGING = ("fsync", "link", "mkdir", "remove", "rename", "replace", "rmdir", "unlink")
"""Functions of ``os`` that change the disk or sync it."""


@contextmanager
def before_each_change(hook: Callable[[str, tuple], None]) -> Iterator[None]:
    """Call ``hook(function name, arguments)`` before every change of the disk, in any thread."""
    originals = {name: getattr(os, name) for name in CHANGING}

    def interposed(name: str) -> Callable:
        def change(*args: Any, **options: Any) -> Any:
            hook(name, args)
            return originals[name](*args, **options)

        return change

    try:
        for name in CHANGING:
            setattr(os, name, interposed(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@contextmanager
def at_change(number: int, action: Callable[[], None]) -> Iterator[itertools.count]:
    """Call ``action`` once, before this thread's change ``number``. Yields a count of changes."""
    thread, counter, busy = threading.get_ident(), itertools.count(), []

    def hook(name: str, args: tuple) -> None:
        if threading.get_ident() == thread and not busy and next(counter) == number:
            busy.append(True)
            try:
                action()
            finally:
                busy.clear()

    with before_each_change(hook):
        yield counter


def partial_rows(first: int = 0, n: int = 3) -> PartialRows:
    """Return what a unit of 16 documents may have saved: some finished rows, and one sum."""
    generator = np.random.default_rng(first)
    by_row = {
        name: generator.normal(size=16).astype(np.float32)
        for name in ("row_scale", "norms", "losses")
    }
    sums = {"a": generator.normal(size=4), "s": generator.normal(size=4), "n_tokens": np.array(12)}
    return PartialRows(
        np.arange(first, first + n),
        generator.integers(0, 256, (n, 10), np.uint8),
        np.array([first + n]),
        generator.normal(size=(1, 5)).astype(np.float32),
        by_row,
        np.array([7]),
        sums,
    )
