"""Deletes, when a job starts, what dead processes left and what committed units no longer need."""

import json
import re
from contextlib import suppress
from pathlib import Path

from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.process_id import Owner
from gradproj.storage.folders import delete_tree
from gradproj.storage.object_path import names_in
from gradproj.store.layout import CLAIMS_DIR, HEARTBEATS_DIR, PARTIAL_DIR, UNITS_DIR
from gradproj.store.unit_record import list_records

_UNIT_CLAIM = re.compile(r"(\d{8,})\.\d+")


def remove_leftovers(output: Path, observer: Owner) -> int:
    """Delete the unpublished files and heartbeats of processes known to be gone.

    Claims and partial rows of committed units are deleted too. Nothing that a running process may
    still use is touched, so files of other machines' processes stay.

    Returns:
        Number of processes whose files were deleted.
    """
    committed = set(list_records(output / UNITS_DIR).tolist())
    gone = commits_of(output, observer).remove_leftovers(committed)
    gone |= _remove_heartbeats(output / HEARTBEATS_DIR, observer)
    _remove_committed(output, committed)
    return len(gone)


def _remove_heartbeats(folder: Path, observer: Owner) -> set[str]:
    gone = set()
    for path in list(folder.iterdir()):
        with suppress(OSError, TypeError, KeyError):
            try:
                owner = Owner(**json.loads(path.read_text())["owner"])
            except ValueError:
                # Torn by a power loss: heartbeats are not flushed. A running process writes again.
                path.unlink()
                continue
            if owner.is_gone(observer):
                path.unlink()
                gone.add(owner.name)
    return gone


def _remove_committed(output: Path, committed: set[int]) -> None:
    for name in names_in(output / CLAIMS_DIR):
        match = _UNIT_CLAIM.fullmatch(name)
        if match and int(match[1]) in committed:
            (output / CLAIMS_DIR / name).unlink(missing_ok=True)
    for folder in (output / PARTIAL_DIR).glob("*/"):
        if folder.name.isdigit() and int(folder.name) in committed:
            delete_tree(folder)
