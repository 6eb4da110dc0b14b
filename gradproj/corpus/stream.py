"""Documents of a range of sample ids, in id order, exactly as many as promised.

webdataset's own tar iterator and grouping do the decoding, from the byte offset of the block of 64 samples in which
the range begins. Since they end silently at damage, every block's keys and their number are checked against the index.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from webdataset.tariterators import group_by_keys, tar_file_iterator

from gradproj.corpus.documents import (
    MAX_DOCUMENT_BYTES,
    Document,
    DomainReader,
    ReadLimits,
    read_document,
)
from gradproj.corpus.index import CorpusIndex, Tar, check_unchanged
from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK, crc_of_keys, key_and_suffix
from gradproj.errors import CorpusError

__all__ = ["Document", "ReadLimits", "read_documents"]

_DEFAULT_LIMITS = ReadLimits()
_POSITION_IN_MESSAGE = re.compile(r" @ <.*>$")


def read_documents(
    index: CorpusIndex, start: int, stop: int, limits: ReadLimits = _DEFAULT_LIMITS
) -> Iterator[Document]:
    """Exactly the documents ``start`` to ``stop`` (not included), in id order.

    ``read(range(20))`` is ``read(range(7))`` followed by ``read(range(7, 20))``. A sample that is no document comes
    with its ``problem``; it does not end the stream.

    Raises:
        CorpusError: a tar is missing, changed or damaged since it was indexed; names the tar and the block of samples.
            It comes before the last document of the range, so that a range is never taken for whole.
    """
    domain_of = DomainReader(index.domain_field)
    for number, first, upto in index.spans(start, stop):
        yield from _read_span(index.tars[number], number, first, upto, domain_of, limits)


def _read_span(
    tar: Tar, number: int, first: int, stop: int, domain_of: DomainReader, limits: ReadLimits
) -> Iterator[Document]:
    check_unchanged(tar)
    first_block, stop_block = first // SAMPLES_PER_BLOCK, -(-stop // SAMPLES_PER_BLOCK)
    offsets, key_crcs = tar.block_offsets, tar.block_key_crcs
    held: Document | None = None
    with _open(tar) as file:
        file.seek(int(offsets[first_block]))
        samples = group_by_keys(_members(file, tar, limits))
        for block in range(first_block, stop_block):
            keys = []
            begin = block * SAMPLES_PER_BLOCK
            for position in range(begin, min(begin + SAMPLES_PER_BLOCK, tar.n_samples)):
                sample = _next_sample(samples, tar, position)
                key = sample["__key__"]
                keys.append(key)
                if first <= position < stop:
                    if held is not None:
                        yield held
                    held = read_document(
                        sample, tar.start_id + position, key, number, domain_of, limits
                    )
            if crc_of_keys(keys) != key_crcs[block]:
                raise _changed(tar, block, "its keys are not those of the index")
    if held is not None:
        yield held


def _open(tar: Tar) -> BinaryIO:
    try:
        return open(tar.path, "rb")
    except OSError as error:
        raise CorpusError(f"{tar.path}: the tar cannot be read: {error.strerror}") from error


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


def _changed(tar: Tar, block: int, what: str) -> CorpusError:
    first = block * SAMPLES_PER_BLOCK
    last = min(first + SAMPLES_PER_BLOCK, tar.n_samples) - 1
    return CorpusError(
        f"{tar.path}: changed or damaged since it was indexed, in samples {first:,} to {last:,} of the tar: {what}. "
        "Put the tar back as it was, or run `python -m gradproj index` again, which says what is wrong"
    )


def _members(file: BinaryIO, tar: Tar, limits: ReadLimits) -> Iterator[dict[str, Any]]:
    """The tar's members as :func:`group_by_keys` takes them."""
    most = max(limits.max_document_bytes, MAX_DOCUMENT_BYTES)
    members = (
        tar_file_iterator(file) if tar.largest_member_bytes <= most else _members_up_to(file, most)
    )
    for member in members:
        member["__url__"] = tar.name
        yield member


def _members_up_to(file: BinaryIO, most_bytes: int) -> Iterator[dict[str, Any]]:
    """What ``tar_file_iterator`` yields, but None for the data of a member too large for the memory."""
    with tarfile.open(fileobj=file, mode="r:") as members:
        for info in members:
            if info.isreg() and key_and_suffix(info.name) is not None:
                reader = members.extractfile(info)
                data = reader.read() if reader is not None and info.size <= most_bytes else None
                yield {"fname": info.name, "data": data}
