"""Read corpora that are token ids already: Megatron's and GPT-NeoX's, datatrove's, and flat files.

Files are memory-mapped, so a corpus may be larger than the memory. Token ids are yielded as the
files have them, with the end-of-document tokens that their writers put in.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradproj.corpus.inputs.megatron import read_megatron
from gradproj.corpus.inputs.records import InputReader, Record
from gradproj.corpus.token_arrays import MAGIC, BadArrayError, read_header
from gradproj.errors import ConfigError, CorpusError

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
IGNORED_LABEL = -100

_TOKENS_AT_ONCE = 1 << 22
_CHECKED_TOKENS = 1 << 16
# No vocabulary is as large, and of two 16-bit tokens read as one of 32 bits, nearly all are.
_LARGEST_VOCABULARY = 1 << 24
_LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Magic number and version in the header of llm.c's token files -> dtype."""
_LLM_C_HEADER_BYTES = 1024


def _read_bin(source: InputReader) -> Iterator[Record]:
    index = os.path.splitext(source.location)[0] + ".idx"
    return read_megatron(source, index) if os.path.exists(index) else _read_flat(source)


# ---- Flat files


def _read_flat(source: InputReader) -> Iterator[Record]:
    """Yield the documents of one array of tokens, split at an id that ends or begins each."""
    tokens = _open_flat(source)
    rules = source.token_rules
    if tokens.ndim == 2 and rules.boundary is None:
        yield from _slices(source, tokens.reshape(-1), _rows_of(tokens.shape))
        return
    tokens = tokens.reshape(-1)
    if rules.boundary is None:
        aside = ", and no .idx of Megatron's lies beside it" if _is_bin(source.location) else ""
        raise ConfigError(
            f"INPUT {source.location}: a flat file of token ids{aside}: give --end_of_document ID "
            "if a token ends each document (nanoGPT, OLMo: the tokenizer's end-of-text), or "
            "--start_of_document ID if it begins each (llm.c)"
        )
    n_found = np.count_nonzero
    if not any(
        n_found(tokens[first : first + _TOKENS_AT_ONCE] == rules.boundary)
        for first in range(0, len(tokens), _TOKENS_AT_ONCE)
    ):
        raise CorpusError(
            f"{source.location}: none of its {len(tokens):,} tokens has the id {rules.boundary} of "
            f"{rules.boundary_flag}; is it the id, and --token_dtype the type, of this file?"
        )
    yield from _slices(source, tokens, _parts(tokens, rules.boundary, rules.boundary_ends))


def _is_bin(location: str) -> bool:
    return location.lower().endswith(".bin")


def _open_flat(source: InputReader) -> NDArray[np.integer]:
    """Map the tokens of a file with numpy's header, with llm.c's, or with none."""
    location, dtype = source.location, source.token_rules.dtype
    with open(location, "rb") as file:
        start = file.read(1 << 14)
    if start.startswith(MAGIC):
        try:
            header = read_header(start)
        except BadArrayError as error:
            raise CorpusError(f"{location}: {error}") from error
        if len(header.shape) not in (1, 2):
            raise CorpusError(f"{location}: an array of shape {header.shape}, not of token ids")
        return _mapped(location, header.dtype, header.n_bytes, header.shape)
    magic = tuple(np.frombuffer(start[:8], "<i4").tolist()) if len(start) >= 8 else ()
    if magic in _LLM_C and len(start) >= _LLM_C_HEADER_BYTES:
        n_tokens = int.from_bytes(start[8:12], "little")
        return _mapped(location, np.dtype(_LLM_C[magic]), _LLM_C_HEADER_BYTES, (n_tokens,))
    if not dtype:
        raise ConfigError(
            f"INPUT {location}: bare numbers that do not say their type: give --token_dtype "
            "(nanoGPT and OLMo 1 wrote uint16, tokenizers of over 65,536 tokens need uint32)"
        )
    given = np.dtype(dtype)
    tokens = _mapped(location, given, 0, (os.path.getsize(location) // given.itemsize,))
    _check_type(location, tokens)
    return tokens


def _mapped(
    location: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]
) -> NDArray[np.integer]:
    n_bytes, wanted = os.path.getsize(location), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset + wanted != n_bytes:
        raise CorpusError(
            f"{location}: {n_bytes - offset:,} bytes of tokens are not {wanted:,}, as {dtype.name} "
            f"of shape {shape} would be: it is cut short, or of another type"
        )
    if not wanted:
        raise CorpusError(f"{location}: holds no token")
    return np.memmap(location, dtype.newbyteorder("<"), "r", offset, shape)


def _check_type(location: str, tokens: NDArray[np.integer]) -> None:
    """Raise ``ConfigError`` if the first tokens look like integers of another size."""
    few = np.asarray(tokens[:_CHECKED_TOKENS])
    if few.itemsize > 2 and (few.max() >= _LARGEST_VOCABULARY or few.min() < 0):
        problem = f"holds the token id {few[(few >= _LARGEST_VOCABULARY) | (few < 0)][0]:,}"
    elif few.itemsize <= 2 and len(few) >= 64 and few[1::2].max() < 16:
        problem = "has every second token near 0, as the halves of larger integers are"
    else:
        return
    raise ConfigError(
        f"INPUT {location}: read as --token_dtype {few.dtype.name} it {problem}: give another one "
        f"of {', '.join(TOKEN_DTYPES)}"
    )


def _rows_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return ((row * shape[1], (row + 1) * shape[1]) for row in range(shape[0]))


def _parts(tokens: NDArray[np.integer], boundary: int, ends: bool) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of the documents that each end, or begin, with ``boundary``."""
    begin = 0
    for first in range(0, len(tokens), _TOKENS_AT_ONCE):
        found = np.flatnonzero(tokens[first : first + _TOKENS_AT_ONCE] == boundary)
        for stop in (found + first + ends).tolist():
            if stop > begin:
                yield begin, stop
            begin = stop
    if begin < len(tokens):
        yield begin, len(tokens)


def _slices(
    source: InputReader,
    tokens: NDArray[np.integer],
    parts: Iterator[tuple[int, int]],
    has_loss: NDArray[np.bool_] | None = None,
) -> Iterator[Record]:
    stop = 0
    source.position = lambda: stop * tokens.itemsize
    for number, (start, stop) in enumerate(parts, start=1):
        ids = np.array(tokens[start:stop])
        labels = None
        if has_loss is not None:
            labels = np.where(has_loss[start:stop], ids.astype(np.int64), IGNORED_LABEL)
        yield source.document(number, ids, labels)


# ---- datatrove


def _read_datatrove(source: InputReader) -> Iterator[Record]:
    """Yield the documents of ``X.ds``, whose ends in tokens ``X.ds.index`` has (uint64).

    ``X.ds.loss``, a byte for each token, says which tokens carry loss.
    """
    location, index = source.location, source.location + ".index"
    if not os.path.exists(index):
        yield from _read_flat(source)
        return
    ends = _mapped_numbers(index, "<u8")
    n_bytes = os.path.getsize(location)
    n_tokens = int(ends[-1])
    if bool(np.any(ends[1:] < ends[:-1])):
        raise CorpusError(f"{index}: the ends of documents do not ascend; make it again")
    size = n_bytes // n_tokens if n_tokens else 0
    if size not in (2, 4) or size * n_tokens != n_bytes:
        raise CorpusError(
            f"{location}: {n_bytes:,} bytes are not the {n_tokens:,} tokens of {index}, of 2 or 4 "
            "bytes each: one of the two is cut short or of another corpus"
        )
    tokens = _mapped(location, np.dtype(f"<u{size}"), 0, (n_tokens,))
    has_loss = None
    if os.path.exists(location + ".loss"):
        has_loss = _mapped_numbers(location + ".loss", "?")
        if len(has_loss) != n_tokens:
            raise CorpusError(
                f"{location}.loss: {len(has_loss):,} bytes, and the file has {n_tokens:,} tokens"
            )
    stops = ends.astype(np.int64)
    starts = np.concatenate([[0], stops[:-1]])
    yield from _slices(source, tokens, zip(starts.tolist(), stops.tolist(), strict=True), has_loss)


def _mapped_numbers(path: str, dtype: str) -> NDArray[Any]:
    n_bytes, size = os.path.getsize(path), np.dtype(dtype).itemsize
    if n_bytes == 0 or n_bytes % size:
        raise CorpusError(f"{path}: {n_bytes:,} bytes are not numbers of {size} bytes each")
    return np.memmap(path, dtype, "r")


TOKEN_INPUTS: dict[str, Callable[[InputReader], Iterator[Record]]] = {
    ".bin": _read_bin,
    ".npy": _read_flat,
    ".ds": _read_datatrove,
}
"""End of a file's name -> its reader."""
COMPANIONS: Sequence[str] = (".idx", ".ds.index", ".ds.loss", ".ds.metadata")
"""Ends of the names of files that are read with another, or not needed."""
