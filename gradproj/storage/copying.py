"""Copies of files and objects between disks and buckets, checked and never half there."""

from collections.abc import Iterator
from pathlib import Path

from gradproj.errors import StoreError, damaged
from gradproj.files import (
    crc32c,
    explain_os_errors,
    replace_atomically,
    temporary_beside,
    write_file_durably,
)
from gradproj.storage.contents import chunks_of, sum_of
from gradproj.storage.object_path import ObjectPath


def size_or_none(path: Path) -> int | None:
    """Return the size of a file or an object; None if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def copy_file(
    source: Path, final: Path, expected: dict[str, int] | None = None, read_back: bool = True
) -> int:
    """Copy a file or an object, replacing what is at ``final``; return its bytes.

    Args:
        source: of one version, also if it is replaced meanwhile.
        final: appears whole, or keeps what it was.
        expected: ``{"bytes", "crc32c"}`` that the source must have.
        read_back: read the copy again, and compare its checksum.

    Raises:
        FileNotFoundError: there is no source.
        StoreError: the source is not as expected, or the copy is not as it was written.
    """
    written = _Written(source, expected)
    if isinstance(final, ObjectPath):
        final.put_in_parts(written.chunks)
    else:
        with explain_os_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(final)
        write_file_durably(temporary, written.chunks())
        replace_atomically(temporary, final)
    if read_back and sum_of(final) != written.sum:
        raise StoreError(
            f"{final} does not hold what was written to it. Run the same command again, which "
            "copies it again; if that does not help, the disk, the network or the bucket is faulty"
        )
    return written.sum["bytes"]


class _Written:
    """The chunks of a file, and their sum. Ends with an error if that is not the expected one."""

    def __init__(self, source: Path, expected: dict[str, int] | None) -> None:
        self._source, self._expected = source, expected

    def chunks(self) -> Iterator[memoryview]:
        self.sum = {"bytes": 0, "crc32c": 0}
        for data in chunks_of(self._source):
            self.sum = {
                "bytes": self.sum["bytes"] + len(data),
                "crc32c": crc32c(data, self.sum["crc32c"]),
            }
            yield data
        if self._expected is not None and self.sum != self._expected:
            raise damaged(self._source, "it is not what its unit's record says")
