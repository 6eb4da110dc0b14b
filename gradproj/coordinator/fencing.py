"""A process's own folder for what is not published yet, ``tmp/OWNER``; taking it away fences the process.

Every publication starts from a file in it. So whoever takes over from a process that stood still moves its folder
away first and deletes it: when that process wakes up, nothing that it had prepared can be published any more, not even
by the operation it was about to make. It makes a new folder then and goes on with what it still owns.
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
from typing import TYPE_CHECKING

from gradproj.errors import StoreError
from gradproj.files import explain_os_errors, fsync_dir, temporary_beside, write_file_durably

if TYPE_CHECKING:
    from gradproj.coordinator.process_id import Owner

OWNER_FILE = "owner.json"
"""In every scratch folder: whose it is."""
DELETE_AGAIN_S = (0.1, 0.5, 2.0)
"""Pauses before what could not be deleted is tried again: its owner may just be writing into it."""
HELD_OPEN = ".nfs"
"""How NFS calls a file that was deleted while a process of this machine has it open, until that one closes it."""


def make_scratch(folder: Path, owner: "Owner") -> None:
    """Make a process's folder, with its owner's name in it, or find it there."""
    with explain_os_errors(folder):
        while not (folder / OWNER_FILE).exists():
            # Under a hidden name, which any start may sweep away, until it says whose it is.
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


def make_scratch_again(folder: Path, owner: "Owner", check: Callable[[], None]) -> None:
    """Make a process's folder after it was taken away: by a fence, or with the whole OUTPUT, as ``check`` says.

    All that is published starts from this folder. So once it is there and ``check`` has found OUTPUT to be the same,
    nothing of this process comes into another one.
    """
    check()
    make_scratch(folder, owner)
    check()


def remove_scratch(folder: Path) -> None:
    """Delete a process's folder; what a crash leaves of it has a hidden name, and says no more whose it was."""
    hidden = temporary_beside(folder)
    with suppress(
        OSError
    ):  # gone already, or a folder turned read-only, which the commit has met and said
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def fence(
    folder: Path, mine: Path, owner: "Owner", check: Callable[[], None] = lambda: None
) -> bool:
    """Take another process's folder away, into that of ``owner``; False: it has none.

    On one machine the rename is enough. Over NFS a machine that knew the files goes on knowing them by their handles,
    whatever they are called now, and could still publish one: there it is the deletion that forbids it. So this
    returns only when nothing is left of the folder.

    Raises:
        StoreError: it cannot be taken away, or a part of it cannot be deleted.
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
            make_scratch_again(mine, owner, check)  # fenced ourselves
    _delete(away, folder)
    return True


def _delete(away: Path, folder: Path) -> None:
    for pause_s in (*DELETE_AGAIN_S, None):
        shutil.rmtree(away, ignore_errors=True)
        left = _left_of(away)
        if not left:
            return
        if pause_s is not None:
            time.sleep(pause_s)
    raise StoreError(
        f"cannot delete what a process that was taken over had in {folder} ({', '.join(sorted(left)[:3])}): it could "
        f"still be published. Delete it by hand below {folder.parent} and start again: what was finished is kept"
    )


def _left_of(folder: Path) -> list[str]:
    """Names of what keeps a folder from being gone."""
    found = [name for _, folders, names in os.walk(folder) for name in (*folders, *names)]
    if found and all(name.startswith(HELD_OPEN) for name in found):
        # The processes of this machine do not find it by its old name any more, and the others know no such file.
        return []
    # Also an empty folder: who knows its handle could make files in it.
    return found or [folder.name] * folder.exists()
