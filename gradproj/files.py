"""Files that survive a crash: written, flushed to disk, then published by one link or rename.

Every error that a user can act on (full disk, quota, read-only, no permission) is a StoreError.
"""

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np

from gradproj.errors import StoreError

_WAYS_OUT = {
    errno.ENOSPC: "Free space there, then start again: what was finished is kept.",
    errno.EDQUOT: "Your quota there is used up: free some of it, then start again: what was "
    "finished is kept.",
    errno.EFBIG: "Raise the file size limit (ulimit -f) or lower --rows_per_shard.",
    errno.EROFS: "Make it writable and start again: what was finished is kept. Or start over in "
    "another --output_dir.",
    errno.EACCES: "Fix the permissions and start again: what was finished is kept. Or start over "
    "in another --output_dir.",
}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
_READ_BYTES = 2**22
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's refusals to write into a StoreError with ``path`` and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WAYS_OUT:
            raise
        raise StoreError(
            f"cannot write {path}: {error.strerror}. {_WAYS_OUT[error.errno]}"
        ) from error


# --- checksums ---


def crc32c(data: Any, value: int = 0) -> int:
    """Return the crc32c of any contiguous buffer, continued from ``value``."""
    return google_crc32c.extend(value, np.frombuffer(data, np.uint8))


def file_sum(path: Path) -> dict[str, int]:
    """Return ``{"bytes": size, "crc32c": checksum}`` of a file's present content."""
    total, checksum = 0, 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            total += len(data)
            checksum = crc32c(data, checksum)
    return {"bytes": total, "crc32c": checksum}


# --- writing and publishing ---


def temporary_beside(path: str | Path, folder: Path | None = None) -> Path:
    """Return a hidden, unused name in the same folder or in another of the same file system."""
    path = Path(path)
    return (folder or path.parent) / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def write_file_durably(
    tmp_path: str | Path, chunks: Iterable[Any], mode: int | None = None
) -> dict[str, int]:
    """Write buffers to a file and flush it to disk. On any error the file is removed.

    Args:
        tmp_path: the file, which others do not look at.
        chunks: its content.
        mode: permission bits. Default: those of the umask.

    Returns:
        ``{"bytes": size, "crc32c": checksum}``, as a unit's record has it of its shard.

    Raises:
        StoreError: the disk is full, read-only or not the user's.
        FileNotFoundError: the folder does not exist, or was deleted together with the file.
    """
    total, checksum = 0, 0
    with explain_os_errors(tmp_path):
        try:
            with open(tmp_path, "wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                for data in chunks:
                    file.write(data)
                    total += memoryview(data).nbytes
                    checksum = crc32c(data, checksum)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            Path(tmp_path).unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno == errno.ESTALE:
                # NFS reports a file that another machine deleted as stale, not as missing.
                raise FileNotFoundError(
                    errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path)
                ) from error
            raise
    return {"bytes": total, "crc32c": checksum}


@contextmanager
def _removed_on_error(tmp_path: str | Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with suppress(OSError):
            os.unlink(tmp_path)
        raise


def publish_exclusively(tmp_path: str | Path, final_path: str | Path) -> bool:
    """Give a finished file its final name unless that is taken.

    The temporary name is removed, after an error as well.

    Returns:
        Whether this file now has that name. False: another process was first.
    """
    with explain_os_errors(final_path), _removed_on_error(tmp_path):
        try:
            os.link(tmp_path, final_path)
        except FileExistsError:
            # NFS may make a link and lose the reply; then the name is taken by this very file.
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
    """Give a finished file its final name, replacing what is there, and flush the folder.

    The temporary name is removed, after an error as well.
    """
    with explain_os_errors(final_path), _removed_on_error(tmp_path):
        os.replace(tmp_path, final_path)
        fsync_dir(Path(final_path).parent)


def write_and_replace(
    final_path: str | Path, chunks: Iterable[Any], scratch: Path | None = None
) -> None:
    """Durably write a file under a temporary name (in ``scratch``), then replace ``final_path``."""
    tmp_path = temporary_beside(final_path, scratch)
    write_file_durably(tmp_path, chunks)
    replace_atomically(tmp_path, final_path)


def fsync_dir(path: str | Path) -> None:
    """Flush a folder, so that names published in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no such operation and need none.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: str | Path) -> None:
    """Flush a file that was written and closed."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_tree(folder: str | Path) -> None:
    """Flush all files and folders of a tree, before it is published by a rename."""
    for parent, _, names in os.walk(folder):
        for name in names:
            fsync_file(os.path.join(parent, name))
        fsync_dir(parent)


def _rename_unless_taken(tmp_path: str | Path, final_path: str | Path) -> bool:
    """Publish on file systems without hard links."""
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
    # Neither links nor an exclusive rename: two writers may both pass this test, and the later one
    # wins. A process that commits a unit therefore checks that the published file is its own.
    if os.path.lexists(final_path):
        return False
    os.rename(tmp_path, final_path)
    return True


def existing_ancestor(path: Path) -> Path:
    """Return ``path`` if it exists, otherwise its nearest ancestor that does."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


# --- locks ---


def try_lock(file: IO[str]) -> bool | None:
    """Lock an open file; the lock ends when the file is closed or the process ends.

    Returns:
        False if another process holds the lock, None if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True
