"""Copies an output between disks and buckets: whole, checked, and from where a killed copy stopped.

A job may work on the output meanwhile: what is copied is the output as it was when the copy began.
Units are committed once and do not change, so those that were recorded then are copied, shards
before records. Everything else that readers need is written by the merge, under its claim: a copy
during which a merge ran is an error. The store's own ``zarr.json`` goes last, and until then there
is no store. Claims and heartbeats tell of processes of that place, and are left out.
"""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.merge import MERGE_CLAIM
from gradproj.errors import StoreError
from gradproj.formatting import shown
from gradproj.maintenance.job_output import Output, read_output
from gradproj.maintenance.liveness import read_activity
from gradproj.storage.contents import files_below
from gradproj.storage.copying import copy_file, size_or_none
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import in_bucket, names_in, path_of
from gradproj.storage.probe import PROBE_DIR
from gradproj.storage.publish import PREPARED_DIR, replace
from gradproj.store.hidden_states import sharded_layouts
from gradproj.store.layout import (
    CLAIMS_DIR,
    HEARTBEATS_DIR,
    SCRATCH_DIR,
    STORE_NAME,
    UNITS_DIR,
)
from gradproj.store.metadata import read_attributes
from gradproj.store.unit_record import decode_record, is_given_up, list_records, record_name

MARKER_NAME = "copy.json"
"""File of a copy that is not finished: which store it is of."""
GROUP = f"{STORE_NAME}/zarr.json"
_OF_PROCESSES = {CLAIMS_DIR, HEARTBEATS_DIR, SCRATCH_DIR, PREPARED_DIR, PROBE_DIR}
_AT_ONCE = 4


@dataclass
class Copied:
    """Result of a copy."""

    n_units: int = 0
    n_units_there: int = 0
    """Units that an earlier copy had copied."""
    n_files: int = 0
    """Files besides the units'."""
    n_bytes: int = 0
    seconds: float = 0.0
    n_missing: int = 0
    """Units that the source has not computed yet."""


def copy_output(source: str | Path, to: str, read_back: bool = True) -> Copied:
    """Copy an output; a second call continues a killed one, or adds what is new.

    Args:
        source: the output, finished or not.
        to: a new or empty place, or one with an earlier copy.
        read_back: read every copy again, and compare its checksum.

    Raises:
        StoreError: there is no store, it is damaged or being merged, ``to`` holds something else,
            or cannot be written.
    """
    output, final = read_output(source), path_of(to)
    copier = _Copier(output, final, read_back)
    started = time.monotonic()
    copier.begin()
    copier.copy_units()
    copier.copy_files()
    copier.result.seconds = time.monotonic() - started
    return copier.result


class _Copier:
    def __init__(self, output: Output, final: Path, read_back: bool) -> None:
        self.output, self.final, self._read_back = output, final, read_back
        self.result = Copied(n_missing=len(output.missing))
        self._layouts = list(sharded_layouts(output.layout))
        self._seen = self._merge_state()

    def begin(self) -> None:
        """Check both places, and mark the copy as begun."""
        self._refuse_merge()
        source, final = self.output.path, self.final
        if isinstance(final, type(source)) and (
            final == source or final.is_relative_to(source) or source.is_relative_to(final)
        ):
            raise StoreError(f"{final} is in {source}, or the other way round: give another place")
        self._check_final()
        content = json.dumps(_identity(self.output.attributes)).encode()
        final.mkdir(parents=True, exist_ok=True)
        replace(final / MARKER_NAME, [content])

    def _check_final(self) -> None:
        final, ours = self.final, _identity(self.output.attributes)
        marker = read_or_none(final / MARKER_NAME)
        has_store = (final / GROUP).is_file()
        if marker is None and not has_store:
            if names_in(final):
                raise StoreError(f"{final} is not empty, and no copy of a store: give a new place")
            return
        theirs = _identity(read_attributes(final / STORE_NAME)) if has_store else None
        if theirs is None and marker is not None:
            try:
                theirs = json.loads(marker)
            except ValueError:
                theirs = None
        if theirs != ours:
            raise StoreError(
                f"{final} holds another store than {self.output.path}: give a new place"
            )
        more = np.setdiff1d(list_records(final / UNITS_DIR), self.output.recorded)
        if len(more) or names_in(final / CLAIMS_DIR):
            raise StoreError(
                f"{final} is no mere copy of {self.output.path} any more: a job or a repair "
                f"has worked on it, or units of {self.output.path} were repaired since. Give a new "
                "place"
            )

    # --- units ---

    def copy_units(self) -> None:
        """Copy the units that had a record when the copy began."""
        units = self.output.recorded.tolist()
        for n_bytes in shown(self._each(self._copy_unit, units), len(units), "copy", "units"):
            if n_bytes is None:
                self.result.n_units_there += 1
            else:
                self.result.n_units += 1
                self.result.n_bytes += n_bytes

    def _copy_unit(self, unit: int) -> int | None:
        """Copy a unit; return its bytes, None if it was there already."""
        name = record_name(unit)
        path = self.output.path / name
        data = read_or_none(path)
        if data is None or (in_bucket(path) and is_given_up(data)):
            raise self._gone(name)
        record = decode_record(data, path)
        shards = {
            layout.shard_name(unit): recorded
            for layout in self._layouts
            if (recorded := record.shard_of(layout)) is not None
        }
        # A copy of the same record was published after its shards, which were checked then.
        if read_or_none(self.final / name) == data and all(
            size_or_none(self.final / shard) == recorded["bytes"]
            for shard, recorded in shards.items()
        ):
            return None
        n_bytes = 0
        for shard, recorded in shards.items():
            n_bytes += self._copy(shard, recorded)
        return n_bytes + self._copy(name)

    # --- other files ---

    def copy_files(self) -> None:
        """Copy what else there is, the store's own metadata last."""
        names = [name for name in files_below(self.output.path) if self._is_other(name)]
        # A row counts as merged once its status is there, so that column is the last.
        names.sort(key=lambda name: name.startswith(f"{STORE_NAME}/status/"))
        for n_bytes in shown(self._each(self._copy_other, names), len(names), "copy", "files"):
            self.result.n_files += n_bytes is not None
            self.result.n_bytes += n_bytes or 0
        if self._merge_state() != self._seen:
            raise StoreError(
                f"{self.output.path} was merged while it was copied: run the same command again, "
                "which copies what has changed"
            )
        self.result.n_files += 1
        self.result.n_bytes += self._copy(GROUP)
        (self.final / MARKER_NAME).unlink(missing_ok=True)

    def _is_other(self, name: str) -> bool:
        first, *inner = name.split("/")
        if first in (*_OF_PROCESSES, UNITS_DIR, MARKER_NAME) or name == GROUP:
            return False
        is_shard = (
            first == STORE_NAME
            and inner[0] in [layout.array for layout in self._layouts]
            and inner[-1] != "zarr.json"
        )
        last = name.rpartition("/")[2]
        is_unpublished = last.startswith(".") and last.endswith(".tmp")
        return not is_shard and not is_unpublished and last != "lock"

    def _each(self, work: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="copy")
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)

    def _copy(self, name: str, expected: dict[str, int] | None = None) -> int:
        try:
            return copy_file(self.output.path / name, self.final / name, expected, self._read_back)
        except FileNotFoundError:
            raise self._gone(name) from None

    def _copy_other(self, name: str) -> int | None:
        """Copy a file; None if it has been deleted since, and is none of the store's."""
        if not name.startswith(f"{STORE_NAME}/") and size_or_none(self.output.path / name) is None:
            return None
        return self._copy(name)

    def _gone(self, name: str) -> StoreError:
        return StoreError(
            f"{self.output.path / name} was deleted while the output was copied: run the same "
            "command again"
        )

    # --- the merge ---

    def _merge_state(self) -> Any:
        """Return what a merge changes: its claims, and at last the store's attributes."""
        claims = names_in(self.output.path / CLAIMS_DIR)
        merges = sorted(name for name in claims if name.startswith(f"{MERGE_CLAIM}."))
        return merges, read_or_none(self.output.path / GROUP)

    def _refuse_merge(self) -> None:
        if read_activity(self.output, self.output.missing).merging is not None:
            raise StoreError(
                f"{self.output.path} is being merged: run the same command when that is done "
                f"(`python -m gradproj status {self.output.path}` tells)"
            )


def _identity(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: attributes.get(name) for name in ("store_id", "identity_hash")}
