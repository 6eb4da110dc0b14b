"""Read records out of files, data sets and the standard library: one reader per kind of input in ``SOURCES``.

A reader streams records in the input's own order and never ends early without an error. A record that cannot
be read (a line that is not JSON) is still a record, with the reason, so that the caller decides about it.
"""

import gzip
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import zstandard

from gradproj.corpus.documents import MAX_DOCUMENT_BYTES
from gradproj.corpus.packing import Record
from gradproj.errors import ConfigError, CorpusError

READ_BYTES = 1 << 20
COMPRESSED_READ_BYTES = 1 << 16
PARQUET_ROWS = 64


@dataclass
class InputReader:
    """What a reader is asked for, and how far it has come."""

    location: str
    fields: tuple[str, ...] = ()
    """Top-level names to read whatever their type; other nested or binary columns may be left out."""
    position: Callable[[], int] = lambda: 0
    """Bytes of the input's file behind the reader; set by it, valid between two records."""


def read_records(reading: InputReader) -> Iterator[Record]:
    """Every record of one input, in order.

    Raises:
        ConfigError: the input is of no known kind.
        CorpusError: it is missing, unreadable, damaged or cut short.
    """
    kind = source_kind(reading.location)
    check_input(reading.location)
    try:
        yield from SOURCES[kind](reading)
    except OSError as error:
        raise CorpusError(
            f"{reading.location}: cannot be read: {error.strerror or error}"
        ) from error


def source_kind(location: str) -> str:
    """The key of ``SOURCES`` for an input: a prefix such as ``hf:`` or the end of a file's name."""
    for kind in SOURCES:
        if location.startswith(kind) if kind.endswith(":") else location.lower().endswith(kind):
            return kind
    raise ConfigError(
        f"INPUT {location!r} is of no known kind; give a file ending in .jsonl, .jsonl.gz, .jsonl.zst or "
        f".parquet, hf:NAME[@CONFIG][:SPLIT] or stdlib:"
    )


def check_input(location: str) -> None:
    """Raise ``CorpusError`` where an input is a file that is not there; a cheap check before any work."""
    if source_kind(location).endswith(":") or os.path.isfile(location):
        return
    if os.path.isdir(location):
        raise CorpusError(
            f"INPUT {location} is a folder; name its files, for instance {location}/*.jsonl"
        )
    raise CorpusError(
        f"INPUT {location}: no such file; check the path (wildcards are the shell's, unquoted)"
    )


def input_bytes(location: str) -> int | None:
    """The size of an input's file as it lies on the disk; None where the input is not a file."""
    return None if source_kind(location).endswith(":") else os.path.getsize(location)


# ---- JSON lines


def _read_jsonl(reading: InputReader) -> Iterator[Record]:
    with open(reading.location, "rb", buffering=READ_BYTES) as file:
        reading.position = file.tell
        yield from _json_lines(file, reading.location)


def _read_jsonl_gz(reading: InputReader) -> Iterator[Record]:
    with open(reading.location, "rb", buffering=READ_BYTES) as file:
        reading.position = file.tell
        _refuse_empty(file, reading.location)
        with gzip.GzipFile(fileobj=file) as stream:
            yield from _json_lines(stream, reading.location)


def _read_jsonl_zst(reading: InputReader) -> Iterator[Record]:
    with open(reading.location, "rb", buffering=READ_BYTES) as file:
        reading.position = file.tell
        _refuse_empty(file, reading.location)
        with io.BufferedReader(_ZstdReader(file), READ_BYTES) as stream:
            yield from _json_lines(stream, reading.location)


def _refuse_empty(file: BinaryIO, location: str) -> None:
    # Even no lines at all compress to some bytes; Python's gzip takes an empty file for a whole one.
    if os.fstat(file.fileno()).st_size == 0:
        raise CorpusError(f"{location}: the file has 0 bytes, so it is cut short; fetch it again")


class _ZstdReader(io.RawIOBase):
    """The content of all frames of a zstandard file; raises ``EOFError`` where the last frame is cut short.

    zstandard's own stream readers end silently there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        # 2 GiB is the format's largest window (zstd --ultra --long=31); the default refuses over 128 MiB.
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


def _json_lines(stream: Any, location: str) -> Iterator[Record]:
    """One record per line that is not blank. Only ``\\n`` ends a line: texts hold U+2028, U+0085 and such."""
    number = 0
    while True:
        try:
            line, whole = _read_line(stream)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(
                f"{location}, line {number + 1}: the file is cut short or damaged here ({error}); "
                f"{number} lines before it are whole; fetch the file again"
            ) from error
        if not line:
            return
        number += 1
        if not whole:
            yield Record(
                f"line {number}",
                problem=f"longer than {MAX_DOCUMENT_BYTES:,} bytes; is the file JSON lines, one object a line?",
            )
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield _decode_json(line, f"line {number}")


def _read_line(stream: Any) -> tuple[bytes, bool]:
    """The next line and whether it is all of it: of one that is too long only the start, the rest is dropped."""
    start = line = stream.readline(MAX_DOCUMENT_BYTES)
    whole = True
    while len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
        line = stream.readline(MAX_DOCUMENT_BYTES)
        whole = whole and not line
    return start, whole


def _decode_json(line: bytes, place: str) -> Record:
    try:
        return Record(place, msgspec.json.decode(line))
    except (ValueError, RecursionError):
        return _decode_json_slowly(line, place)


def _decode_json_slowly(line: bytes, place: str) -> Record:
    """json explains better than msgspec, and takes NaN and lone surrogates, which ``pack`` judges."""
    try:
        return Record(place, json.loads(line.rstrip(b"\r\n").decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(
            place, problem=f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
        )
    except RecursionError:
        return Record(place, problem="JSON nested too deeply")
    except json.JSONDecodeError as error:
        return Record(
            place,
            problem=f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.pos + 1})",
        )
    except ValueError as error:
        return Record(place, problem=f"not valid JSON ({error})")


# ---- Other inputs


def _read_parquet(reading: InputReader) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet, types

    number = 0
    try:
        with parquet.ParquetFile(reading.location) as file:
            n_bytes, n_rows = os.path.getsize(reading.location), max(file.metadata.num_rows, 1)
            columns = [
                column.name
                for column in file.schema_arrow
                if column.name in reading.fields
                or not (types.is_nested(column.type) or types.is_binary(column.type))
            ]
            reading.position = lambda: n_bytes * number // n_rows
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for value, problem in _batch_rows(batch):
                    number += 1
                    yield Record(f"row {number}", value, problem)
    except pyarrow.ArrowException as error:
        raise CorpusError(
            f"{reading.location}, after row {number}: not whole parquet ({error})"
        ) from error


def _batch_rows(batch: Any) -> Iterable[tuple[Any, str | None]]:
    try:
        return [(row, None) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        return [_one_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _one_row(batch: Any) -> tuple[Any, str | None]:
    try:
        return batch.to_pylist()[0], None
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 ({error.reason})"


def _read_hugging_face(reading: InputReader) -> Iterator[Record]:
    """Rows of ``hf:NAME[@CONFIG][:SPLIT]``; NAME is a name on the hub or a local folder of data files."""
    path, _, split = reading.location.removeprefix("hf:").partition(":")
    name, _, config = path.partition("@")
    if not name:
        raise ConfigError(
            f"INPUT {reading.location!r} names no data set; write hf:NAME[@CONFIG][:SPLIT]"
        )
    number = 0
    try:
        import datasets

        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            number += 1
            yield Record(f"row {number}", row)
    except Exception as error:  # datasets lets errors of many libraries through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f", after row {number}" if number else ""
        raise CorpusError(
            f"INPUT {reading.location}{place}: {reason}. Check name, configuration and split "
            "(hf:NAME[@CONFIG][:SPLIT]) and the network, or give a local folder: hf:./FOLDER"
        ) from error


def _read_stdlib(reading: InputReader) -> Iterator[Record]:
    """The running Python's own library: a document per source file, a domain per top-level package."""
    if reading.location != "stdlib:":
        raise ConfigError(f"INPUT {reading.location!r}: stdlib: takes no name after the colon")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _library_files(root):
        name = path.relative_to(root).as_posix()
        meta = {"pile_set_name": name.split("/")[0] if "/" in name else "modules", "path": name}
        source = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
            yield Record(name, {"text": source.decode(encoding), "meta": meta})
        except (SyntaxError, UnicodeDecodeError) as error:
            yield Record(name, problem=f"not in the encoding it declares ({error})")


def _library_files(root: Path) -> list[Path]:
    # Tests are left out: they are most of the files, and hold broken encodings on purpose.
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out]
        found += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


SOURCES: dict[str, Callable[[InputReader], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
    "hf:": _read_hugging_face,
    "stdlib:": _read_stdlib,
}
"""Kind of input -> its reader. A key with a colon starts the input's name, another ends it."""
