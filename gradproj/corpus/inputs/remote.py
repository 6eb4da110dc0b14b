"""Inputs at addresses: JSON lines are streamed, other files are fetched one at a time."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from gradproj.corpus.inputs.records import InputReader
from gradproj.errors import CorpusError
from gradproj.storage.address import Address, is_remote
from gradproj.storage.facts import ObjectFacts
from gradproj.storage.listing import all_facts
from gradproj.storage.stream import ObjectStream

_READ_BYTES = 1 << 20


@lru_cache(maxsize=100_000)
def input_facts(address: Address) -> ObjectFacts | None:
    """Return size and version of a remote file, once asked for; None if there is none."""
    return all_facts([address]).get(address)


def open_input(source: InputReader) -> tuple[BinaryIO, int | None]:
    """Open an input that is read forward; also its size, None of a pipe."""
    if is_remote(source.location):
        address = Address.parse(source.location, source.anonymous)
        facts = _facts_of(address)
        stream = cast(BinaryIO, io.BufferedReader(ObjectStream(address, facts), _READ_BYTES))
        return stream, facts.size_bytes
    file = open(source.location, "rb", buffering=_READ_BYTES)  # noqa: SIM115 - the caller's
    return file, os.fstat(file.fileno()).st_size if file.seekable() else None


@contextmanager
def fetched(source: InputReader, companions: dict[str, tuple[str, ...]]) -> Iterator[InputReader]:
    """Fetch a remote input into a temporary folder, which is deleted at the end.

    ``companions`` are the ends of names of files that are read with one of another end, if they
    exist. Messages name the address in place of the copy.
    """
    address = Address.parse(source.location, source.anonymous)
    with tempfile.TemporaryDirectory(prefix="gradproj-input-") as folder:
        path = Path(folder) / address.name
        _fetch(address, path)
        for end, others in companions.items():
            for other in others if address.name.lower().endswith(end) else ():
                beside = address.with_name(address.name[: -len(end)] + other)
                if input_facts(beside) is not None:
                    _fetch(beside, Path(folder) / beside.name)
        local = replace(source, location=str(path))
        source.position = lambda: local.position()
        try:
            yield local
        except CorpusError as error:
            raise CorpusError(str(error).replace(str(path), source.location)) from error


def _facts_of(address: Address) -> ObjectFacts:
    facts = input_facts(address)
    if facts is None:
        raise CorpusError(f"INPUT {address}: no such file; check the address")
    return facts


def _fetch(address: Address, path: Path) -> None:
    with ObjectStream(address, _facts_of(address)) as stream, open(path, "wb") as file:
        while data := stream.read(_READ_BYTES):
            file.write(data)
