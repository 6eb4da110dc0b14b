"""Where answers are written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradproj.errors import ConfigError
from gradproj.files import explain_os_errors, write_and_replace


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, with those above it.

    Raises:
        ConfigError: a part of its path is a file, or the system makes none there; names the flag that said it.
        StoreError: it cannot be written.
    """
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{flag} {folder}: it, or a folder it lies in, is a file; give another path"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: no folder can be made there ({error.strerror}); give another path"
        ) from error


def write_answer(path: Path, chunks: Iterable[Any], flag: str) -> None:
    """Put a file in its place, whole or not at all.

    Raises:
        ConfigError: the system makes no file there; names the flag that said it.
        StoreError: it cannot be written.
    """
    try:
        write_and_replace(path, chunks)
    except OSError as error:
        raise ConfigError(
            f"{flag} {path}: no file can be written there ({error.strerror}); give another path"
        ) from error
