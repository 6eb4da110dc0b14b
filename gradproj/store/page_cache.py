"""Which bytes of a mapped file are brought into memory: those that were asked for, many at once, and no others.

Left alone, the kernel reads a mapped file page by page as it is touched, or guesses what comes next. The parts of a
row lie far apart in a shard, so the one waits for the disk dozens of times a row, and the other reads the neighbours.
"""

import ctypes
import mmap
import os
import weakref
from functools import cached_property
from pathlib import Path

import numpy as np

from gradproj.store.mapped_files import damaged

_libc = ctypes.CDLL(None)
_PAGE_MASK = ~(mmap.PAGESIZE - 1)


class PagedFile:
    """A read-only map of a file, of which the disk reads what is wanted and nothing around it."""

    def __init__(self, path: Path) -> None:
        """Map it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is empty.
        """
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.data = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        self.data.madvise(mmap.MADV_RANDOM)  # a page that is touched brings no others
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # nor do bytes that are read
        self._byte = [bytearray(1)]
        self._asks_read = True

    def is_cached(self, start: int) -> bool:
        """Whether the page with this byte is in memory; False where nobody can tell."""
        if self._asks_read:
            try:
                return os.preadv(self._descriptor, self._byte, start, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False
            except OSError:  # memory file systems and some network ones know no such question
                self._asks_read = False
        return self._is_mapped_page_cached(start)

    def _is_mapped_page_cached(self, start: int) -> bool:
        if not self._is_ours:  # of other people's files the kernel calls every page cached
            return False
        answer = (ctypes.c_ubyte * 1)()
        page = ctypes.c_void_p(self._address + (start & _PAGE_MASK))
        return _libc.mincore(page, ctypes.c_size_t(1), answer) == 0 and bool(answer[0] & 1)

    @cached_property
    def _is_ours(self) -> bool:
        return os.fstat(self._descriptor).st_uid == os.geteuid()

    @cached_property
    def _address(self) -> int:
        return np.frombuffer(self.data, np.uint8).ctypes.data

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill ``out`` with the bytes from ``start``; no page of the file is mapped for it.

        Raises:
            StoreError: the file ends before it is full.
        """
        n_read = os.preadv(self._descriptor, [out], start)
        while n_read < len(out):
            more = os.preadv(self._descriptor, [out[n_read:]], start + n_read)
            if not more:
                raise damaged(self._path, f"it ends at byte {start + n_read}, inside a chunk")
            n_read += more

    def let_go(self) -> None:
        """Unmap what was touched: it counts as this process's memory. What is in the system's cache stays there."""
        self.data.madvise(mmap.MADV_DONTNEED)

    def want(self, start: int, stop: int) -> None:
        """Have the disk read these bytes; returns before they are there."""
        first = start & _PAGE_MASK
        self.data.madvise(mmap.MADV_WILLNEED, first, stop - first)
