"""Stream the documents of a range of sample ids, in id order, with none missing.

tarfile and webdataset's grouping read from the byte offset of the block of 64 samples in which the
range begins. They end silently at damage, so every block's number of samples and keys are checked
against the index.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import group_by_keys

from gradproj.corpus.documents import (
    MAX_DOCUMENT_BYTES,
    Document,
    DomainReader,
    ReadLimits,
    read_document,
)
from gradproj.corpus.index import CorpusIndex, Tar
from gradproj.corpus.tar.places import open_tar
from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK, crc_of_keys, key_and_suffix
from gradproj.errors import CorpusError
from gradproj.storage.cache import FileCache

_DEFAULT_LIMITS = ReadLimits()
_POSITION_IN_MESSAGE = re.compile(r" @ <.*>$")


def read_documents(
    index: CorpusIndex, start: int, stop: int, limits: ReadLimits = _DEFAULT_LIMITS
) -> Iterator[Document]:
    """Yield exactly the documents of ids ``[start, stop)``, in id order.

    Any split of a range reads the same documents. A sample that cannot be decoded is a document
    with a ``problem``; it does not end the stream.

    Raises:
        CorpusError: a tar is missing, or changed or damaged since it was indexed; names the tar and
            the block of samples. It is raised before the last document of the range is yielded, so
            a caller that takes ``stop - start`` documents never misses it.
    """
    domain_of = DomainReader(index.domain_field)
    for number, first, last in index.spans(start, stop):
        tar = index.tars[number]
        for position, sample in _samples(tar, first, last, limits, index.cache):
            key, sample_id = sample["__key__"], tar.start_id + position
            yield read_document(sample, sample_id, key, number, domain_of, limits, index.texts_only)


@dataclass(frozen=True)
class Members:
    """A sample as its tar holds it."""

    sample_id: int
    key: str
    by_suffix: dict[str, bytes]
    """Lower-case suffix (``json``, ``labels.npy``) -> content."""


def read_members(index: CorpusIndex, ids: np.ndarray) -> Iterator[Members]:
    """Yield all members of the samples of ascending ids, whatever they are.

    Only the blocks of 64 samples that hold one of the ids are read, each once.

    Raises:
        CorpusError: as ``read_documents``, or a member is over the limit of one in memory.
    """
    runs = np.split(ids, 1 + np.flatnonzero(np.diff(ids // SAMPLES_PER_BLOCK) > 1))
    for run in runs if len(ids) else []:
        for number, first, last in index.spans(int(run[0]), int(run[-1]) + 1):
            tar = index.tars[number]
            begin, end = np.searchsorted(run, [tar.start_id + first, tar.start_id + last])
            positions = set((run[begin:end] - tar.start_id).tolist())
            for position, sample in _samples(tar, first, last, _DEFAULT_LIMITS, index.cache):
                if position in positions:
                    yield _members_of(tar, tar.start_id + position, sample)


def read_json(index: CorpusIndex, start: int, stop: int) -> Iterator[bytes | None]:
    """Yield ``{key}.json`` of the samples ``[start, stop)``; None if it is absent or too large.

    Raises:
        CorpusError: as ``read_documents``.
    """
    for number, first, last in index.spans(start, stop):
        for _, sample in _samples(index.tars[number], first, last, _DEFAULT_LIMITS, index.cache):
            yield sample.get("json")


def _members_of(tar: Tar, sample_id: int, sample: dict[str, Any]) -> Members:
    key = sample["__key__"]
    members = {suffix: data for suffix, data in sample.items() if not suffix.startswith("__")}
    for suffix, data in members.items():
        if data is None:
            raise CorpusError(
                f"{tar.path}: {key}.{suffix} is over {MAX_DOCUMENT_BYTES:,} bytes, the most that "
                f"is held in memory: leave document {sample_id} out"
            )
    return Members(sample_id, key, members)


def _samples(
    tar: Tar, first: int, stop: int, limits: ReadLimits, cache: FileCache | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield position and members of a tar's samples ``[first, stop)``."""
    first_block, stop_block = first // SAMPLES_PER_BLOCK, -(-stop // SAMPLES_PER_BLOCK)
    offsets, key_crcs = tar.block_offsets, tar.block_key_crcs
    # Yielded one behind: the block's keys are checked before its last sample is yielded.
    held: tuple[int, dict[str, Any]] | None = None
    start = int(offsets[first_block])
    end = int(offsets[stop_block]) if stop_block < len(offsets) else tar.size_bytes
    with open_tar(tar, start, end, cache) as file:
        samples = group_by_keys(_tar_members(file, tar, limits))
        for block in range(first_block, stop_block):
            keys = []
            begin = block * SAMPLES_PER_BLOCK
            for position in range(begin, min(begin + SAMPLES_PER_BLOCK, tar.n_samples)):
                sample = _next_sample(samples, tar, position)
                keys.append(sample["__key__"])
                if first <= position < stop:
                    if held is not None:
                        yield held
                    held = position, sample
            if crc_of_keys(keys) != key_crcs[block]:
                raise _changed(tar, block, "its keys are not those of the index")
    if held is not None:
        yield held


def _next_sample(samples: Iterator[dict[str, Any]], tar: Tar, position: int) -> dict[str, Any]:
    block = position // SAMPLES_PER_BLOCK
    try:
        return next(samples)
    except StopIteration:
        raise _changed(
            tar, block, f"it ends after {position:,} of {tar.n_samples:,} samples"
        ) from None
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        reason = _POSITION_IN_MESSAGE.sub("", str(error.args[0] if error.args else error))
        raise _changed(tar, block, f"sample {position:,} cannot be read: {reason}") from error


def _changed(tar: Tar, block: int, change: str) -> CorpusError:
    first = block * SAMPLES_PER_BLOCK
    last = min(first + SAMPLES_PER_BLOCK, tar.n_samples) - 1
    return CorpusError(
        f"{tar.path}: changed or damaged since it was indexed, in samples {first:,} to {last:,} "
        f"of the tar: {change}. Restore the tar, or run `python -m gradproj index` again, which "
        "checks every header"
    )


def _tar_members(file: BinaryIO, tar: Tar, limits: ReadLimits) -> Iterator[dict[str, Any]]:
    """Yield the members of a tar from the file's position on, as webdataset groups them.

    webdataset's own iterator would read members of any size into memory, and would decode names by
    the user's locale. Here the data of members over the limit is None, and bytes of names that are
    not UTF-8 are surrogates, as in the index.
    """
    max_bytes = max(limits.max_document_bytes, MAX_DOCUMENT_BYTES)
    with tarfile.open(
        fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
    ) as members:
        for info in members:
            members.members = []  # type: ignore[attr-defined]  # tarfile would remember them
            if info.isreg() and key_and_suffix(info.name) is not None:
                reader = members.extractfile(info)
                data = reader.read() if reader is not None and info.size <= max_bytes else None
                yield {"fname": info.name, "data": data, "__url__": tar.name}
