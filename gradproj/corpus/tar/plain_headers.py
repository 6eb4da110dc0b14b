"""Check all headers of common form in a chunk of a tar at once, with numpy.

Common headers are those that tar writers make for ordinary files: ustar magic, a regular file, a
short name without a prefix, octal numbers, perhaps after a pax header with only times and owners
(webdataset's writer puts one before every member). Every other header, and any that looks damaged,
is left to ``headers``.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BLOCK = 512
_MAGIC = int.from_bytes(b"usta", "little")
_POWERS_OF_8 = 8 ** np.arange(10, -1, -1, dtype=np.int64)
_HARMLESS_PAX = re.compile(
    rb"(?:\d+ (?:mtime|atime|ctime|uid|gid|uname|gname|comment)=[^\n\0]*\n)*"
).fullmatch


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive regular members of a chunk. Positions are bytes from the chunk's start.

    ``starts`` are the members' first headers, pax headers included; ``following`` is the position
    of the next member's header.
    """

    raw_names: list[bytes]
    starts: NDArray[np.int64]
    payloads: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    following: int

    def names(self) -> list[str]:
        return [raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape") for raw in self.raw_names]

    def keys_of_one_suffix(self) -> tuple[list[str], str] | None:
        """Return keys and suffix if every name is KEY.SUFFIX with one suffix, else None.

        One call splits the whole run; a regular expression for every name is much slower.
        """
        suffix = self.raw_names[0].partition(b".")[2].decode("utf-8", "surrogateescape")
        lines = (b"\n".join(self.raw_names) + b"\n").decode("utf-8", "surrogateescape")
        keys = lines.split(f".{suffix}\n")
        together = "".join(keys)
        plain = (
            len(keys) == len(self.raw_names) + 1
            and not keys.pop()
            and all(keys)
            and not any(separator in together for separator in "./\n\0")
            and not any(separator in suffix for separator in "/\n\0")
            and "\n__" not in "\n" + lines
        )
        return (keys, suffix.lower()) if plain else None


class PlainHeaders:
    """Finds and checks the headers of common form in a chunk that begins at a block of the tar."""

    def __init__(self, chunk: bytes) -> None:
        n_blocks = len(chunk) // _BLOCK
        self._chunk = chunk
        blocks = np.frombuffer(chunk, np.uint8, n_blocks * _BLOCK).reshape(-1, _BLOCK)
        candidates = np.flatnonzero(blocks[:, 257:261].view("<u4") == _MAGIC)
        self._heads = heads = blocks[candidates]
        n_bytes, size_is_plain = _octal(heads, 124, 11)
        written, sum_is_plain = _octal(heads, 148, 6)
        # The checksum field itself counts as eight spaces.
        field = heads[:, 148:156].sum(axis=1, dtype=np.int64)
        right = heads.sum(axis=1, dtype=np.uint32) - field + 8 * 32 == written
        self._at = candidates * _BLOCK
        self._n_bytes = n_bytes
        self._following = self._at + _BLOCK + ((n_bytes + 511) & ~511)
        self._is_pax = heads[:, 156] == ord("x")
        usual = (
            (heads[:, 0] != 0) & (heads[:, 345] == 0) & ((heads[:, 156] == ord("0")) | self._is_pax)
        )
        good = usual & size_is_plain & sum_is_plain & right & (self._following <= len(chunk))
        # A run may not start at a bad header, nor continue behind a member that no header follows.
        self._at_list: list[int] = self._at.tolist()
        self._bad: list[int] = np.flatnonzero(~good).tolist()
        leads_on = np.append(self._following[:-1] == self._at[1:], False)
        leads_on[:-1] &= ~(self._is_pax[:-1] & self._is_pax[1:])
        self._last: list[int] = np.flatnonzero(~leads_on).tolist()

    def run_from(self, position: int) -> Run | None:
        """Return the longest run of members at ``position``; None without a plain header there."""
        first = bisect_left(self._at_list, position)
        if first == len(self._at_list) or self._at_list[first] != position:
            return None
        stop = self._last[bisect_left(self._last, first)] + 1
        next_bad = bisect_left(self._bad, first)
        if next_bad < len(self._bad):
            stop = min(stop, self._bad[next_bad])
        pax = np.flatnonzero(self._is_pax[first:stop]) + first
        for header in pax.tolist():
            body = self._at_list[header] + _BLOCK
            if header + 1 == stop or not _HARMLESS_PAX(
                self._chunk, body, body + int(self._n_bytes[header])
            ):
                stop = header
                break
        return self._run(first, stop, pax[pax < stop]) if stop > first else None

    def _run(self, first: int, stop: int, pax: NDArray[np.int64]) -> Run:
        starts = self._at[first:stop]
        if len(pax):
            members = np.flatnonzero(~self._is_pax[first:stop]) + first
            starts = self._at[members - self._is_pax[members - 1] * (members > first)]
        else:
            members = np.arange(first, stop)
        names = np.ascontiguousarray(self._heads[members, :100]).view("S100").ravel().tolist()
        return Run(
            raw_names=names,
            starts=starts,
            payloads=self._at[members] + _BLOCK,
            n_bytes=self._n_bytes[members],
            following=int(self._following[stop - 1]),
        )


def _octal(
    heads: NDArray[np.uint8], at: int, n_digits: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Parse ``n_digits`` octal digits at a column; also whether each header has that form."""
    digits = heads[:, at : at + n_digits] - ord("0")
    end = heads[:, at + n_digits]
    plain = (digits < 8).all(axis=1) & ((end == 0) | (end == ord(" ")))
    return digits.astype(np.int64) @ _POWERS_OF_8[-n_digits:], plain
