"""Read and check a tar's headers: names, sizes and types as the standard library's ``tarfile``.

``tarfile``, and so webdataset, treats the first header it cannot read as the end of the archive.
Here any damage is an error that names the tar, the byte and the kind.
"""

import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from gradproj.errors import CorpusError
from gradproj.storage.address import Address, Location
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.stream import ObjectStream

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
# A tar is padded with zeros to a whole record, 10 KiB by default. Much more than that is left by a
# crash or an interrupted copy: a file of the right length whose end was never written.
_MAX_PADDING = 2**20
_CHUNK = 2**20
_MAX_SEARCHED = 2**28

_EXTENSIONS = b"LKxXg"
_WITHOUT_DATA = b"123456"
"""Links, devices, folders and pipes: tarfile reads no data for them, whatever their size field."""

_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_COMPRESSIONS = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
)


class Member(NamedTuple):
    """A regular file in a tar; ``start`` is the offset of its first header, extensions included."""

    start: int
    name: str
    payload: int
    n_bytes: int


class TarBytes:
    """A tar as a sequence of bytes to slice, with one chunk in memory."""

    path: Location

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._begin(os.fstat(self._file.fileno()).st_size)

    def _begin(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._first = 0
        self._loaded = b""

    def __enter__(self) -> "TarBytes":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._n_bytes

    def load(self, first: int, n_bytes: int) -> bytes:
        """Read a chunk of the tar and keep it until the next call."""
        self._loaded = b""  # the next chunk can reuse this memory, still in the CPU's cache
        self._loaded = self[first : first + n_bytes]
        self._first = first
        return self._loaded

    def __getitem__(self, key: slice) -> bytes:
        start, stop, _ = key.indices(self._n_bytes)
        if self._first <= start and stop <= self._first + len(self._loaded):
            return self._loaded[start - self._first : stop - self._first]
        return self._read(start, stop)

    def _read(self, start: int, stop: int) -> bytes:
        pieces = []
        while start < stop:
            piece = os.pread(self._file.fileno(), stop - start, start)
            if not piece:
                raise CorpusError(
                    f"{self.path}: became shorter while it was read; "
                    "index it again when it is complete"
                )
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def damage(self, offset: int, kind: str) -> CorpusError:
        """Return the error for damage at a byte of the tar."""
        return CorpusError(
            f"{self.path}: damaged at byte {offset:,}: {kind}. "
            "Copy or make this tar again, or leave it out of the corpus"
        )


class StreamedTarBytes(TarBytes):
    """A remote tar, from one request. Slices lie in the loaded chunk or behind it.

    What is read ahead of the chunk, such as the rest of a long member, stays in memory until the
    chunks have come so far.
    """

    def __init__(self, path: Address, facts: ObjectFacts) -> None:
        self.path = path
        self._stream = ObjectStream(path, facts)
        self._ahead = bytearray()
        self._begin(facts.size_bytes)

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def load(self, first: int, n_bytes: int) -> bytes:
        """Read the next chunk and keep it until the next call."""
        stop = min(first + n_bytes, self._n_bytes)
        self._read_ahead(stop - first)
        self._first, self._loaded = first, bytes(self._ahead[: stop - first])
        del self._ahead[: stop - first]
        return self._loaded

    def _read(self, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        following = self._first + len(self._loaded)
        self._read_ahead(stop - following)
        head = self._loaded[start - self._first :] if start < following else b""
        return head + self._ahead[max(0, start - following) : stop - following]

    def _read_ahead(self, n_bytes: int) -> None:
        if n_bytes > len(self._ahead):
            self._ahead += self._stream.read(n_bytes - len(self._ahead))


def open_tar_bytes(path: Location, facts: ObjectFacts | None) -> TarBytes:
    """Open a tar; of a remote one the facts must be known."""
    if isinstance(path, Address):
        assert facts is not None, path
        return StreamedTarBytes(path, facts)
    return TarBytes(path)


def read_member(data: TarBytes, offset: int) -> tuple[Member, int] | None:
    """Return the member at ``offset`` and the offset of the next; None at the tar's end.

    Extension headers before the member are read. Anything but a regular file has an empty name.

    Raises:
        CorpusError: the tar is damaged here, or uses a feature that is not supported.
    """
    name: str | None = None
    n_bytes: int | None = None
    position = offset
    while True:
        head = _checked_header(data, position)
        if head is None:
            if position != offset:
                raise data.damage(position, "a long-name or pax header with no member after it")
            _check_end(data, position)
            return None
        payload = position + _BLOCK
        if head.type not in _EXTENSIONS:
            break
        position = payload + (head.size + 511 & ~511)
        if position > len(data):
            raise data.damage(payload - _BLOCK, "cut inside an extension header")
        body = data[payload : payload + head.size]
        # The first of several extension headers is the outermost, and has the last word.
        if head.type == b"L" and name is None:
            name = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        elif head.type in b"xXg":
            records = _pax_records(body, payload, data)
            _reject_unsupported(records, head.type == b"g", payload, data)
            if name is None and b"path" in records:
                name = records[b"path"].decode("utf-8", "surrogateescape").rstrip("/")
            if n_bytes is None and b"size" in records:
                if not records[b"size"].isdigit() or len(records[b"size"]) > 20:
                    raise data.damage(payload, "a pax header's size is no number")
                n_bytes = int(records[b"size"])
    if head.type == tarfile.GNUTYPE_SPARSE:
        raise CorpusError(
            f"{data.path}: at byte {offset:,}: a GNU sparse member, which is not supported; "
            "make the tar without --sparse"
        )
    if head.type in _WITHOUT_DATA:
        return Member(offset, "", payload, 0), payload
    name = head.name if name is None else name
    n_bytes = head.size if n_bytes is None else n_bytes
    if payload + n_bytes > len(data):
        raise data.damage(
            offset,
            f"cut inside the member {name!r}, which ends at byte {payload + n_bytes:,}; "
            f"the file has {len(data):,}",
        )
    following = payload + (n_bytes + 511 & ~511)
    return Member(offset, name if head.isreg() else "", payload, n_bytes), following


def _checked_header(data: TarBytes, offset: int) -> tarfile.TarInfo | None:
    """Return the header at ``offset`` after checking its checksum; None for a block of zeros."""
    head = data[offset : offset + _BLOCK]
    if offset > len(data):
        raise data.damage(len(data), "cut inside the padding after a member")
    if not head:
        raise data.damage(
            offset, "cut at a member's end (the two zero blocks that close a tar are missing)"
        )
    if len(head) < _BLOCK:
        raise data.damage(offset, "cut inside a header, or inside the padding before it")
    if head == _ZEROS:
        return None
    if offset == 0:
        for magic, compression in _COMPRESSIONS:
            if head.startswith(magic):
                raise CorpusError(
                    f"{data.path}: is compressed with {compression}; unpack it, since samples are "
                    "found by offset"
                )
    try:
        info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if offset == 0:
            raise data.damage(0, "its first header's checksum is wrong, or it is no tar") from error
        kind = "a header's checksum is wrong, or one of its numbers"
        raise data.damage(offset, kind) from error
    if info.size < 0:
        raise data.damage(offset, f"a header's size is no number: {head[124:136]!r}")
    return info


def _check_end(data: TarBytes, offset: int) -> None:
    """Check that only the end of the archive follows the block of zeros at ``offset``."""
    second = data[offset + _BLOCK : offset + 2 * _BLOCK]
    if len(second) < _BLOCK:
        raise data.damage(offset, "cut inside the two zero blocks that close a tar")
    if second != _ZEROS:
        raise data.damage(offset, "a header is zeroed, and data follows it")
    if len(data) - offset > _MAX_SEARCHED:
        raise data.damage(offset, f"{len(data) - offset:,} bytes follow the tar's end")
    for position in range(offset, len(data), _CHUNK):
        rest = data[position : position + _CHUNK].lstrip(b"\0")
        if rest:
            garbage = min(position + _CHUNK, len(data)) - len(rest)
            raise data.damage(
                garbage, "trailing garbage, or a zeroed stretch before it: data after the tar's end"
            )
    if len(data) - offset > _MAX_PADDING:
        raise data.damage(
            offset,
            f"{len(data) - offset:,} zero bytes to the end, as an interrupted copy leaves them",
        )


def _pax_records(body: bytes, offset: int, data: TarBytes) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    position = 0
    while body[position:].strip(b"\0"):
        match = _PAX_RECORD.match(body, position)
        stop = position + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(body) or body[stop - 1] != 0x0A:
            raise data.damage(offset + position, "a pax header's record is malformed")
        records[match[2]] = body[match.end() : stop - 1]
        position = stop
    return records


def _reject_unsupported(
    records: dict[bytes, bytes], is_global: bool, offset: int, data: TarBytes
) -> None:
    wrong = [key for key in records if key.startswith(b"GNU.sparse")]
    if is_global:
        # They apply to every later member, but a reader that starts in mid-tar cannot know them.
        wrong += [key for key in (b"path", b"size") if key in records]
    if wrong:
        raise CorpusError(
            f"{data.path}: at byte {offset:,}: a pax header sets "
            f"{wrong[0].decode(errors='replace')!r}{' for all members' if is_global else ''}, "
            "which is not supported; make the tar again"
        )
