"""File of all scores (``--save_scores``), written by one or several processes, published whole."""

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradproj.errors import ConfigError, StoreError
from gradproj.files import explain_os_errors, publish_exclusively, temporary_beside

_CHUNK_BYTES = 2**24
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def check_scores_path(path: str | Path) -> None:
    """Reject a path that cannot be written, before anything is computed.

    Raises:
        ConfigError: the file exists, or its directory does not exist or is not writable.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ConfigError(f"--save_scores {path} exists: remove it, or give another name")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--save_scores {path}: there is no directory {path.parent}; make it first"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--save_scores {path}: the directory {path.parent} is not writable")


class ScoresFile:
    """``(Q, N)`` float32 in numpy's format, under a temporary name until it is complete.

    Disk space is reserved at creation, so a full disk shows before the scan. Memory holds only a
    few megabytes. (A memory map would need as much code, and a failing disk would end the process
    with SIGBUS.)

    Args:
        path: the final name.
        unfinished: what ``create`` returned, on whichever rank called it.
        shape: ``(Q, N)``.
    """

    def __init__(self, path: Path, unfinished: Path, shape: tuple[int, int]) -> None:
        self.path, self._unfinished, self._shape = path, unfinished, shape
        self._pending: list[tuple[int, np.ndarray]] = []
        self._first = self._next = self._pending_bytes = 0
        self._descriptor = os.open(unfinished, os.O_RDWR)
        self._header_bytes = os.fstat(self._descriptor).st_size - 4 * math.prod(shape)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int]) -> Path:
        """Create the file with room for all scores and return its temporary name.

        Raises:
            StoreError: there is no room, or no file can be created there.
        """
        unfinished, n_bytes = temporary_beside(path), 4 * math.prod(shape)
        try:
            with open(unfinished, "xb") as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape}
                )
                file.flush()
                _reserve(file.fileno(), file.tell() + n_bytes)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            size = f"{shape[0]:,} x {shape[1]:,} scores, {n_bytes:,} bytes"
            problem = (
                f"no room for {size}" if error.errno in _NO_ROOM else f"cannot be written ({size})"
            )
            raise StoreError(f"--save_scores {path}: {problem}: {error.strerror}") from error
        return unfinished

    def write(self, query: int, first: int, values: np.ndarray) -> None:
        """Write scores ``(q, n)`` of queries from ``query`` on and samples from ``first`` on.

        Calls for the same queries come in the order of their samples.
        """
        if self._pending and (self._pending[0][0] != query or self._next != first):
            self._flush()
        if not self._pending:
            self._first = first
        self._pending.append((query, np.asarray(values, dtype="<f4")))
        self._next = first + values.shape[1]
        self._pending_bytes += values.nbytes
        if self._pending_bytes >= _CHUNK_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write pending scores and fsync; call it after this process's last ``write``."""
        self._flush()
        with explain_os_errors(self.path):
            os.fsync(self._descriptor)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield what was written, ``(first sample, scores (Q, n))``, a few megabytes at a time."""
        n_queries, n_samples = self._shape
        step = max(1, _CHUNK_BYTES // (4 * n_queries))
        for first in range(0, n_samples, step):
            n = min(step, n_samples - first)
            rows = (
                os.pread(self._descriptor, 4 * n, self._offset(query, first))
                for query in range(n_queries)
            )
            yield first, torch.from_numpy(np.stack([np.frombuffer(row, "<f4") for row in rows]))

    def publish(self) -> None:
        """Rename the file to its final name, after every process has finished.

        Raises:
            ConfigError: another process has created a file of that name.
        """
        if not publish_exclusively(self._unfinished, self.path):
            check_scores_path(self.path)

    def __enter__(self) -> "ScoresFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        os.close(self._descriptor)
        if kind is not None:
            self._unfinished.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._pending:
            return
        values = np.concatenate([values for _, values in self._pending], axis=1)
        with explain_os_errors(self.path):
            for query, row in enumerate(values, start=self._pending[0][0]):
                offset = self._offset(query, self._first)
                if os.pwrite(self._descriptor, row.tobytes(), offset) != row.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._pending, self._pending_bytes = [], 0

    def _offset(self, query: int, sample: int) -> int:
        return self._header_bytes + 4 * (query * self._shape[1] + sample)


def _reserve(descriptor: int, n_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        os.truncate(descriptor, n_bytes)
