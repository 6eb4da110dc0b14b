"""Read records from files, data sets and the standard library: one reader per entry of ``SOURCES``.

A reader streams records in the input's order and never ends early without an error. A record that
cannot be read, such as a line that is not JSON, is yielded with the reason; the caller decides.
"""

import io
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gradproj.corpus.compression import DAMAGE, DECOMPRESS
from gradproj.corpus.documents import MAX_DOCUMENT_BYTES
from gradproj.corpus.packing import Record
from gradproj.errors import ConfigError, CorpusError

READ_BYTES = 1 << 20
PARQUET_ROWS = 64
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")


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
    """Return an input's key in ``SOURCES``: a file name's end, ``hf:``, ``stdlib:`` or ``-``."""
    for kind in SOURCES:
        if kind.startswith("."):
            found = location.lower().endswith(kind)
        else:
            found = location.startswith(kind) if kind.endswith(":") else location == kind
        if found:
            return kind
    if os.path.isdir(location):
        if _was_saved_to_disk(location):
            return "hf:"
        raise ConfigError(
            f"INPUT {location!r} is a folder; name its files, for instance {location}/*.jsonl"
        )
    compressions = ", ".join(filter(None, DECOMPRESS))
    raise ConfigError(
        f"INPUT {location!r} is of no known kind; give a file ending in {', '.join(JSON_LINES)} "
        f"(perhaps compressed: {compressions}) or .parquet, hf:NAME, stdlib:, or - for JSON lines "
        "on standard input"
    )


def check_input(location: str) -> None:
    """Raise ``CorpusError`` if an input file does not exist; a cheap check before any work."""
    if not source_kind(location).startswith("."):
        return
    if os.path.isdir(location):
        raise CorpusError(
            f"INPUT {location} is a folder; name its files, for instance {location}/*.jsonl"
        )
    if not os.path.exists(location):
        raise CorpusError(
            f"INPUT {location}: no such file; check the path (wildcards are the shell's, unquoted)"
        )


def input_bytes(location: str) -> int | None:
    """Return the size of an input file on disk; None if the input is not a regular file."""
    return os.path.getsize(location) if os.path.isfile(location) else None


# ---- JSON lines


def _read_json_lines(source: InputReader) -> Iterator[Record]:
    ending = source_kind(source.location)
    suffix = next(s for s in sorted(DECOMPRESS, key=len, reverse=True) if ending.endswith(s))
    with open(source.location, "rb", buffering=READ_BYTES) as file:
        if file.seekable():  # not a pipe
            source.position = file.tell
            # No lines at all compress to some bytes, but gzip and bz2 accept a file of 0 bytes.
            if suffix and os.fstat(file.fileno()).st_size == 0:
                raise CorpusError(
                    f"{source.location}: the file has 0 bytes, so it is cut short; fetch it again"
                )
        yield from _json_lines(DECOMPRESS[suffix](file), source.location)


def _read_standard_input(source: InputReader) -> Iterator[Record]:
    yield from _json_lines(sys.stdin.buffer, "standard input")


JSON_LINES = (".jsonl", ".ndjson", ".json")


def _json_lines(stream: Any, location: str) -> Iterator[Record]:
    # Only `\n` ends a line: texts hold U+2028, U+0085 and other line ends of Unicode.
    number = 0
    while True:
        try:
            line, whole = _read_line(stream)
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk, not of what is on it
            raise CorpusError(
                f"{location}, line {number + 1}: the file is cut short or damaged here ({error}); "
                f"{number} lines before it are intact; fetch the file again"
            ) from error
        if not line:
            return
        number += 1
        if number == 1 and (
            line.lstrip(b"\xef\xbb\xbf \t").startswith(b"[") or line.strip() == b"{"
        ):
            raise CorpusError(
                f"{location}: a JSON array or an object over several lines, not JSON lines; write "
                f"one object a line: jq -c '.[]' {location} (or jq -c .)"
            )
        if not whole:
            yield Record(
                f"line {number}",
                problem=f"longer than {MAX_DOCUMENT_BYTES:,} bytes; "
                "is the file JSON lines, one object a line?",
            )
            continue
        # Files that were joined have byte order marks in the middle.
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

        if _was_saved_to_disk(name):
            rows = datasets.load_from_disk(name)
            splits = rows if isinstance(rows, dict) else {str(rows.split or "train"): rows}
            if (split or "train") not in splits and (split or len(splits) > 1):
                raise ValueError(f"its splits are {', '.join(splits)}")
            rows = splits.get(split or "train", next(iter(splits.values())))
        else:
            rows = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True
            )
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


def _was_saved_to_disk(folder: str) -> bool:
    """Return True for a folder that ``save_to_disk`` of a data set, or of several splits, wrote."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED_TO_DISK)


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
    **{name + suffix: _read_json_lines for name in JSON_LINES for suffix in DECOMPRESS},
    ".parquet": _read_parquet,
    "hf:": _read_hugging_face,
    "stdlib:": _read_stdlib,
    "-": _read_standard_input,
}
"""Kind of input -> reader: an end of a file's name, a prefix with a colon, or ``-``."""
