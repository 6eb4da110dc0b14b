"""A process's own folder for what is not published yet, ``tmp/OWNER``; taking it away fences the process.

Every publication starts from a file in it. So whoever takes over from a process that stood still moves its folder
away first: when that process wakes up, nothing that it had prepared can be published any more, not even by the
operation it was about to make. It makes a new folder then and goes on with what it still owns.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gradproj.store.files import explain_os_errors, fsync_dir, temporary_beside, write_file_durably

if TYPE_CHECKING:
    from gradproj.coordinator.claims import Owner

OWNER_FILE = "owner.json"
"""In every scratch folder: whose it is."""


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
    with suppress(OSError):  # gone already, or a folder turned read-only, which the commit has met and said
        os.rename(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def fence(folder: Path, mine: Path, owner: "Owner", check: Callable[[], None] = lambda: None) -> bool:
    """Take another process's folder away, into that of ``owner``; False: it has none.

    The rename is one operation on the server of a shared file system: before it that process could publish, after it
    nothing that was in the folder can be.
    """
    away = mine / f"fenced-{secrets.token_hex(4)}"
    while True:
        try:
            os.rename(folder, away)
            break
        except FileNotFoundError:
            if not folder.exists():
                return False
            make_scratch_again(mine, owner, check)  # fenced ourselves
    shutil.rmtree(away, ignore_errors=True)
    return True
