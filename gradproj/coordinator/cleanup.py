"""What dead processes left behind, and what committed units no longer need: found and deleted at a job's start."""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from gradproj.coordinator.fencing import OWNER_FILE, remove_scratch
from gradproj.coordinator.process_id import Owner
from gradproj.store.unit_record import list_records

_UNIT_CLAIM = re.compile(r"(\d{8,})\.(\d+)")


def remove_leftovers(output: Path, observer: Owner) -> int:
    """Delete the unpublished files and heartbeats of processes known to be gone; how many of them there were.

    Claims and partial rows of committed units go too. Nothing that a living process may still use is touched: of
    another machine's processes nothing is known.
    """
    gone = _sweep_scratch(output / "tmp", observer) | _sweep_heartbeats(
        output / "heartbeats", observer
    )
    _sweep_committed(output)
    return len(gone)


def _sweep_scratch(folder: Path, observer: Owner) -> set[str]:
    gone = set()
    for scratch in folder.glob("*/"):
        if (
            scratch.name.startswith(".") or not (scratch / OWNER_FILE).exists()
        ):  # nobody's yet, or no more
            shutil.rmtree(scratch, ignore_errors=True)
            continue
        with suppress(OSError, ValueError, TypeError):
            owner = Owner(**json.loads((scratch / OWNER_FILE).read_text()))
            if owner.is_gone(observer):
                remove_scratch(scratch)
                gone.add(owner.name)
    return gone


def _sweep_heartbeats(folder: Path, observer: Owner) -> set[str]:
    gone = set()
    for path in list(folder.iterdir()):
        with suppress(OSError, TypeError, KeyError):
            try:
                owner = Owner(**json.loads(path.read_text())["owner"])
            except ValueError:
                # Torn by a crash of its machine, since nothing flushes it. One that lives writes its own anew.
                path.unlink()
                continue
            if owner.is_gone(observer):
                path.unlink()
                gone.add(owner.name)
    return gone


def _sweep_committed(output: Path) -> None:
    committed = set(list_records(output / "units").tolist())
    with os.scandir(output / "claims") as entries:
        claims = [
            match for match in (_UNIT_CLAIM.fullmatch(entry.name) for entry in entries) if match
        ]
    for claim in claims:
        if int(claim[1]) in committed:
            (output / "claims" / claim[0]).unlink(missing_ok=True)
    for folder in (output / "partial").glob("*/"):
        if folder.name.isdigit() and int(folder.name) in committed:
            shutil.rmtree(folder, ignore_errors=True)
