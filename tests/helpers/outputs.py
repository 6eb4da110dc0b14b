"""The output of a real one-process job, and every damage that can happen to a copy of it."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import zarr
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import run_job
from helpers.models import make_model

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.merge import write_metadata
from gradproj.coordinator.process_id import Owner, process_start
from gradproj.corpus.index import build_index
from gradproj.corpus.index_file import save_index
from gradproj.corpus.tar.paths import list_tars
from gradproj.store.layout import COLUMNS, STATUS
from gradproj.store.metadata import read_layout
from gradproj.store.unit_record import encode_record, read_record, record_name
from gradproj.store.writer import update_attributes, write_array

N_SAMPLES, ROWS_PER_UNIT, N_UNITS = 70, 16, 5
EMPTY, ONE_TOKEN = 5, 20
"""Sample ids of a document without text and of one without a target token."""

SETTINGS = {"proj_rank_total": 16, "proj_rank_min": 2, "max_length": 24, "batch_size": 8}


def finished_job(root: Path) -> SimpleNamespace:
    """Run a job to its end below ``root``: ``output``, ``corpus``, ``model``."""
    documents = mixed_documents(N_SAMPLES)
    documents[EMPTY]["text"] = ""
    documents[ONE_TOKEN]["text"] = "t"
    corpus, model = make_corpus(root / "tars", documents), make_model(root / "model")
    run_job(1, shards=corpus, model=model, output_dir=root / "out", **SETTINGS)
    return SimpleNamespace(output=root / "out", corpus=corpus, model=model)


def copy_of(output: Path, tmp_path: Path) -> Path:
    # Without what queries of other tests keep beside the shared job.
    queries_keep = shutil.ignore_patterns("preconditioners", "text", "columns")
    return Path(shutil.copytree(output, tmp_path / "out", ignore=queries_keep))


def unmerge(output: Path) -> None:
    """Undo the merge: no columns, no sums."""
    store = output / "projections.zarr"
    for name in COLUMNS:
        for chunk in (store / name).glob("c.*"):
            chunk.unlink()
    for path in store.glob("token_covariance_*"):
        shutil.rmtree(path)
    (output / "projection_stats.json").unlink()
    update_attributes(store, {"complete": False, "units_recorded": 0, "covariance_tokens": 0})
    write_metadata(output)


def uncommit(output: Path, *units: int) -> None:
    """Undo the merge and these units."""
    unmerge(output)
    layout = read_layout(output / "projections.zarr")
    for unit in units:
        (output / record_name(unit)).unlink()
        (output / layout.shard_name(unit)).unlink()


def change_record(output: Path, unit: int, /, place: int | None = None, **changes: object) -> None:
    """Rewrite a unit's record, or unit ``place``'s, with other fields and a valid checksum."""
    path = output / record_name(unit)
    record = read_record(path)
    statuses = changes.pop("statuses", {})
    columns = {name: np.array(values) for name, values in record.columns.items()}
    for row, code in statuses.items():
        columns["status"][row] = code
    path = path if place is None else output / record_name(place)
    path.write_bytes(encode_record(replace(record, columns=columns, **changes)))


def flip_byte(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def sleeping_process() -> subprocess.Popen:
    """Start a process that waits until the caller kills it or has ended itself."""
    return subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)


def owner_of(process: subprocess.Popen, rank: int = 1) -> Owner:
    """Return the owner that a rank with this process's pid would write."""
    here = Owner.this_process("job", 0, rank)
    return replace(here, pid=process.pid, pid_start=process_start(process.pid))


def write_claim(output: Path, name: str, owner: Owner | None, released: bool = False) -> None:
    content = {"released": True} if released else None if owner is None else asdict(owner)
    (output / "claims" / name).write_text("torn" if content is None else json.dumps(content))


def write_heartbeat(output: Path, owner: Owner, progress: RankProgress) -> Path:
    path = output / "heartbeats" / f"{owner.name}.json"
    path.write_text(json.dumps({"owner": asdict(owner), "progress": asdict(progress)}))
    return path


def shard_of(output: Path, unit: int) -> Path:
    return output / "projections.zarr" / "projections" / f"c.{unit}.0"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def statuses_by_zarr(output: Path) -> dict[str, int]:
    """Count rows by status, as plain zarr reads the merged column."""
    values = zarr.open_group(output / "projections.zarr", mode="r")["status"][...]
    names = {code: name for name, code in STATUS.items()}
    return {
        names[code]: int(n) for code, n in zip(*np.unique(values, return_counts=True), strict=True)
    }


def tree_of(folder: Path) -> dict[str, str]:
    """Return every path below a folder with its time and a hash of its content."""
    files = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        files[os.fspath(path)] = f"{path.stat().st_mtime_ns} {hashlib.sha256(data).hexdigest()}"
    return files


def swap_corpus(output: Path) -> None:
    (output / "corpus.json").unlink()
    corpus = make_corpus(output.parent / "other", mixed_documents(3, seed=9))
    save_index(build_index(list_tars(str(corpus)), progress=False), output / "corpus.json")


DAMAGES = {
    "a flipped bit in a shard": (
        lambda o: flip_byte(shard_of(o, 1), 100), "unit", 1, "has the checksum",
    ),
    "a shard cut short": (lambda o: cut(shard_of(o, 1)), "unit", 1, "bytes, its record says"),
    "a shard deleted": (lambda o: shard_of(o, 1).unlink(), "unit", 1, "is gone"),
    "a flipped bit in a record": (
        lambda o: flip_byte(o / record_name(1)), "unit", 1, "damaged (torn or alt",
    ),
    "a record cut short": (
        lambda o: cut(o / record_name(1)), "unit", 1, "damaged (torn or altered",
    ),
    "an empty record": (
        lambda o: (o / record_name(1)).write_bytes(b""), "unit", 1, "damaged (torn or altered",
    ),
    "a merged unit's record deleted": (
        lambda o: (o / record_name(1)).unlink(), "unit", 1, "was merged",
    ),
    "another unit's record": (
        lambda o: change_record(o, 2, place=1), "unit", 1, "is the record of unit 2",
    ),
    "a record of other settings": (
        lambda o: change_record(o, 1, identity="other"), "unit", 1, "other settings",
    ),
    "a record that starts elsewhere": (
        lambda o: change_record(o, 1, start=0), "unit", 1, "starts at sample 0",
    ),
    "a record without its shard": (
        lambda o: change_record(o, 1, shard=None), "unit", 1, "names no shard",
    ),
    "a record without statuses": (
        lambda o: change_record(o, 1, statuses={4: 0}), "unit", 1, "documents without a status",
    ),
    "a record of no unit": (
        lambda o: change_record(o, 1, place=99, unit=99), "unit", 99, "does not want",
    ),
    "a column changed": (
        lambda o: flip_byte(o / "projections.zarr" / "n_tokens" / "c.0", 4 * 37),
        "columns", 2, "first at sample 37",
    ),
    "a column cut short": (
        lambda o: cut(o / "projections.zarr" / "key" / "c.0.0"),
        "columns", 0, "it has 950 bytes, not those of",
    ),
    "a column deleted": (
        lambda o: (o / "projections.zarr" / "loss" / "c.0").unlink(),
        "columns", 0, "first at sample 0",
    ),
    "statuses deleted": (
        lambda o: (o / "projections.zarr" / "status" / "c.0").unlink(),
        "columns", 0, "never merged",
    ),
    "a sum changed": (
        lambda o: write_array(o / "projections.zarr", "token_covariance_a", np.zeros(3)),
        "columns", None, "not the sum of the records' covariances",
    ),
    "matrices that are not finite": (
        lambda o: write_array(
            o / "projections.zarr", "projection_matrices", np.full(10**5, np.nan, np.float32)
        ),
        "other", None, "that are not finite",
    ),
    "metadata changed": (
        lambda o: (o / "metadata.json").write_text("{}"), "other", None, "not a copy",
    ),
    "metadata torn": (
        lambda o: (o / "metadata.json").write_text("{"), "other", None, "cannot be read: Expecting",
    ),
    "the index of another corpus": (swap_corpus, "other", None, "index of another corpus"),
    "a torn index": (lambda o: cut(o / "corpus.json"), "other", None, "torn corpus index"),
}  # fmt: skip
"""Name -> (damage to an output, then of the finding: kind, unit, part of the message)."""
