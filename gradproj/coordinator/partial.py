"""Rows of an unfinished unit on disk, so that a stopped or killed rank's work on it is not lost.

``partial/00000012/000003-000007.9ab3....safetensors`` holds the rows that batches 3 to 6 of unit 12 touched;
the hex is the file's crc32c. Files are only ever added. What they hold is valid for the same settings and batches only.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from gradproj.store.files import crc32c, publish_exclusively, write_file_durably

_NAME = re.compile(r"(\d{6})-(\d{6})\.([0-9a-f]{8})\.safetensors")


@dataclass
class PartialRows:
    """The sums, as of some batch, of the rows that were touched since the file before."""

    touched: np.ndarray
    """``(n,)`` int64 positions in the unit."""
    rows: np.ndarray
    """``(n, D)`` float32, of the summed loss."""
    losses: np.ndarray
    """``(n,)`` float32, summed nats."""
    failed: np.ndarray
    """``(m,)`` int64 positions of the documents, since the unit's first batch, that did not fit the memory."""
    covariances: dict[str, np.ndarray]
    """Sums since the unit's first batch: ``a``, ``g`` float64, ``n_tokens`` int64."""


@dataclass(frozen=True)
class PartialLog:
    """The partial rows of one unit.

    Args:
        folder: ``OUTPUT/partial/UNIT``.
        scratch: where to write before publishing; on the same file system.
        key: hash of the settings and of the unit's batches.
    """

    folder: Path
    scratch: Path
    key: str

    def read(self) -> tuple[int, list[PartialRows]]:
        """``(batches done, their rows)``: as far as whole files of this key follow each other."""
        done, found = 0, []
        names = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for path in names:
            match = _NAME.fullmatch(path.name)
            if match is None or int(match[1]) != done:
                continue
            part = self._decode(path.read_bytes(), match[3])
            if part is not None:
                done = int(match[2])
                found.append(part)
        return done, found

    def append(self, first: int, last: int, part: PartialRows) -> None:
        """Put what batches ``[first, last)`` gave on disk."""
        tensors = {
            "touched": part.touched,
            "rows": part.rows,
            "losses": part.losses,
            "failed": part.failed,
            **{f"covariance.{name}": value for name, value in part.covariances.items()},
        }
        data = save({k: np.asarray(v, order="C") for k, v in tensors.items()}, metadata={"key": self.key})
        name = f"{first:06d}-{last:06d}.{crc32c(data):08x}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.scratch / f"partial-{name}"
        write_file_durably(temporary, [data])
        publish_exclusively(temporary, self.folder / name)

    def _decode(self, data: bytes, checksum: str) -> PartialRows | None:
        """None for a damaged file or another key: those batches are computed again."""
        header_bytes = int.from_bytes(data[:8], "little")
        if f"{crc32c(data):08x}" != checksum or self.key.encode() not in data[8 : 8 + header_bytes]:
            return None
        tensors = load(data)
        prefix = "covariance."
        covariances = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        sums = {k: tensors[k] for k in ("touched", "rows", "losses", "failed")}
        return PartialRows(**sums, covariances=covariances)
