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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from gradproj.corpus.documents import MAX_DOCUMENT_BYTES
from gradproj.corpus.inputs.compression import DAMAGE, DECOMPRESS
from gradproj.corpus.inputs.records import InputReader, Record
from gradproj.corpus.inputs.remote import fetched, input_facts, open_input
from gradproj.corpus.inputs.tables import (
    read_arrow,
    read_hugging_face,
    read_parquet,
    was_saved_to_disk,
)
from gradproj.corpus.inputs.tokens import COMPANIONS, TOKEN_INPUTS
from gradproj.errors import ConfigError, CorpusError
from gradproj.storage.address import Address, is_remote
from gradproj.storage.stream import ObjectChanged


def read_records(source: InputReader) -> Iterator[Record]:
    """Yield every record of one input, in order.

    Raises:
        ConfigError: the input is of no known kind.
        CorpusError: the input is missing, unreadable, damaged or cut short.
    """
    kind = source_kind(source.location)
    check_input(source.location, source.anonymous)
    try:
        if is_remote(source.location) and SOURCES[kind] is not _read_json_lines:
            with fetched(source, {".bin": (".idx",), ".ds": (".ds.index", ".ds.loss")}) as local:
                yield from SOURCES[kind](local)
            return
        yield from SOURCES[kind](source)
    except ObjectChanged as error:
        raise CorpusError(f"{source.location}: changed while it was read: {error}") from None
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
        if was_saved_to_disk(location):
            return "hf:"
        raise ConfigError(
            f"INPUT {location!r} is a folder; name its files, for instance {location}/*.jsonl"
        )
    companion = next((end for end in COMPANIONS if location.lower().endswith(end)), None)
    if companion:
        raise ConfigError(
            f"INPUT {location!r} is read with its file of tokens; name only that one: "
            f"{location[: -len(companion)]}{'.bin' if companion == '.idx' else '.ds'}"
        )
    compressions = ", ".join(filter(None, DECOMPRESS))
    raise ConfigError(
        f"INPUT {location!r} is of no known kind; give a file ending in {', '.join(JSON_LINES)} "
        f"(perhaps compressed: {compressions}), .parquet or .arrow, of token ids (.bin, .npy, "
        ".ds), hf:NAME, stdlib:, or - for JSON lines on standard input"
    )


def check_input(location: str, anonymous: bool = False) -> None:
    """Raise ``CorpusError`` if an input file does not exist; a cheap check before any work."""
    if not source_kind(location).startswith("."):
        return
    if is_remote(location):
        if input_facts(Address.parse(location, anonymous)) is None:
            raise CorpusError(f"INPUT {location}: no such file; check the address")
        return
    if os.path.isdir(location):
        raise CorpusError(
            f"INPUT {location} is a folder; name its files, for instance {location}/*.jsonl"
        )
    if not os.path.exists(location):
        raise CorpusError(
            f"INPUT {location}: no such file; check the path (wildcards are the shell's, unquoted)"
        )


def input_bytes(location: str, anonymous: bool = False) -> int | None:
    """Return the size of an input file; None if the input is not a regular file."""
    if is_remote(location):
        facts = input_facts(Address.parse(location, anonymous))
        return None if facts is None else facts.size_bytes
    return os.path.getsize(location) if os.path.isfile(location) else None


# ---- JSON lines


def _read_json_lines(source: InputReader) -> Iterator[Record]:
    ending = source_kind(source.location)
    suffix = next(s for s in sorted(DECOMPRESS, key=len, reverse=True) if ending.endswith(s))
    file, n_bytes = open_input(source)
    with file:
        if n_bytes is not None:  # not a pipe
            source.position = file.tell
            # No lines at all compress to some bytes, but gzip and bz2 accept a file of 0 bytes.
            if suffix and n_bytes == 0:
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


# ---- The standard library


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
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    **TOKEN_INPUTS,
    "hf:": read_hugging_face,
    "stdlib:": _read_stdlib,
    "-": _read_standard_input,
}
"""Kind of input -> reader: an end of a file's name, a prefix with a colon, or ``-``."""
