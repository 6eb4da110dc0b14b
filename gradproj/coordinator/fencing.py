"""Scratch directories of unpublished files, ``tmp/OWNER``; deleting one fences its process.

Every publication starts from a file in the process's scratch directory. A process that takes over
from one that hung first moves the old directory away and deletes it. When the old process wakes up,
nothing it had prepared can be published any more, not even by the system call it was about to make.
It then makes a new directory and goes on with the units it still owns.
"""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from gradproj.coordinator.process_id import Owner
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors, fsync_dir, temporary_beside, write_file_durably

OWNER_FILE = "owner.json"
"""File in every scratch directory that names its owner."""
DELETE_RETRY_S = (0.1, 0.5, 2.0)
"""Pauses between attempts to delete: the owner may be writing into its directory."""
NFS_DELETED = ".nfs"
"""Prefix that NFS gives to a deleted file while a process of this machine has it open."""


def read_owner(folder: Path) -> Owner:
    """Return the owner of a scratch directory; OSError, ValueError or TypeError without one."""
    return Owner(**json.loads((folder / OWNER_FILE).read_text()))


def make_scratch(folder: Path, owner: Owner) -> None:
    """Make a process's scratch directory with its owner file, unless it exists."""
    with explain_os_errors(folder):
        while not (folder / OWNER_FILE).exists():
            # Under a hidden name until it names its owner. Any start may delete hidden names, so
            # this one may disappear at any step: then begin again.
            hidden = temporary_beside(folder)
            folder.parent.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):
                hidden.mkdir()
                write_file_durably(hidden / OWNER_FILE, [json.dumps(asdict(owner)).encode()])
                fsync_dir(hidden)
                try:
                    os.rename(hidden, folder)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
                    shutil.rmtree(hidden)  # another thread of this process was faster
                    return
                fsync_dir(folder.parent)


def recreate_scratch(folder: Path, owner: Owner, check: Callable[[], None]) -> None:
    """Make a scratch directory again that was deleted by a fence, or with the whole output.

    ``check`` raises if the output is gone or is another one. It is called again after the
    directory exists: every publication starts from there, so nothing of this process can get into
    an output that replaced its own.
    """
    check()
    make_scratch(folder, owner)
    check()


def remove_scratch(folder: Path) -> None:
    """Delete a scratch directory.

    Renamed to a hidden name first, so a crash leaves an anonymous directory that cleanup removes.
    """
    hidden = temporary_beside(folder)
    # It may be gone already, or read-only, which the commit has raised before.
    with suppress(OSError):
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def fence(folder: Path, mine: Path, owner: Owner, check: Callable[[], None] = lambda: None) -> bool:
    """Move another process's scratch directory into that of ``owner`` and delete it.

    On one machine the rename alone would do. Over NFS, a machine that has opened the files keeps
    finding them by their handles, whatever their names, and could still publish one: there the
    deletion is what fences. So this returns only when nothing of the directory is left.

    Returns:
        Whether the process had a scratch directory.

    Raises:
        StoreError: it cannot be moved, or a part of it cannot be deleted.
    """
    away = mine / f"fenced-{secrets.token_hex(4)}"
    while True:
        try:
            with explain_os_errors(folder):
                os.rename(folder, away)
            break
        except FileNotFoundError:
            if not folder.exists():
                return False
            recreate_scratch(mine, owner, check)  # this process was fenced itself
    for pause_s in (*DELETE_RETRY_S, None):
        shutil.rmtree(away, ignore_errors=True)
        remaining = _remaining(away)
        if not remaining:
            return True
        if pause_s is not None:
            time.sleep(pause_s)
    raise StoreError(
        f"cannot delete the unpublished files in {folder} of a process whose unit was taken over "
        f"({', '.join(sorted(remaining)[:3])}): they could still be published. Delete them by hand "
        f"below {folder.parent} and start again: committed units are kept"
    )


def _remaining(folder: Path) -> list[str]:
    """Return the names that keep a directory from being deleted."""
    names = [name for _, folders, files in os.walk(folder) for name in (*folders, *files)]
    if names and all(name.startswith(NFS_DELETED) for name in names):
        # Processes of this machine no longer find them by their old names, and other machines
        # never knew these files.
        return []
    # An empty directory counts too: a machine that has its handle could create files in it.
    return names or [folder.name] * folder.exists()
