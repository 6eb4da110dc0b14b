"""Publish a file whole or not at all, and only once."""

import os
import tempfile
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from gradproj.errors import CorpusError


def publish(path: Path, content: Iterable[bytes], replace_existing: bool) -> bool:
    """Write a file so that nobody ever sees a part of it; False if one was there already and stays.

    Raises:
        CorpusError: the folder cannot be written.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            # mkstemp makes it private; other users' jobs read the index too.
            os.fchmod(handle, 0o644)
            file.flush()
            os.fsync(handle)
        if replace_existing:
            os.replace(temporary, path)
            temporary = None
        elif not _link(temporary, path):
            return False
        _sync_folder(path.parent)
    except OSError as error:
        raise CorpusError(
            f"{path}: the corpus index cannot be written: {error.strerror or error}; name another path for it"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return True


def _link(temporary: str, path: Path) -> bool:
    """Give the finished file its name unless it is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # No hard links on this file system: a rename is still whole, but the last of two builders wins.
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum_of(parts: Iterable[bytes | memoryview]) -> str:
    """A hash of a content that comes in parts."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()
