"""``--save_scores``: all scores in one .npy file, written as they come by one process or several, published whole."""

import errno
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from gradproj.errors import ConfigError, StoreError
from gradproj.files import explain_os_errors, publish_exclusively, temporary_beside

_BYTES_AT_ONCE = 2**24
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


def check_scores_path(path: str | Path) -> None:
    """Refuse a name that cannot be taken, before anything is computed.

    Raises:
        ConfigError: a file is there already, or no folder for it is.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ConfigError(f"--save_scores {path} is there already: remove it, or give another name")
    if not path.parent.is_dir():
        raise ConfigError(f"--save_scores {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--save_scores {path}: the folder {path.parent} cannot be written")


class ScoresFile:
    """``(Q, N)`` float32 in numpy's format, under a temporary name until it is whole.

    Its space is taken at once, so that a full disk shows before the scan; memory holds a few megabytes of it. (A memory
    map would need no fewer lines, and ends a process without a word where a disk fails.)
    """

    def __init__(self, path: Path, unfinished: Path, shape: tuple[int, int]) -> None:
        """As one of several processes; the first has called ``create``."""
        self.path, self._unfinished, self._shape = path, unfinished, shape
        self._waiting: list[tuple[int, np.ndarray]] = []
        self._first = self._next = self._n_waiting_bytes = 0
        self._descriptor = os.open(unfinished, os.O_RDWR)
        self._head = os.fstat(self._descriptor).st_size - 4 * math.prod(shape)

    @classmethod
    def create(cls, path: Path, shape: tuple[int, int]) -> Path:
        """Make the file with room for all scores; its temporary name.

        Raises:
            StoreError: there is no room, or no file can be made there.
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
            what = f"{shape[0]:,} x {shape[1]:,} scores, {n_bytes:,} bytes"
            problem = (
                f"no room for {what}" if error.errno in _NO_ROOM else f"cannot be written ({what})"
            )
            raise StoreError(f"--save_scores {path}: {problem}: {error.strerror}") from error
        return unfinished

    def write(self, query: int, first: int, values: np.ndarray) -> None:
        """Scores ``(q, n)`` of the queries from ``query`` on for the samples from ``first`` on.

        Calls for the same queries come in order of samples.
        """
        if self._waiting and (self._waiting[0][0] != query or self._next != first):
            self._flush()
        if not self._waiting:
            self._first = first
        self._waiting.append((query, np.asarray(values, dtype="<f4")))
        self._next = first + values.shape[1]
        self._n_waiting_bytes += values.nbytes
        if self._n_waiting_bytes >= _BYTES_AT_ONCE:
            self._flush()

    def finish(self) -> None:
        """Write what waits; this process has no more to write."""
        self._flush()
        with explain_os_errors(self.path):
            os.fsync(self._descriptor)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """What has been written, ``(first sample, scores (Q, n))``, a few megabytes at a time."""
        n_queries, n_samples = self._shape
        step = max(1, _BYTES_AT_ONCE // (4 * n_queries))
        for first in range(0, n_samples, step):
            n = min(step, n_samples - first)
            places = (self._place(query, first) for query in range(n_queries))
            yield (
                first,
                np.stack(
                    [np.frombuffer(os.pread(self._descriptor, 4 * n, at), "<f4") for at in places]
                ),
            )

    def publish(self) -> None:
        """Give the file its name, once every process has finished.

        Raises:
            ConfigError: somebody else has taken the name meanwhile.
        """
        if not publish_exclusively(self._unfinished, self.path):
            check_scores_path(self.path)

    def __enter__(self) -> "ScoresFile":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
        if error is not None:
            self._unfinished.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._waiting:
            return
        query = self._waiting[0][0]
        values = np.concatenate([values for _, values in self._waiting], axis=1)
        with explain_os_errors(self.path):
            for number, row in enumerate(values, start=query):
                at = self._place(number, self._first)
                if os.pwrite(self._descriptor, row.tobytes(), at) != row.nbytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting, self._n_waiting_bytes = [], 0

    def _place(self, query: int, sample: int) -> int:
        """The score's first byte."""
        return self._head + 4 * (query * self._shape[1] + sample)


def _reserve(descriptor: int, n_bytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, n_bytes)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        os.truncate(descriptor, n_bytes)
