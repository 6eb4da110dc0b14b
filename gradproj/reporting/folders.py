"""Where answers are written."""

from pathlib import Path

from gradproj.errors import ConfigError
from gradproj.store.files import explain_os_errors


def make_folder(folder: Path, flag: str) -> None:
    """Make a folder, with those above it.

    Raises:
        ConfigError: a part of its path is a file; names the flag that said it.
        StoreError: it cannot be written.
    """
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{flag} {folder}: it, or a folder it lies in, is a file; give another path"
        ) from error
