"""Log files of an output. In a bucket, a local file is copied there every minute and at the end."""

import logging
import os
import tempfile
import threading
from pathlib import Path

from gradproj.errors import StoreError
from gradproj.storage.object_path import ObjectPath

COPY_EVERY_S = 60.0
PART_BYTES = 2**20
"""A longer log becomes several objects, since what is put is put as a whole."""


def log_file(path: Path, process: str) -> logging.FileHandler:
    """Return a handler that appends to ``path``.

    In a bucket nothing can be appended to, so ``process`` becomes a part of the name.
    """
    if isinstance(path, ObjectPath):
        return _CopiedLog(path.with_name(f"{path.stem}-{process}{path.suffix}"))
    return logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")


class _CopiedLog(logging.FileHandler):
    """Writes a temporary file, and copies it to an object if it has grown."""

    def __init__(self, final: ObjectPath) -> None:
        descriptor, name = tempfile.mkstemp(prefix="gradproj-", suffix=f"-{final.name}")
        os.close(descriptor)
        super().__init__(name, encoding="utf-8", errors="backslashreplace")
        self._final, self._copied, self._part, self._ended = final, 0, 0, threading.Event()
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def _run(self) -> None:
        while not self._ended.wait(COPY_EVERY_S):
            self._copy()

    def _copy(self) -> None:
        try:
            while (size := os.path.getsize(self.baseFilename)) > self._copied:
                start = self._part * PART_BYTES
                with open(self.baseFilename, "rb") as file:
                    file.seek(start)
                    content = file.read(PART_BYTES)
                name = f"{self._final.stem}-{self._part}" if self._part else self._final.stem
                self._final.with_name(name + self._final.suffix).put([content])
                self._copied = start + len(content)
                self._part += len(content) == PART_BYTES
                if self._copied >= size:
                    break
        except (OSError, StoreError):  # a log must not end the rank; the next commit raises it
            pass

    def close(self) -> None:
        """Copy what is left, and delete the temporary file."""
        if self._ended.is_set():
            return
        self._ended.set()
        super().close()
        self._copy()
        Path(self.baseFilename).unlink(missing_ok=True)
