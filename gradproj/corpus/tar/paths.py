"""Expand ``--shards`` to the tars of a corpus, in order."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from braceexpand import braceexpand

from gradproj.errors import ConfigError, CorpusError
from gradproj.flags.paths import local_path

INDEX_NAME = "corpus.json"
"""The corpus index: beside the tars, and in an output directory."""

_MAX_NAMES = 10
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".tbz2", ".txz")


def list_tars(shards: str, flag: str = "--shards") -> list[Path]:
    """Return the tars of a corpus as absolute paths, in the order that defines the sample ids.

    ``shards`` is one of:

    - a folder: its ``*.tar``, sorted by name;
    - a list file (``.txt`` or ``.list``): one path per line, relative to the file, in its order;
    - a tar;
    - braces such as ``shard-{000000..000099}.tar``, in their order, which may hold globs;
    - a glob, sorted.

    ``flag`` names it in messages.

    Raises:
        CorpusError: nothing matches; a tar is missing, named twice, compressed, remote or a pipe.
    """
    given = f"{flag} {shards}"
    paths = [Path(os.path.abspath(path)) for path in _expand(shards, given)]
    for path in paths:
        _check_name(str(path), flag)
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise CorpusError(f"{given}: {some(missing, 'tar')} missing (or not a file)")
    first_of: dict[str, Path] = {}
    for path in paths:
        first = first_of.setdefault(os.path.realpath(path), path)
        if first is not path:
            raise CorpusError(f"{given}: {path} comes twice (also as {first}); list every tar once")
    return paths


def default_index_path(tars: Iterable[Path]) -> Path | None:
    """Return ``corpus.json`` in the folder of the tars; None if they lie in several folders."""
    folders = {path.parent for path in tars}
    return folders.pop() / INDEX_NAME if len(folders) == 1 else None


def some(names: Iterable[str], noun: str) -> str:
    """Return a bounded list for a message: ``2 tars: a.tar, b.tar``."""
    names = list(names)
    shown = ", ".join(names[:_MAX_NAMES]) + (" ..." if len(names) > _MAX_NAMES else "")
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'}: {shown}"


def _expand(shards: str, given: str) -> list[str]:
    path = Path(_local(shards, given)).expanduser()
    if path.is_dir():
        return _of_folder(path, given)
    if path.suffix in (".txt", ".list"):
        return _of_list_file(path, given)
    if path.is_file():
        return [str(path)]
    try:
        patterns = list(braceexpand(str(path)))
    except ValueError as error:
        raise CorpusError(f"{given}: its braces do not match") from error
    paths: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise CorpusError(f"{given}: nothing matches {pattern}")
        paths += matches
    return paths


def _of_folder(folder: Path, given: str) -> list[str]:
    names = sorted(os.listdir(folder))
    tars = [str(folder / name) for name in names if name.endswith(".tar")]
    if not tars:
        other = [name for name in names if name.endswith(_COMPRESSED)]
        hint = f"; it has {some(other, 'compressed file')}: unpack them" if other else ""
        raise CorpusError(f"{given}: the folder has no .tar{hint}")
    return tars


def _of_list_file(path: Path, given: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{given}: the list file cannot be read: {error}") from error
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise CorpusError(f"{given}: the list file names no tar")
    local = [_local(entry, f"{given}: {entry}") for entry in entries]
    return [str(path.parent / Path(entry).expanduser()) for entry in local]


def _local(path: str, given: str) -> str:
    try:
        return local_path(path)
    except ConfigError as error:
        raise CorpusError(f"{given} {error}") from error


def _check_name(path: str, flag: str) -> None:
    if path.endswith(_COMPRESSED):
        raise CorpusError(
            f"{path}: compressed tars cannot be read from the middle; unpack it to a .tar"
        )
    if not path.endswith(".tar"):
        if not os.path.exists(path):
            raise CorpusError(f"{flag}: {path} does not exist")
        raise CorpusError(
            f"{path}: not a .tar; {flag} takes tars, a folder, a glob, braces or a list file"
        )
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{path!r}: the path is not UTF-8; rename it") from error
