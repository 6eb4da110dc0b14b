"""Saved rows of unfinished units, so that a stopped or killed rank's work is not lost.

``partial/00000012/000003-000007.9ab3....safetensors`` holds the rows that batches 3 to 6 of unit 12
touched; the hex digits are the file's crc32c. Files are only ever added. They are valid only for
the same settings and batches, which ``key`` identifies.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from gradproj.coordinator import fault_points
from gradproj.coordinator.commits import Check, Commits
from gradproj.files import crc32c
from gradproj.storage.folders import read_or_none
from gradproj.storage.object_path import names_in
from gradproj.store.layout import PARTIAL_DIR

_NAME = re.compile(r"(\d{6})-(\d{6})\.([0-9a-f]{8})\.safetensors")
_ARRAYS = ("finished", "stored", "unfinished", "sums", "failed")
_GROUPS = (
    "by_row",
    "covariances",
    "head",
    "hidden",
)  # a name in one is a tensor's name after its group's


@dataclass
class PartialRows:
    """A unit's rows after some batch: those that changed since the previous file."""

    finished: np.ndarray
    """``(n,)`` int64 positions in the unit of documents whose last sequence has run."""
    stored: np.ndarray
    """``(n, bytes)`` uint8: their encoded rows."""
    unfinished: np.ndarray
    """``(m,)`` int64 positions of documents of which sequences are left."""
    sums: np.ndarray
    """``(m, D)`` float32: their rows so far, of the summed loss."""
    by_row: dict[str, np.ndarray]
    """One float32 number for each document of the unit: ``row_scale``, ``norms``, ``losses``."""
    failed: np.ndarray
    """Positions (int64) of documents that ran out of memory, since the first batch."""
    covariances: dict[str, np.ndarray]
    """Sums since the first batch: ``a``, ``s`` float64, ``n_tokens`` int64; empty without any."""
    head: dict[str, np.ndarray] = field(default_factory=dict)
    """The job's arrays of head rows; empty without any."""
    hidden: dict[str, np.ndarray] = field(default_factory=dict)
    """``documents`` (int64 positions) and their ``sums`` of hidden states; empty without any."""


def partial_folder(output: Path, unit: int) -> Path:
    """Return the directory of a unit's partial rows."""
    return output / PARTIAL_DIR / f"{unit:08d}"


@dataclass(frozen=True)
class PartialLog:
    """The partial rows of one unit.

    Args:
        folder: ``OUTPUT/partial/UNIT``.
        commits: how this process publishes.
        key: hash of the settings and of the unit's batches.
        check: called before anything is written. Raises if the output was deleted or replaced.
    """

    folder: Path
    commits: Commits
    key: str
    check: Check = lambda: None

    def read(self) -> tuple[int, list[tuple[int, PartialRows]]]:
        """Return the number of batches, and of each file the batches so far and its rows.

        Reads on as long as intact files of this key continue where the previous one ended.
        """
        done = 0
        parts: list[tuple[int, PartialRows]] = []
        for name in sorted(names_in(self.folder)):
            match = _NAME.fullmatch(name)
            if match is None or int(match[1]) != done:
                continue
            # Gone if another process has committed the unit since: then nothing is computed.
            data = read_or_none(self.folder / name)
            part = None if data is None else self._decode(data, match[3])
            if part is not None:
                done = int(match[2])
                parts.append((done, part))
        return done, parts

    def append(self, first: int, last: int, part: PartialRows) -> None:
        """Save the rows of batches ``[first, last)``.

        Raises:
            StoreError: the disk is full or read-only, or permission is denied.
        """
        tensors = {name: getattr(part, name) for name in _ARRAYS}
        for group in _GROUPS:
            tensors |= {f"{group}.{name}": value for name, value in getattr(part, group).items()}
        data = save(
            {k: np.asarray(v, order="C") for k, v in tensors.items()}, metadata={"key": self.key}
        )
        name = f"{first:06d}-{last:06d}.{crc32c(data):08x}.safetensors"
        self.commits.append(self.folder / name, data, self.check)
        fault_points.reach("partial published")

    def _decode(self, data: bytes, checksum: str) -> PartialRows | None:
        """Decode a file; None if it is damaged or of another key, and has to be computed again."""
        header_bytes = int.from_bytes(data[:8], "little")
        if f"{crc32c(data):08x}" != checksum or self.key.encode() not in data[8 : 8 + header_bytes]:
            return None
        tensors: dict[str, Any] = load(data)
        part: dict[str, Any] = {name: tensors.pop(name) for name in _ARRAYS}
        for group in _GROUPS:
            start = f"{group}."
            part[group] = {
                n.removeprefix(start): v for n, v in tensors.items() if n.startswith(start)
            }
        return PartialRows(**part)
