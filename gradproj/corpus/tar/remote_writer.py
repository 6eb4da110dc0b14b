"""Write tars to a folder of a bucket: each appears when it is whole, and a mark until all have."""

import json
import os
import secrets
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

from gradproj.corpus.tar.paths import UNFINISHED_NAME
from gradproj.corpus.tar.writer import describe_content, published
from gradproj.errors import GradprojError, StoreError
from gradproj.storage.address import Address, is_remote
from gradproj.storage.contents import chunks_of
from gradproj.storage.listing import list_folder
from gradproj.storage.object_path import object_at
from gradproj.storage.publish import publisher_of

TarEnd = Callable[[Path], None]
"""Called with each tar that is finished."""


@contextmanager
def tars_published(output: str) -> Iterator[tuple[Path, TarEnd]]:
    """Yield a work folder with ``tars`` and ``spools``, and what to call for each finished tar.

    On disk all tars appear at the end, by one rename. In a bucket there are no renames: a tar is
    put there as soon as it is finished, and a mark beside the tars says that they are not all there
    yet; readers refuse such a folder. If the body fails, both are deleted again; what a killed
    process leaves is the user's to delete.

    Raises:
        StoreError: the output exists and is not empty, cannot be written, or is in use.
    """
    if not is_remote(output):
        with published(output) as work:
            yield work, lambda tar: None
        return
    folder = object_at(Address.parse(output), StoreError)
    mark = folder / UNFINISHED_NAME
    _check_empty(folder)
    _claim(cast(Path, mark))
    written = [mark]

    def put(path: Path) -> None:
        written.append(folder / path.name)
        written[-1].put_in_parts(lambda: chunks_of(path))
        path.unlink()

    try:
        with _work_folder(folder) as work:
            yield work, put
            for path in sorted((work / "tars").iterdir()):
                put(path)
    except BaseException:
        with suppress(GradprojError):
            for final in reversed(written):
                final.delete()
        raise
    mark.delete()


@contextmanager
def _work_folder(output: Address) -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="gradproj-prepare-") as folder:
            for name in ("tars", "spools"):
                (Path(folder) / name).mkdir()
            yield Path(folder)
    except OSError as error:
        raise StoreError(
            f"--output_dir {output}: cannot write {error.filename or tempfile.gettempdir()}: "
            f"{error.strerror or error}. Each tar is first written on disk, and with "
            "--group_by_domain all documents are: set TMPDIR to a folder that has the space"
        ) from error


def _check_empty(folder: Address) -> None:
    given = f"--output_dir {folder}"
    try:
        names = [address.name for address in list_folder(folder)]
    except GradprojError as error:
        raise StoreError(f"--output_dir {error}") from error
    if UNFINISHED_NAME in names:
        raise StoreError(
            f"{given}: a prepare that was killed left tars there, or one still runs; if none runs, "
            "delete the folder, or give a new one"
        )
    if names:
        raise StoreError(describe_content(given, names, "prepare"))


def _claim(mark: Path) -> None:
    """Write the mark, of which there is one: of two processes the second is refused."""
    who = {"host": socket.gethostname(), "pid": os.getpid(), "nonce": secrets.token_hex(8)}
    content = json.dumps(who).encode()
    if not publisher_of(mark).create(mark, [content]):
        raise StoreError(
            f"another prepare is writing to {mark.parent}; wait for it, or give --output_dir a new "
            "path"
        )
