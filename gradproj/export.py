"""The original system's layout: numbered ``.pt`` files of projected gradients."""

import os
from pathlib import Path

import torch
from torch import Tensor


def write_projection_file(folder: Path, number: int, rows: Tensor, ids: Tensor | None) -> Path:
    """Write ``proj_iter_{number:06d}.pt``, readable by ``torch.load(..., weights_only=True)``.

    Args:
        folder: made if it is missing.
        number: from 1; also the file's ``iter``.
        rows: ``(B, D)``, any float dtype; stored as it is, on the CPU.
        ids: ``(B,)`` int64 sample ids, or None where they are not known.

    Returns:
        The file's path. It appears whole or not at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {"proj": rows.cpu(), "iter": number, "batch_size": len(rows)}
    if ids is not None:
        content["batch_idx"] = ids
    path = folder / f"proj_iter_{number:06d}.pt"
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    torch.save(content, temporary)
    os.replace(temporary, path)
    return path
