"""Checks that a bucket keeps the promises that commits rest on, before anything is written to it.

Some stores ignore the condition of a write and overwrite. There two processes would lose rows.
"""

import secrets
from pathlib import Path

from gradproj.errors import StoreError
from gradproj.storage.object_path import ObjectPath

PROBE_DIR = "probe"
_TRIES = 5


def check_conditional_writes(folder: Path) -> None:
    """Write, refuse to overwrite and delete an object below ``folder``; nothing on disk.

    Raises:
        StoreError: the store overwrites what a condition forbids, or these credentials cannot write
            there.
    """
    if not isinstance(folder, ObjectPath):
        return
    # Another start may delete the object at any moment, as a leftover of a dead one. That can look
    # as if the store did not keep its promises, so it is asked again.
    n_broken = 0
    while n_broken < _TRIES:
        path = folder / PROBE_DIR / secrets.token_hex(8)
        try:
            if _keeps_promises(path):
                return
            n_broken += 1
        except FileNotFoundError:
            continue
        finally:
            path.unlink(missing_ok=True)
    raise StoreError(
        f"{folder}: this store overwrites objects although a write forbids it (If-None-Match, "
        "If-Match), so rows could be lost. Give --output_dir a store with conditional writes: "
        "S3, GCS, Azure, R2, MinIO, SeaweedFS"
    )


def _keeps_promises(path: ObjectPath) -> bool:
    first, second = b"first " + path.name.encode(), b"second"
    path.put_if_absent([first])
    content, version = path.read_versioned()
    path.put_if_absent([second])
    kept = content == path.read_bytes() == first
    path.put_if_match([second], version)
    path.put_if_match([first], version)
    return kept and path.read_bytes() == second
