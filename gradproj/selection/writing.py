"""Write selected documents, best first, reading each tar once and in its order.

Two passes, in memory for one document and 8 bytes for each selected one: the first reads the tars
and appends every selected document to a spool file; the second writes the spool's documents in the
order of the selection. The spool takes as much disk space as the selection.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gradproj.corpus.documents import ReadLimits, fields_of_members
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.messages import BadContentError
from gradproj.corpus.stream import Members, read_members
from gradproj.corpus.tar.writer import TarSequence
from gradproj.corpus.tokenization import write_tokenization
from gradproj.errors import CorpusError
from gradproj.selection.picks import Picks
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample

LISTING = "selection.jsonl"
"""In a folder of tars: rank, score and origin of every document."""
_AT_ONCE = 1024

Record = Callable[[int, Sample], dict[str, Any]]
"""Position in the selection, and the document there -> its facts."""


def write_ids(path: Path, picks: Picks) -> None:
    """Write the ids as ``(n,)`` int64 in numpy's format."""
    with open(path, "xb") as file:
        np.save(file, picks.chosen.ids, allow_pickle=False)


def write_lines(
    path: Path,
    spool: Path,
    picks: Picks,
    record: Record,
    store: ProjectionStore,
    index: CorpusIndex,
) -> None:
    """Write a JSON line of each document: its facts, and then its own fields."""

    def line(place: int, sample: Sample, members: Members) -> bytes:
        return json_line(with_fields(record(place, sample), own_fields(members)))

    with open(path, "xb") as file:
        for data in _in_order(spool, picks, store, index, line):
            file.write(data)


def write_tars(
    folder: Path,
    spool: Path,
    picks: Picks,
    record: Record,
    store: ProjectionStore,
    index: CorpusIndex,
    samples_per_tar: int,
) -> int:
    """Write tars of all members, unchanged under keys by rank, and a listing; return their number.

    If the corpus was tokenized ahead, its rules are written beside the tars.

    Equal keys of different tars do not meet in one, since the new ones are unique.
    """

    def packed(place: int, sample: Sample, members: Members) -> bytes:
        return msgspec.msgpack.encode((json_line(record(place, sample)), members.by_suffix))

    tars, decode = (
        TarSequence(folder, samples_per_tar),
        msgspec.msgpack.Decoder(tuple[bytes, dict[str, bytes]]).decode,
    )
    with open(folder / LISTING, "xb") as listing:
        for data in _in_order(spool, picks, store, index, packed):
            line, members = decode(data)
            listing.write(line)
            tars.add(members)
        tars.end_tar()
        listing.flush()
        os.fsync(listing.fileno())
    if index.tokenization is not None:
        write_tokenization(folder, index.tokenization)
    return tars.n_tars


def _in_order(
    spool: Path,
    picks: Picks,
    store: ProjectionStore,
    index: CorpusIndex,
    encode: Callable[[int, Sample, Members], bytes],
) -> Iterator[bytes]:
    """Yield ``encode(place, sample, members)`` of all documents, best first."""
    ids = picks.chosen.ids
    order = np.argsort(ids)
    offsets = np.zeros(len(ids), np.int64)
    members = read_members(index, ids[order])
    with open(spool, "w+b") as file:
        for start in range(0, len(ids), _AT_ONCE):
            places = order[start : start + _AT_ONCE]
            for place, sample in zip(places.tolist(), store.samples(ids[places]), strict=True):
                found = next(members)
                if found.key != sample.key:
                    raise CorpusError(
                        f"document {sample.sample_id} is {found.key} in the tars and {sample.key} "
                        f"in {store.path}: the tars are not those of the job"
                    )
                data = encode(place, sample, found)
                offsets[place] = file.tell()
                file.write(len(data).to_bytes(8, "little") + data)
        for offset in offsets.tolist():
            file.seek(offset)
            yield file.read(int.from_bytes(file.read(8), "little"))
    spool.unlink()


def with_fields(record: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a document's own fields; those of the record's names in ``document``.

    ``prepare`` and ``train`` read the content of such a line as that of the document.
    """
    own = {name: value for name, value in fields.items() if name not in record}
    taken = {name: value for name, value in fields.items() if name in record}
    return {**record, **({"document": taken} if taken else {}), **own}


def own_fields(members: Members) -> dict[str, Any]:
    """Return the fields of ``{key}.json``, with the content of the other member it may be in."""
    try:
        fields = fields_of_members(members.by_suffix, ReadLimits())
    except BadContentError as error:  # the job read it, so the tar has changed
        raise CorpusError(f"document {members.sample_id} ({members.key}): {error}") from error
    arrays = {k: v.tolist() for k, v in fields.items() if isinstance(v, np.ndarray)}
    return {**fields, **arrays}


def json_line(value: dict[str, Any]) -> bytes:
    """Return one line of JSON in UTF-8; half of a surrogate pair is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"
