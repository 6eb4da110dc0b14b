"""What dead processes left behind, and what committed units no longer need: found and deleted at a job's start."""

import json
import os
import re
import shutil
from pathlib import Path

from gradproj.coordinator.claims import Owner
from gradproj.coordinator.heartbeats import read_heartbeats
from gradproj.coordinator.scratch import OWNER_FILE, remove_scratch
from gradproj.store.records import list_records

_UNIT_CLAIM = re.compile(r"(\d{8,})\.(\d+)")


def sweep(output: Path, observer: Owner) -> int:
    """Delete the unpublished files and heartbeats of processes known to be gone; how many of them there were.

    Claims and partial rows of committed units go too. Nothing that a living process may still use is touched: of
    another machine's processes nothing is known.
    """
    gone = {owner.name for owner, _ in read_heartbeats(output / "heartbeats") if owner.is_gone(observer)}
    for folder in (output / "tmp").glob("*/"):
        owner = _owner_of(folder)
        if folder.name.startswith("."):  # nobody's yet
            shutil.rmtree(folder, ignore_errors=True)
        elif owner is not None and owner.is_gone(observer):
            gone.add(owner.name)
    for name in gone:
        # The heartbeat last: it is what leads here again should this process die in between.
        remove_scratch(output / "tmp" / name)
        for ending in (".tmp", ".json"):
            (output / "heartbeats" / f"{name}{ending}").unlink(missing_ok=True)
    _sweep_committed(output)
    return len(gone)


def _owner_of(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / OWNER_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _sweep_committed(output: Path) -> None:
    committed = set(list_records(output / "units").tolist())
    with os.scandir(output / "claims") as entries:
        claims = [match for match in (_UNIT_CLAIM.fullmatch(entry.name) for entry in entries) if match]
    for claim in claims:
        if int(claim[1]) in committed:
            (output / "claims" / claim[0]).unlink(missing_ok=True)
    for folder in (output / "partial").glob("*/"):
        if folder.name.isdigit() and int(folder.name) in committed:
            shutil.rmtree(folder, ignore_errors=True)
