"""The file format of earlier GradProjLora code: one ``.pt`` file per batch of rows."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.errors import ConfigError


def write_projection_file(
    folder: Path, number: int, rows: Tensor, ids: Tensor | None, **more: Tensor
) -> Path:
    """Write ``proj_iter_{number:06d}.pt``, readable by ``torch.load(..., weights_only=True)``.

    The number is from 1, also the file's ``iter``. The rows ``(B, D)`` are stored unchanged, on the
    CPU; the int64 sample ids ``(B,)`` are None if they are unknown. ``more`` are further
    tensors by their names, with a row for each sample. The file appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"proj": rows.cpu(), "iter": number, "batch_size": len(rows), **more}
    if ids is not None:
        content["batch_idx"] = ids
    path = folder / f"proj_iter_{number:06d}.pt"
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    torch.save(content, temporary)
    os.replace(temporary, path)
    return path


def row_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of rows; ``ConfigError`` if rows cannot have it."""
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"--proj_dtype is {dtype!r}; choose float16, bfloat16 or float32")
    return chosen


class RowBuffer:
    """Rows of a training loop that are not on disk yet."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._ids: list[Tensor | None] = []
        self._files = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Tensor, ids: Any = None) -> None:
        """Keep a batch's ``(B, D)`` rows on the CPU, and the samples' ids if they are known."""
        self._rows.append(rows.detach().cpu())
        known = ids is not None
        self._ids.append(torch.as_tensor(np.asarray(ids), dtype=torch.int64) if known else None)

    def write(self, folder: Path, number: int | None = None) -> Path | None:
        """Write all rows to one file, by default with the next number. None without rows."""
        if not self._rows:
            return None
        if self._files == 0 and number is None and folder.is_dir():
            # Do not overwrite the files of an earlier run.
            stems = (path.stem for path in folder.glob("proj_iter_[0-9]*.pt"))
            self._files = max((int(stem.removeprefix("proj_iter_")) for stem in stems), default=0)
        self._files = self._files + 1 if number is None else number
        batch_ids = [ids for ids in self._ids if ids is not None]
        ids = torch.cat(batch_ids) if len(batch_ids) == len(self._ids) else None
        path = write_projection_file(folder, self._files, torch.cat(self._rows), ids)
        self._rows, self._ids = [], []
        return path
