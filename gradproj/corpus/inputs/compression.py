"""Compressed files as streams of their content, with an error where one is cut short or damaged."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

COMPRESSED_READ_BYTES = 1 << 16
CONTENT_READ_BYTES = 1 << 20


class _ZstdReader(io.RawIOBase):
    """The content of all frames of a zstandard file.

    Raises ``EOFError`` if the last frame is cut short; zstandard's own stream readers end silently.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # 2 GiB is the format's largest window (zstd --ultra --long=31), 128 MiB the default limit.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._packed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._packed = self._packed or self._file.read(COMPRESSED_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the stream ends inside a zstandard frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n_bytes = min(len(buffer), len(self._plain))
        buffer[:n_bytes] = self._plain[:n_bytes]
        self._plain = self._plain[n_bytes:]
        return n_bytes


DECOMPRESS: dict[str, Callable[[BinaryIO], Any]] = {
    "": lambda file: file,
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(_ZstdReader(file), CONTENT_READ_BYTES),
    ".zstd": lambda file: io.BufferedReader(_ZstdReader(file), CONTENT_READ_BYTES),
}
"""End of a file's name -> its content as a stream."""
# bz2 and gzip report damage as an OSError without a number.
DAMAGE = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
