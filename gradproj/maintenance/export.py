"""Exports rows as files of earlier GradProjLora code: numbered ``.pt`` and ``metadata.json``."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.engine.projection_files import write_projection_file
from gradproj.errors import ConfigError, StoreError
from gradproj.files import existing_ancestor
from gradproj.flags import flag
from gradproj.job.recorded_args import ReadingArgs, output_flag
from gradproj.store import STATUS, HiddenStates, ProjectionStore
from gradproj.store.hidden_states import HIDDEN_STATE
from gradproj.store.layout import METADATA_NAME


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ReadingArgs, title="files"):
    """Which rows to write where."""

    output: str = output_flag()
    to: str = flag(
        "Local directory for the files; new or empty.",
        required="give a folder for the files",
        path="DIR",
    )
    format: str = flag("pt: the .pt files of earlier GradProjLora code.", "pt", choices=("pt",))
    rows_per_file: int = flag("Number of rows in a file.", 4096, minimum=1)
    ids: str = flag(
        "START:STOP: export these sample ids only; STOP is excluded.", "", metavar="START:STOP"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ids and not re.fullmatch(r"\d*:\d*", self.ids):
            raise ConfigError(
                f"--ids is {self.ids!r}; give START:STOP, such as 0:1000 (STOP is excluded, "
                "either may be left out)"
            )

    def id_range(self, n_samples: int) -> tuple[int, int]:
        """Return ``[start, stop)`` of ``--ids``; ``ConfigError`` if the store has none of them."""
        first, _, last = self.ids.partition(":")
        start, stop = int(first or 0), int(last or n_samples)
        if stop > n_samples or start >= n_samples:
            raise ConfigError(
                f"--ids {self.ids}: the store has {n_samples:,} samples, ids 0:{n_samples}"
            )
        if start >= stop:
            raise ConfigError(f"--ids {self.ids}: START must be less than STOP")
        return start, stop


_BLOCK = 2**17
"""Samples whose status is read and turned into ids at once."""


@dataclass(frozen=True)
class Export:
    """Rows that an export will write. Rows that are not ok are left out."""

    start: int
    stop: int
    rows_per_file: int
    ok: np.ndarray
    """``(stop - start,)`` bool: whether the sample's row is written."""
    n_rows: int
    left_out: dict[str, int]
    """Status -> number of rows left out for it."""
    n_bytes: int

    @property
    def n_files(self) -> int:
        return -(-self.n_rows // self.rows_per_file)

    def ids_of_files(self) -> Iterator[np.ndarray]:
        """Yield the sample ids of each file's rows, sorted int64."""
        waiting = np.empty(0, np.int64)
        for first in range(0, len(self.ok), _BLOCK):
            found = np.flatnonzero(self.ok[first : first + _BLOCK])
            waiting = np.concatenate([waiting, self.start + first + found])
            while len(waiting) >= self.rows_per_file:
                yield waiting[: self.rows_per_file]
                waiting = waiting[self.rows_per_file :]
        if len(waiting):
            yield waiting


def plan_export(store: ProjectionStore, config: ExportConfig) -> Export:
    """Count the rows to write and check that they can be written; writes nothing.

    Raises:
        ConfigError: ``--ids`` is out of range.
        StoreError: ``--to`` is not empty, no row is ok, or the disk is too full.
    """
    start, stop = config.id_range(len(store))
    target = Path(config.to)
    if target.exists() and not target.is_dir():
        raise StoreError(f"--to {target} is a file; give a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise StoreError(f"--to {target} is not empty; give a new folder")
    # A whole column of a large corpus takes gigabytes.
    ok, counts = np.empty(stop - start, bool), np.zeros(256, np.int64)
    for first in range(start, stop, _BLOCK):
        status = store.column("status", first, min(first + _BLOCK, stop))
        ok[first - start :][: len(status)] = status == STATUS["ok"]
        counts += np.bincount(status, minlength=256)
    n_rows = int(counts[STATUS["ok"]])
    left_out = {
        name: int(counts[code]) for name, code in STATUS.items() if name != "ok" and counts[code]
    }
    n_bytes = n_rows * (store.dim * 4 + 2 * store.layout.hidden_width + 8)
    export = Export(start, stop, config.rows_per_file, ok, n_rows, left_out, n_bytes)
    if not n_rows:
        raise StoreError(
            f"{store.path}: none of the samples {start} to {stop - 1} has an ok row to export"
        )
    free = shutil.disk_usage(existing_ancestor(target)).free
    if export.n_bytes > free:
        raise StoreError(
            f"--to {target}: the export needs {export.n_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} "
            "GB are free. Free space, choose another folder, or fewer --ids"
        )
    return export


def write_export(store: ProjectionStore, config: ExportConfig, export: Export) -> Iterator[Path]:
    """Write the files, then ``metadata.json``; yields each path once it is written.

    Holds the rows of one file in memory, and one byte a sample. If the export fails or is
    interrupted, its files are deleted.

    Raises:
        StoreError: the folder cannot be written, or the disk is full.
    """
    target = Path(config.to)
    existed = target.exists()
    try:
        with _explained(target):
            target.mkdir(parents=True, exist_ok=True)
        # A job's rows are at their sample ids; a training run's store has a column of them.
        has_column = (store.path / "sample_id").is_dir()
        sample_ids = store.array("sample_id") if has_column else None
        hidden = HiddenStates(store.path) if store.layout.hidden_width else None
        for number, ids in enumerate(export.ids_of_files(), 1):
            rows = store.rows(ids)
            lost = ids[np.isnan(rows[:, 0])]
            if len(lost):
                raise StoreError(
                    f"{store.path}: the row of sample {lost[0]} is recorded as ok and is missing. "
                    "Run `python -m gradproj verify` to see all damage"
                )
            named = ids if sample_ids is None else sample_ids[ids]
            with _explained(target):
                states = {} if hidden is None else {HIDDEN_STATE: _half(hidden.rows(ids))}
                tensors = torch.from_numpy(rows), torch.from_numpy(named)
                path = write_projection_file(target, number, *tensors, **states)
            yield path
        with _explained(target):
            path = target / METADATA_NAME
            path.write_text(json.dumps(original_metadata(store), indent=2) + "\n")
        yield path
    except BaseException:
        for path in (*target.glob("proj_iter_*"), target / METADATA_NAME):
            path.unlink(missing_ok=True)
        if not existed and target.is_dir():
            target.rmdir()
        raise


def _half(states: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(states).half()


@contextlib.contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError of torch's file writer
        why = error.strerror if isinstance(error, OSError) else str(error).split("\n")[0]
        raise StoreError(
            f"--to {target} cannot be written: {why}. Nothing was kept there; free space, fix the "
            "permissions, or choose another folder"
        ) from error


def original_metadata(store: ProjectionStore) -> dict[str, Any]:
    """Return ``metadata.json`` of earlier GradProjLora code, with layers in this store's order.

    That code sorts layers by name and derives its matrices from seeds. Here the slices give the
    order, and the store holds the matrices (``ProjectionStore(...).projection_matrices``) and the
    basis (``.basis``): the exported rows are those of ``rows()``.
    """
    projection = store.attributes.get("projection", {})
    layers = store.attributes["layers"]
    return {
        "engine": "GradProjLora",
        "proj_seed": projection.get("seed"),
        "proj_dtype": "float32",
        "proj_method": projection.get("kind"),
        "proj_rank_total": projection.get("rank_total"),
        "proj_rank_min": projection.get("rank_min"),
        "total_proj_dim": store.dim,
        "layers": [{**layer, "k_total": layer["k_i"] * layer["k_o"]} for layer in layers],
        "matrices": "the store's array projection_matrices; they do not follow from proj_seed",
        "written_by": "gradproj",
        "store": str(store.path.resolve()),
        "identity_hash": store.attributes.get("identity_hash"),
        "encoding": store.layout.stored_as,
        "basis": store.attributes.get("basis", {"kind": "random"}),
    }
