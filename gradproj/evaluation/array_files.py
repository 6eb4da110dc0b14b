"""What an experiment has come to so far: arrays in files that are whole or not there."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import StoreError
from gradproj.files import write_and_replace


def keep_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_and_replace(path, [buffer.getbuffer()])


def keep_arrays(path: Path, **arrays: Any) -> None:
    """Write an ``.npz`` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_and_replace(path, [buffer.getbuffer()])


def kept_array(path: Path) -> np.ndarray:
    """Read a ``.npy`` file; ``StoreError`` where it is damaged."""
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}): remove it, and the same command makes it again"
        ) from error
