"""Read records from files, data sets and the standard library: one reader per entry of ``SOURCES``.

A reader streams records in the input's order and never ends early without an error. A record that
cannot be read, such as a line that is not JSON, is yielded with the reason; the caller decides.
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
    """An input, the fields to read from it, and the position reached."""

    location: str
    fields: tuple[str, ...] = ()
    """Top-level names to read, whatever their type. Other nested or binary columns are skipped."""
    position: Callable[[], int] = lambda: 0
    """Returns the bytes of the file read so far. Set by the reader, valid between two records."""


def read_records(source: InputReader) -> Iterator[Record]:
    """Yield every record of one input, in order.

    Raises:
        ConfigError: the input is of no known kind.
        CorpusError: the input is missing, unreadable, damaged or cut short.
    """
    kind = source_kind(source.location)
    check_input(source.location)
    try:
        yield from SOURCES[kind](source)
    except OSError as error:
        raise CorpusError(
            f"{source.location}: cannot be read: {error.strerror or error}"
        ) from error


def source_kind(location: str) -> str:
    """Return an input's key in ``SOURCES``: a prefix such as ``hf:`` or a file name's end."""
    for kind in SOURCES:
        if location.startswith(kind) if kind.endswith(":") else location.lower().endswith(kind):
            return kind
    prefixes = [kind for kind in SOURCES if kind.endswith(":")]
    suffixes = [kind for kind in SOURCES if kind not in prefixes]
    raise ConfigError(
        f"INPUT {location!r} is of no known kind; give a file ending in {', '.join(suffixes)}, or "
        f"an input that begins with {' or '.join(prefixes)}"
    )


def check_input(location: str) -> None:
    """Raise ``CorpusError`` if an input file does not exist; a cheap check before any work."""
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
    """Return the size of an input file on disk; None if the input is not a file."""
    return None if source_kind(location).endswith(":") else os.path.getsize(location)


# ---- JSON lines


def _read_jsonl(source: InputReader) -> Iterator[Record]:
    with open(source.location, "rb", buffering=READ_BYTES) as file:
        source.position = file.tell
        yield from _json_lines(file, source.location)


def _read_compressed(
    source: InputReader, decompress: Callable[[BinaryIO], Any]
) -> Iterator[Record]:
    with open(source.location, "rb", buffering=READ_BYTES) as file:
        source.position = file.tell
        # No lines at all compress to some bytes, but Python's gzip accepts a file of 0 bytes.
        if os.fstat(file.fileno()).st_size == 0:
            raise CorpusError(
                f"{source.location}: the file has 0 bytes, so it is cut short; fetch it again"
            )
        with decompress(file) as stream:
            yield from _json_lines(stream, source.location)


def _read_jsonl_gz(source: InputReader) -> Iterator[Record]:
    return _read_compressed(source, lambda file: gzip.GzipFile(fileobj=file))


def _read_jsonl_zst(source: InputReader) -> Iterator[Record]:
    return _read_compressed(source, lambda file: io.BufferedReader(_ZstdReader(file), READ_BYTES))


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


def _json_lines(stream: Any, location: str) -> Iterator[Record]:
    # Only `\n` ends a line: texts hold U+2028, U+0085 and other line ends of Unicode.
    number = 0
    while True:
        try:
            line, whole = _read_line(stream)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(
                f"{location}, line {number + 1}: the file is cut short or damaged here ({error}); "
                f"{number} lines before it are intact; fetch the file again"
            ) from error
        if not line:
            return
        number += 1
        if not whole:
            yield Record(
                f"line {number}",
                problem=f"longer than {MAX_DOCUMENT_BYTES:,} bytes; "
                "is the file JSON lines, one object a line?",
            )
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line and not line.isspace():
            yield _decode_json(line, f"line {number}")


def _read_line(stream: Any) -> tuple[bytes, bool]:
    """Return the next line and True, or the beginning of a line that is too long and False."""
    start = line = stream.readline(MAX_DOCUMENT_BYTES)
    whole = True
    while len(line) == MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
        line = stream.readline(MAX_DOCUMENT_BYTES)
        whole = whole and not line
    return start, whole


def _decode_json(line: bytes, place: str) -> Record:
    try:
        return Record(place, msgspec.json.decode(line))
    except (ValueError, msgspec.MsgspecError, RecursionError):  # before 0.21 not a ValueError
        return _decode_json_slowly(line, place)


def _decode_json_slowly(line: bytes, place: str) -> Record:
    # json has the better messages, and accepts NaN and lone surrogates, which `pack` handles.
    try:
        return Record(place, json.loads(line.rstrip(b"\r\n").decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(
            place, problem=f"not UTF-8 (byte 0x{line[error.start]:02x} at {error.start + 1})"
        )
    except RecursionError:
        return Record(place, problem="JSON nested too deeply")
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")
        return Record(place, problem=f"not valid JSON ({message} at character {error.pos + 1})")
    except ValueError as error:
        return Record(place, problem=f"not valid JSON ({error})")


# ---- Other inputs


def _read_parquet(source: InputReader) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet, types

    number = 0
    try:
        with parquet.ParquetFile(source.location) as file:
            n_bytes, n_rows = os.path.getsize(source.location), max(file.metadata.num_rows, 1)
            columns = [
                column.name
                for column in file.schema_arrow
                if column.name in source.fields
                or not (types.is_nested(column.type) or types.is_binary(column.type))
            ]
            source.position = lambda: n_bytes * number // n_rows
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for value, problem in _batch_rows(batch):
                    number += 1
                    yield Record(f"row {number}", value, problem)
    except pyarrow.ArrowException as error:
        raise CorpusError(
            f"{source.location}, after row {number}: not whole parquet ({error})"
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


def _read_hugging_face(source: InputReader) -> Iterator[Record]:
    """Yield rows of ``hf:NAME[@CONFIG][:SPLIT]``; NAME is a hub name or a folder of data files."""
    path, _, split = source.location.removeprefix("hf:").partition(":")
    name, _, config = path.partition("@")
    if not name:
        raise ConfigError(
            f"INPUT {source.location!r} names no data set; write hf:NAME[@CONFIG][:SPLIT]"
        )
    number = 0
    try:
        import datasets

        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            number += 1
            yield Record(f"row {number}", row)
    except Exception as error:  # datasets does not wrap the errors of the libraries it uses
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        place = f", after row {number}" if number else ""
        raise CorpusError(
            f"INPUT {source.location}{place}: {reason}. Check name, configuration and split "
            "(hf:NAME[@CONFIG][:SPLIT]) and the network, or give a local folder: hf:./FOLDER"
        ) from error


def _read_stdlib(source: InputReader) -> Iterator[Record]:
    """Yield a document per source file of this Python's library, a domain per top-level package."""
    if source.location != "stdlib:":
        raise ConfigError(f"INPUT {source.location!r}: stdlib: takes no name after the colon")
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in _library_files(root):
        name = path.relative_to(root).as_posix()
        meta = {"pile_set_name": name.split("/")[0] if "/" in name else "modules", "path": name}
        content = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            yield Record(name, {"text": content.decode(encoding), "meta": meta})
        except (SyntaxError, UnicodeDecodeError) as error:
            yield Record(name, problem=f"not in the encoding it declares ({error})")


def _library_files(root: Path) -> list[Path]:
    # Tests are most of the files, and hold broken encodings on purpose.
    excluded = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


SOURCES: dict[str, Callable[[InputReader], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl_gz,
    ".jsonl.zst": _read_jsonl_zst,
    ".parquet": _read_parquet,
    "hf:": _read_hugging_face,
    "stdlib:": _read_stdlib,
}
"""Kind of input -> reader. A key that ends in a colon is a prefix of the input, others a suffix."""
