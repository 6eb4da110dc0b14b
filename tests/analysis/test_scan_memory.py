"""Peak memory of a scan, mapped files included, depends on its blocks and not on the store."""

import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from helpers.encoding import encode_rows
from helpers.stores import make_layers

from gradproj.files import write_file_durably
from gradproj.store import STATUS
from gradproj.store.layout import StoreConfig, empty_columns, plan_layout
from gradproj.store.writer import (
    create_store,
    shard_chunks,
    update_attributes,
    write_array,
    write_column_block,
)

N_LAYERS, SIDE, N_ROWS = 64, 8, 36_864
STORE_BYTES = N_LAYERS * SIDE**2 * N_ROWS * 2  # 302 MB
MAX_BYTES = 100e6

CHILD = """
import json, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, self_influence, top_k

def bytes_of(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def exhaust(items):
    for _ in items:
        pass

store = ProjectionStore(sys.argv[1])
queries = np.random.default_rng(0).standard_normal((16, store.dim), np.float32)
layers = [store.layers[5].name]
fitted = Preconditioner.fit(store)
works = {
    "dot": lambda: top_k(queries, store, score="dot"),
    "kfac": lambda: top_k(queries, store, score="kfac", preconditioner=fitted),
    "cosine": lambda: top_k(queries, store, score="cosine"),
    "a layer": lambda: top_k(queries[:, :64], store, score="dot", layers=layers),
    "self_influence": lambda: self_influence(store, score="dot"),
    "fit": lambda: Preconditioner.fit(store, "second_moment"),
    "scan": lambda: exhaust(store.scan()),
    "scan_stored": lambda: exhaust(store.scan_stored()),
    "rows": lambda: exhaust(store.rows(range(at, at + 1024)) for at in range(0, len(store), 1024)),
}
peaks = {}
for name, work in works.items():
    exhaust(store.scan_bands(512, layers, 0, 512))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = bytes_of("VmRSS")
    work()
    peaks[name] = bytes_of("VmHWM") - before
print(json.dumps(peaks))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    output = tmp_path_factory.mktemp("large")
    path = output / "projections.zarr"
    layers = make_layers([(SIDE, SIDE)] * N_LAYERS)
    layout = plan_layout(
        N_ROWS, [SIDE**2] * N_LAYERS, 8, StoreConfig(encoding="dense", rows_per_shard=4096)
    )
    create_store(
        path,
        layout,
        {"layers": [asdict(x) for x in layers], "domains": []},
        np.empty(0, np.float32),
    )
    rows = np.random.default_rng(1).standard_normal((4096, layout.dim), np.float32)
    stored, row_scale = encode_rows(rows, "float16")
    for unit in range(layout.n_units):
        write_file_durably(
            output / layout.shard_name(unit), shard_chunks(np.roll(stored, unit, axis=0), layout)
        )
    columns = empty_columns(N_ROWS, layout.key_bytes)
    columns["status"][:] = STATUS["ok"]
    columns["row_scale"][:] = np.tile(row_scale, layout.n_units)
    write_column_block(path, layout, 0, columns)
    for side in "as":
        write_array(path, f"token_covariance_{side}", np.tile(np.eye(SIDE).ravel(), N_LAYERS))
    update_attributes(path, {"covariance_tokens": 1})
    return output


def test_scans_use_bounded_memory(large):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(large)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert STORE_BYTES > 3 * MAX_BYTES
    assert {name: n_bytes for name, n_bytes in taken.items() if n_bytes > MAX_BYTES} == {}
