"""Read corpora of Megatron-LM and GPT-NeoX: tokens in a ``.bin``, their bounds in an ``.idx``."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.inputs.records import InputReader, Record
from gradproj.errors import CorpusError

_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_MMAP_MAGIC, _OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"


@dataclass(frozen=True)
class _Index:
    """Places of the sequences in a ``.bin``, and the sequences of each document."""

    dtype: np.dtype
    pointers: NDArray[np.int64]
    """First byte of each sequence."""
    lengths: NDArray[np.integer]
    """Tokens of each sequence."""
    documents: NDArray[np.int64]
    """First sequence of each document, and the number of sequences."""


def read_megatron(source: InputReader, path: str) -> Iterator[Record]:
    """Yield the documents of ``X.bin``; a document's sequences, such as sentences, are joined."""
    index = _read_index(path)
    n_bytes, size = os.path.getsize(source.location), index.dtype.itemsize
    stops = index.pointers + index.lengths.astype(np.int64) * size
    if len(stops) and (
        index.pointers.min() < 0 or index.lengths.min() < 0 or stops.max() > n_bytes
    ):
        raise CorpusError(
            f"{source.location}: {n_bytes:,} bytes, and {path} has sequences up to byte "
            f"{stops.max():,}: one of the two is cut short or of another corpus"
        )
    if not n_bytes:
        raise CorpusError(f"{source.location}: holds no token")
    data = np.memmap(source.location, np.uint8, "r")
    reached = 0
    source.position = lambda: reached
    bounds = index.documents
    for number in range(len(bounds) - 1):
        chosen = range(int(bounds[number]), int(bounds[number + 1]))
        parts = [data[int(index.pointers[i]) : int(stops[i])] for i in chosen]
        reached = int(stops[chosen[-1]]) if chosen else reached
        joined = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        yield source.document(number + 1, joined.view(index.dtype))


def _read_index(path: str) -> _Index:
    raw = np.memmap(path, np.uint8, "r") if os.path.getsize(path) else np.zeros(0, np.uint8)
    start = raw[:64].tobytes()
    if start.startswith(_MMAP_MAGIC):
        return _new_index(path, raw, start)
    if start.startswith(_OLD_MAGIC):
        return _old_index(path, raw, start)
    raise CorpusError(
        f"{path}: not an index of Megatron's or GPT-NeoX's (it begins with {start[:8]!r}); "
        "rename it if the .bin is a flat file of tokens"
    )


def _numbers(start: bytes, at: int, n: int) -> list[int]:
    return [int.from_bytes(start[i : i + 8], "little") for i in range(at, at + 8 * n, 8)]


def _new_index(path: str, raw: NDArray[np.uint8], start: bytes) -> _Index:
    """Parse MMIDIDX: dtype, counts, then lengths (int32), pointers and documents (int64).

    fairseq's have no documents; those of multimodal data have a byte for each sequence at the end.
    """
    version, code = _numbers(start, 9, 1)[0], start[17] if len(start) > 17 else 0
    n, n_documents = _numbers(start, 18, 2)
    dtype = _dtype_of(path, version, code)
    without = 26 + 12 * n
    whole = 34 + 12 * n + 8 * n_documents
    if len(raw) == without:
        at, n_documents = 26, 0
    elif len(raw) in (whole, whole + n):
        at = 34
    else:
        raise _wrong_size(path, len(raw), whole)
    lengths = raw[at : at + 4 * n].view("<i4")
    pointers = raw[at + 4 * n : at + 12 * n].view("<i8")
    documents = raw[at + 12 * n : at + 12 * n + 8 * n_documents].view("<i8")
    return _Index(dtype, pointers, lengths, _checked_documents(path, documents, n))


def _old_index(path: str, raw: NDArray[np.uint8], start: bytes) -> _Index:
    """Parse TNTIDX, of ``--dataset-impl lazy`` and ``cached``: all numbers int64."""
    version, code, size, n, n_sizes, n_documents = _numbers(start, 8, 6)
    dtype = _dtype_of(path, version, code)
    fairseq = 48 + 8 * (2 * (n + 1) + n_sizes)
    whole = 56 + 8 * (2 * (n + 1) + n_sizes + n_documents)
    if len(raw) == fairseq:
        raise CorpusError(
            f"{path}: fairseq's own index, whose .bin has each id plus one: not read; write it "
            "again with --dataset-impl mmap"
        )
    if len(raw) != whole or size != dtype.itemsize:
        raise _wrong_size(path, len(raw), whole)
    bounds = raw[56 + 8 * (n + 1) : 56 + 16 * (n + 1)].view("<i8")
    documents = raw[whole - 8 * n_documents :].view("<i8")
    lengths = np.diff(bounds)
    checked = _checked_documents(path, documents, n)
    return _Index(dtype, bounds[:-1] * size, lengths, checked)


def _dtype_of(path: str, version: int, code: int) -> np.dtype:
    if version != 1:
        raise CorpusError(f"{path}: an index of version {version}; version 1 is read")
    if code not in _DTYPES:
        raise CorpusError(f"{path}: says that tokens are of type {code}, which is not integers")
    return np.dtype(_DTYPES[code])


def _wrong_size(path: str, n_bytes: int, wanted: int) -> CorpusError:
    return CorpusError(
        f"{path}: {n_bytes:,} bytes, and its header asks for {wanted:,}: it is cut short or damaged"
    )


def _checked_documents(
    path: str, documents: NDArray[np.int64], n_sequences: int
) -> NDArray[np.int64]:
    """Return the bounds of documents; each sequence is one if the index names none."""
    if len(documents) <= 1:
        return np.arange(n_sequences + 1, dtype=np.int64)
    ascend = bool(np.all(documents[1:] >= documents[:-1]))
    if documents[0] != 0 or documents[-1] != n_sequences or not ascend:
        raise CorpusError(
            f"{path}: its documents do not cover its {n_sequences:,} sequences in order; make it "
            "again"
        )
    return documents
