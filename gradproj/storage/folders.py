"""Reading, deleting and flushing files and folders, on disk and in a bucket alike."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from gradproj.errors import StoreError
from gradproj.files import fsync_dir
from gradproj.storage.byte_ranges import executor
from gradproj.storage.object_path import ObjectPath

T = TypeVar("T")
R = TypeVar("R")

READ_AHEAD = 16
"""Small objects that are read at once."""


def read_or_none(path: Path) -> bytes | None:
    """Return the content of a file or an object; None if there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_ahead(
    read: Callable[[T], R], items: Sequence[T], place: Path, n_at_once: int = READ_AHEAD
) -> Iterator[R]:
    """Yield ``read(item)`` in order. In a bucket, several are under way at once."""
    if not isinstance(place, ObjectPath):
        yield from map(read, items)
        return
    ahead: deque[Future[R]] = deque()
    for item in items:
        ahead.append(executor().submit(read, item))
        if len(ahead) >= n_at_once:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def tree_exists(folder: Path, last: str) -> bool:
    """Return whether ``create_tree`` has published a folder.

    On disk it appears as a whole, and what is missing in it was deleted.
    """
    return (folder / last).is_file() if isinstance(folder, ObjectPath) else os.path.lexists(folder)


def has_folder(folder: Path) -> bool:
    """Return whether a folder is there. In a bucket it is: nothing needs to be made."""
    return isinstance(folder, ObjectPath) or folder.is_dir()


def flush_folder(folder: Path) -> None:
    """Make deletions in a folder survive a crash; in a bucket each one does."""
    if not isinstance(folder, ObjectPath):
        fsync_dir(folder)


def touch_folder(folder: Path) -> None:
    """Make NFS list a folder again, which it may not do for a minute. A bucket always does."""
    if not isinstance(folder, ObjectPath):
        os.utime(folder)


def remove_at_once(folder: Path, away: Path) -> None:
    """Delete a folder of which no reader shall ever see a part; it is renamed to ``away`` first.

    Raises:
        StoreError: it is in a bucket, which has no renames.
    """
    if isinstance(folder, ObjectPath):
        raise StoreError(
            f"{folder} was made with other settings and has no row. Delete everything below "
            f"{folder.parent}, run with its settings, or give --output_dir another address"
        )
    os.rename(folder, away)
    shutil.rmtree(away)


def delete_tree(folder: Path) -> None:
    """Delete a folder and all that is in it, if it exists. Errors of a disk are ignored."""
    if isinstance(folder, ObjectPath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)
