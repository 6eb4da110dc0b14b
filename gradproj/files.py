"""Files that survive a crash: written, flushed to disk, then published by one link or rename.

Every error a user can act on (full disk, quota, read-only, no permission) comes out as a ``StoreError``.
"""

import ctypes
import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from gradproj.errors import StoreError

_WAYS_OUT = {
    errno.ENOSPC: "Free space there, then start again: what was finished is kept.",
    errno.EDQUOT: "Your quota there is used up: free some of it, then start again: what was finished is kept.",
    errno.EFBIG: "Raise the file size limit (ulimit -f) or take fewer --rows_per_shard.",
    errno.EROFS: "Make it writable and start again: what was finished is kept; or begin anew in another --output_dir.",
    errno.EACCES: "Mend the permissions and start again: what was finished is kept; or begin anew in another "
    "--output_dir.",
}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_READ_BYTES = 2**22
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into a ``StoreError`` with ``path`` and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        raise StoreError(
            f"cannot write {path}: {error.strerror}. {_WAYS_OUT[error.errno]}"
        ) from error


def crc32c(data: Any, value: int = 0) -> int:
    """crc32c of any contiguous buffer, continued from ``value``."""
    return google_crc32c.extend(value, np.frombuffer(data, np.uint8))


def file_sum(path: str | Path) -> dict[str, int]:
    """``{"bytes": size, "crc32c": checksum}`` of a file's content as it is now."""
    total, checksum = 0, 0
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            total += len(data)
            checksum = crc32c(data, checksum)
    return {"bytes": total, "crc32c": checksum}


def temporary_beside(path: str | Path, folder: Path | None = None) -> Path:
    """A hidden name that no other process uses, in the same folder or in another of the same file system."""
    path = Path(path)
    return (folder or path.parent) / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def write_file_durably(tmp_path: str | Path, chunks: Iterable[Any]) -> dict[str, int]:
    """Write buffers to a file and flush it to disk; on any error the file is removed.

    Returns:
        ``{"bytes": size, "crc32c": checksum}``, as a unit's record keeps it of its shard.

    Raises:
        StoreError: the disk is full, read-only or not the user's.
        FileNotFoundError: its folder is gone, or was deleted meanwhile with the file.
    """
    total, checksum = 0, 0
    with explain_os_errors(tmp_path):
        try:
            with open(tmp_path, "wb") as file:
                for data in chunks:
                    file.write(data)
                    total += memoryview(data).nbytes
                    checksum = crc32c(data, checksum)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            Path(tmp_path).unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ESTALE:
                # How NFS says that another machine has deleted the file: as here, it is not found.
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path)
                ) from error
            raise
    return {"bytes": total, "crc32c": checksum}


def publish_exclusively(tmp_path: str | Path, final_path: str | Path) -> bool:
    """Give a finished file its final name unless that name is taken; the temporary name is gone either way.

    Returns:
        Whether this file is now the one under that name (False: another process was first).
    """
    with explain_os_errors(final_path):
        try:
            os.link(tmp_path, final_path)
        except FileExistsError:
            # Over NFS a link can be made and its answer lost: then the name is taken by this very file.
            published = os.path.samefile(tmp_path, final_path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            published = _rename_unless_taken(tmp_path, final_path)
        else:
            published = True
        Path(tmp_path).unlink(missing_ok=True)
        fsync_dir(Path(final_path).parent)
    return published


def replace_atomically(tmp_path: str | Path, final_path: str | Path) -> None:
    """Give a finished file its final name, in place of what is there, and flush the folder."""
    with explain_os_errors(final_path):
        os.replace(tmp_path, final_path)
        fsync_dir(Path(final_path).parent)


def write_and_replace(
    final_path: str | Path, chunks: Iterable[Any], scratch: Path | None = None
) -> None:
    """Durably write a file under a temporary name (in ``scratch``) and put it in place of ``final_path``."""
    tmp_path = temporary_beside(final_path, scratch)
    write_file_durably(tmp_path, chunks)
    replace_atomically(tmp_path, final_path)


def existing_ancestor(path: Path) -> Path:
    """Return ``path`` if it exists, otherwise its nearest ancestor that does."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def fsync_dir(path: str | Path) -> None:
    """Flush a folder, so that names published in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if (
            error.errno != errno.EINVAL
        ):  # some network file systems have no such operation, and need none
            raise
    finally:
        os.close(descriptor)


def _rename_unless_taken(tmp_path: str | Path, final_path: str | Path) -> bool:
    """For file systems without hard links."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = (os.fsencode(tmp_path), os.fsencode(final_path))
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
            return True
        code = ctypes.get_errno()
        if code == errno.EEXIST:
            return False
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise OSError(code, os.strerror(code), os.fspath(final_path))
    # Neither links nor an exclusive rename: two writers can pass this test together, and the later one wins.
    # Whoever commits a unit checks afterwards that the published file is its own.
    if os.path.lexists(final_path):
        return False
    os.rename(tmp_path, final_path)
    return True
