"""Publishing: files and objects get their names whole or not at all, on disk and in a bucket.

On disk a file is written in a scratch folder, flushed, then linked or renamed (``files.py``). In a
bucket one request does all of that. There a write may have happened although its reply was lost,
so whatever a condition refuses is read back and compared before it counts as another's.
"""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from gradproj.errors import StoreError
from gradproj.files import (
    explain_os_errors,
    fsync_dir,
    fsync_tree,
    publish_exclusively,
    replace_atomically,
    temporary_beside,
    write_file_durably,
)
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import ObjectPath
from gradproj.storage.stored_object import Version, one_buffer

PREPARED_DIR = "prepared"
"""Folder of a bucket's output that holds what is about to be published, beside its final place."""


class Outdated(Exception):
    """Another process has replaced what this one was about to replace."""


class Publisher(ABC):
    """Publishes into one output."""

    @abstractmethod
    def create(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> bool:
        """Publish a file of this content unless the name is taken.

        ``mode``: permission bits on disk; default: those of the umask.

        Returns:
            Whether the name now has this content by this call. In a bucket also if it had it
            before: content that only one process writes tells a lost reply from another's object.
        """

    @abstractmethod
    def replace(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> None:
        """Publish a file, replacing what is there.

        Raises:
            Outdated: the publisher is guarded, and another process was faster.
        """

    @abstractmethod
    def update(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        """Replace an existing file by what ``change`` makes of it. Errors as of ``replace``."""

    @abstractmethod
    def create_tree(self, folder: Path, files: Mapping[str, bytes], last: str) -> bool:
        """Publish a whole folder, name -> content, unless it exists.

        The folder exists once its file ``last`` does.

        Returns:
            False if it exists, or another process has just made it.
        """

    @abstractmethod
    def replace_tree(self, folder: Path, files: Mapping[str, bytes]) -> None:
        """Publish a folder, replacing what is there; a reader may find none for an instant."""

    @abstractmethod
    def take(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        """Replace a file so that no earlier holder of this right can replace it any more.

        ``change`` makes content that it never had. On disk fencing does the work.
        """

    def guarded(self, check: Callable[[], None]) -> "Publisher":
        """Return a publisher for files that one process at a time may replace.

        ``check`` raises if this process is not that one any more. On disk fencing does the work.
        """
        return self


class FilePublisher(Publisher):
    """Publishes on disk. Unpublished files are in ``scratch`` (default: beside the final ones)."""

    def __init__(self, scratch: Path | None = None) -> None:
        self.scratch = scratch

    def create(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> bool:
        temporary = temporary_beside(final, self.scratch)
        write_file_durably(temporary, chunks, mode)
        return publish_exclusively(temporary, final)

    def replace(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> None:
        temporary = temporary_beside(final, self.scratch)
        write_file_durably(temporary, chunks, mode)
        replace_atomically(temporary, final)

    def update(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        self.replace(final, [change(final.read_bytes())])

    def take(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        pass

    def create_tree(self, folder: Path, files: Mapping[str, bytes], last: str) -> bool:
        if os.path.lexists(folder):
            return False
        temporary = temporary_beside(folder, self.scratch)
        try:
            with explain_os_errors(folder):
                _write_tree(temporary, files)
                try:
                    os.rename(temporary, folder)
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                        raise
                    return False
                fsync_dir(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # does nothing once it was published
        return True

    def replace_tree(self, folder: Path, files: Mapping[str, bytes]) -> None:
        temporary, old = (temporary_beside(folder, self.scratch) for _ in range(2))
        try:
            with explain_os_errors(folder):
                _write_tree(temporary, files)
                if folder.exists():
                    os.rename(folder, old)
                os.rename(temporary, folder)
                fsync_dir(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _write_tree(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir()
    for name, content in files.items():
        inner = folder
        # Not with parents=True: another process may have moved the folder away to fence this one.
        for part in name.split("/")[:-1]:
            inner /= part
            inner.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    fsync_tree(folder)


class ObjectPublisher(Publisher):
    """Publishes in a bucket. With ``check``, replaces only what nobody else has replaced since."""

    def __init__(self, check: Callable[[], None] | None = None) -> None:
        self._check = check

    def guarded(self, check: Callable[[], None]) -> "ObjectPublisher":
        return ObjectPublisher(check)

    def create(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> bool:
        data = one_buffer(chunks)
        return self.publish_or_read(final, data) == data

    def publish_or_read(self, final: Path, data: bytes, free: bytes = b"") -> bytes:
        """Publish an object unless the name is taken, and return the one that is there.

        A name is free without an object or, if ``free`` is given, with one of this content only.
        """
        while not (self._swap(final, free, data) if free else _object(final).put_if_absent([data])):
            found = read_or_none(final)
            if found is None and free:
                return b""  # deleted by hand
            if found is not None and not (free and found == free):  # nor freed in between
                return found
        return data

    def _swap(self, final: Path, old: bytes, new: bytes) -> bool:
        """Replace an object of this content. False as for ``put_if_match``."""
        try:
            content, version = _object(final).read_versioned()
        except FileNotFoundError:
            return False
        return content == old and _object(final).put_if_match([new], version)

    def replace(self, final: Path, chunks: Iterable[Any], mode: int | None = None) -> None:
        path = _object(final)
        if self._check is None:
            path.put(chunks)
        else:
            self.replace_version(path, path.version(), one_buffer(chunks))

    def update(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        path = _object(final)
        data, version = path.read_versioned()
        self.replace_version(path, version, change(data))

    def take(self, final: Path, change: Callable[[bytes], bytes]) -> None:
        self.update(final, change)

    def replace_version(self, path: ObjectPath, version: Version | None, data: bytes) -> None:
        """Replace this version of an object; None = there was none.

        Raises:
            Outdated: another process was faster, or was after this one.
        """
        # The version was noted before the check. So one that takes over after the check finds this
        # write done, or makes its condition fail.
        if self._check is not None:
            self._check()
        done = path.put_if_match([data], version) if version else path.put_if_absent([data])
        if not done and read_or_none(cast(Path, path)) != data:
            raise Outdated(str(path))

    def create_tree(self, folder: Path, files: Mapping[str, bytes], last: str) -> bool:
        """Publish a folder by deciding first which one: ``prepared/NAME`` holds it as a whole.

        The first process to write that object has decided; all others that come help to publish its
        content, not their own. Every file is compared, so that two contents never mix, whatever
        happens to the decision; ``last`` goes last.
        """
        decision = folder.parent / PREPARED_DIR / folder.name
        while not (folder / last).is_file():
            chosen = files
            if not self.create(decision, [_pack(files)]):
                packed = read_or_none(decision)
                if packed is None:  # it has just been carried out, and deleted
                    continue
                chosen = _unpack(packed)
            # The decision may be a new one, after an earlier one was carried out and deleted.
            if not (folder / last).is_file():
                self._carry_out(folder, chosen, last)
        decision.unlink(missing_ok=True)
        return read_or_none(folder / last) == files[last]

    def _carry_out(self, folder: Path, files: Mapping[str, bytes], last: str) -> None:
        for name in (*(name for name in files if name != last), last):
            if not self.create(folder / name, [files[name]]) and name != last:
                raise StoreError(
                    f"{folder / name} is left of another store, or another job makes one there "
                    f"now. If none does, delete everything below {folder}, or give a new address"
                )

    def replace_tree(self, folder: Path, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            self.replace(folder / name, [content])


def _object(path: Path) -> ObjectPath:
    assert isinstance(path, ObjectPath)
    return path


def _pack(files: Mapping[str, bytes]) -> bytes:
    parts = [len(files).to_bytes(8, "little")]
    for name, content in files.items():
        for part in (name.encode(), content):
            parts += [len(part).to_bytes(8, "little"), part]
    return b"".join(parts)


def _unpack(data: bytes) -> dict[str, bytes]:
    parts, at = [], 8
    for _ in range(2 * int.from_bytes(data[:8], "little")):
        size = int.from_bytes(data[at : at + 8], "little")
        parts.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return {name.decode(): content for name, content in zip(parts[::2], parts[1::2], strict=True)}


def publisher_of(path: Path, scratch: Path | None = None) -> Publisher:
    """Return what publishes at ``path``; ``scratch`` is for unpublished files on disk."""
    return ObjectPublisher() if isinstance(path, ObjectPath) else FilePublisher(scratch)


def replace(final: Path, chunks: Iterable[Any]) -> None:
    """Publish a file or an object, replacing what is there."""
    publisher_of(final).replace(final, chunks)


def overwrite(final: Path, content: bytes) -> None:
    """Replace a small file that may be lost in a crash of the machine: it is not flushed."""
    if isinstance(final, ObjectPath):
        final.put([content])
        return
    temporary = final.with_suffix(".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, final)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
