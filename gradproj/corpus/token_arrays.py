"""Token ids as the bytes of ``.npy`` files, read without pickle and without evaluating a header."""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 10_000
"""The longest header that numpy reads."""

_DTYPE = re.compile(r"'descr'\s*:\s*(?:'([^']*)'|(\[.*\]))", re.DOTALL).search
_ORDER = re.compile(r"'fortran_order'\s*:\s*(True|False)").search
_SHAPE = re.compile(r"'shape'\s*:\s*\(([\d\s,]*)\)").search
_INTEGERS = re.compile(r"<[iu][248]|[|<=]?[iu]1").fullmatch
_ALIGNED = 64


class BadArrayError(ValueError):
    """Bytes are no array of integers in numpy's format; the message says why."""


@dataclass(frozen=True)
class ArrayHeader:
    """Header of a ``.npy`` file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    n_bytes: int
    """Of the header; the data begin there."""


def read_header(start: bytes) -> ArrayHeader:
    """Parse the header at the start of a ``.npy`` file.

    Raises:
        BadArrayError: not numpy's format, not integers, not little-endian, not in C order.
    """
    if not start.startswith(MAGIC):
        raise BadArrayError("is not in numpy's format: it does not begin with \\x93NUMPY")
    if len(start) < 12:
        raise BadArrayError("is cut short in its header")
    major = start[6]
    if major not in (1, 2, 3):
        raise BadArrayError(f"is of version {major} of numpy's format; 1 to 3 are read")
    first = 10 if major == 1 else 12
    length = int.from_bytes(start[8:first], "little")
    if length > MAX_HEADER_BYTES:
        raise BadArrayError(f"has a header of {length:,} bytes; the most is {MAX_HEADER_BYTES:,}")
    text = start[first : first + length].decode("latin-1")
    if len(text) < length:
        raise BadArrayError("is cut short in its header")
    dtype, order, shape = _DTYPE(text), _ORDER(text), _SHAPE(text)
    if not (dtype and order and shape):
        raise BadArrayError("has a header without a dtype, an order and a shape")
    name = dtype[1] or dtype[2]
    if not _INTEGERS(name):
        raise BadArrayError(f"holds {_kind_of(name)}, not little-endian integers ({name[:40]!r})")
    try:
        sizes = tuple(int(size) for size in shape[1].split(",") if size.strip())
    except ValueError as error:  # "1 2", or more digits than Python converts
        raise BadArrayError(f"has the shape ({shape[1][:40]}), which is none") from error
    if order[1] == "True" and len(sizes) > 1:
        raise BadArrayError("is in Fortran's order, not in C's")
    return ArrayHeader(np.dtype(name), sizes, first + length)


def read_integers(data: bytes) -> NDArray[np.integer]:
    """Return the one-dimensional array of integers in the bytes of a ``.npy`` file, a view of them.

    Raises:
        BadArrayError: as ``read_header``, or of another shape or length.
    """
    header = read_header(data)
    if len(header.shape) != 1:
        raise BadArrayError(f"is an array of shape {header.shape}, not a list of token ids")
    wanted, found = header.shape[0] * header.dtype.itemsize, len(data) - header.n_bytes
    if found != wanted:
        raise BadArrayError(
            f"has {found:,} bytes of data, and its header says {header.shape[0]:,} integers of "
            f"{header.dtype.itemsize} bytes"
        )
    return np.frombuffer(data, header.dtype, offset=header.n_bytes)


def npy_bytes(values: NDArray[np.integer]) -> bytes:
    """Return a one-dimensional array of integers as a ``.npy`` file, version 1.0."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    header = (
        f"{{'descr': '{values.dtype.str}', 'fortran_order': False, 'shape': ({len(values)},), }}"
    )
    length = -(-(10 + len(header) + 1) // _ALIGNED) * _ALIGNED - 10
    head = MAGIC + b"\x01\x00" + length.to_bytes(2, "little")
    return head + header.ljust(length - 1).encode() + b"\n" + values.tobytes()


def ids_bytes(ids: NDArray[np.integer]) -> bytes:
    """Return token ids as a ``.npy`` file of uint16, or of uint32 if one is above 65,535."""
    return npy_bytes(ids.astype(np.uint16 if ids.max(initial=0) < 2**16 else np.uint32))


def _kind_of(dtype: str) -> str:
    if dtype.startswith("["):
        return "records"
    if dtype.startswith(">"):
        return "big-endian numbers"
    kinds = {"f": "floating-point numbers", "O": "Python objects (a pickle)", "b": "booleans"}
    return kinds.get(dtype.lstrip("<>|=")[:1], "other things")
