"""A command's results: files that it writes whole or not at all, on disk or in a bucket."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.errors import ConfigError, StoreError
from gradproj.files import explain_os_errors
from gradproj.storage.contents import open_whole
from gradproj.storage.object_path import path_of
from gradproj.storage.publish import replace


def make_folder(flag: str, folder: str | Path) -> Path:
    """Make the folder that a flag names, with its parents, before any work is done for it.

    Raises:
        ConfigError: a part of the path is a file, or the system makes no folder there.
        StoreError: it cannot be written.
    """
    try:
        with explain_os_errors(folder):
            path_of(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{flag} {folder}: it, or a folder above it, is a file; give another path"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: cannot make this folder ({error.strerror}); give another path"
        ) from error
    return path_of(folder)


def write_result(flag: str, path: Path, chunks: Iterable[Any]) -> None:
    """Write the file that a flag names, whole or not at all.

    Raises:
        ConfigError: the system makes no file there.
        StoreError: it cannot be written.
    """
    try:
        replace(path, chunks)
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: cannot write this file ({error.strerror}); give another path"
        ) from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    replace(path, [buffer.getbuffer()])


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an ``.npz`` file, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    replace(path, [buffer.getbuffer()])


def load_array(path: Path) -> np.ndarray:
    """Read a ``.npy`` file that a command keeps to continue from.

    Raises:
        StoreError: it is damaged.
    """
    try:
        with open_whole(path) as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} cannot be read ({error}). Delete it, and the same command makes it again"
        ) from error
