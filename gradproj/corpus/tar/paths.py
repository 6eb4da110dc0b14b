"""Expand ``--shards`` to the tars of a corpus, in order."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from braceexpand import braceexpand

from gradproj.errors import ConfigError, CorpusError
from gradproj.flags.paths import local_path, without_secret
from gradproj.storage import hub
from gradproj.storage.address import Address, Location, is_remote
from gradproj.storage.folders import read_or_none
from gradproj.storage.listing import glob_objects, has_magic, list_folder
from gradproj.storage.object_path import opened

INDEX_NAME = "corpus.json"
"""The corpus index: beside the tars, and in an output directory."""

UNFINISHED_NAME = "unfinished.json"
"""Beside the tars of a bucket while they are written."""

_MAX_NAMES = 10
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".lz4", ".tbz2", ".txz")


def list_tars(shards: str, flag: str = "--shards", anonymous: bool = False) -> list[Location]:
    """Return the tars of a corpus, in the order that defines the sample ids.

    Local paths are absolute; addresses of the hub name the present commit. ``shards`` is one of the
    following, local or an address:

    - a folder: its ``*.tar``, sorted by name;
    - a list file (``.txt`` or ``.list``): one path or address per line, in its order; a path is
      relative to the file;
    - a tar;
    - braces such as ``shard-{000000..000099}.tar``, in their order, which may hold globs;
    - a glob, sorted.

    ``flag`` names it in messages. ``anonymous``: remote tars are read without credentials.

    Raises:
        CorpusError: nothing matches; a tar is missing, named twice, compressed or a pipe. Whether a
            remote tar exists is not asked unless it is listed.
    """
    given = f"{flag} {without_secret(shards)}"
    remote = _Remote(given, anonymous)
    expanded = remote.expand(shards) if is_remote(shards) else _expand(shards, given, remote)
    paths = [p if isinstance(p, Address) else Path(os.path.abspath(p)) for p in expanded]
    for path in paths:
        _check_name(path, flag)
    missing = [str(p) for p in paths if isinstance(p, Path) and not p.is_file()]
    if missing:
        raise CorpusError(f"{given}: {some(missing, 'tar')} missing (or not a file)")
    first_of: dict[str, Location] = {}
    for path in paths:
        real = str(path) if isinstance(path, Address) else os.path.realpath(path)
        first = first_of.setdefault(real, path)
        if first is not path:
            raise CorpusError(f"{given}: {path} comes twice (also as {first}); list every tar once")
    return paths


def check_finished(folder: Location, is_marked: bool) -> None:
    """Raise ``CorpusError`` if a folder has the mark of tars that are not all there yet."""
    if is_marked:
        raise CorpusError(
            f"{folder}: its tars are not all there: a prepare still writes them, or was killed "
            f"({UNFINISHED_NAME} says which); wait for it, or delete the folder and prepare again"
        )


def default_index_path(tars: Iterable[Location]) -> Location | None:
    """Return ``corpus.json`` in the folder of the tars; None if they lie in several folders."""
    folders = {path.parent for path in tars}
    return folders.pop() / INDEX_NAME if len(folders) == 1 else None


def some(names: Iterable[str], noun: str) -> str:
    """Return a bounded list for a message: ``2 tars: a.tar, b.tar``."""
    names = list(names)
    shown = ", ".join(names[:_MAX_NAMES]) + (" ..." if len(names) > _MAX_NAMES else "")
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'}: {shown}"


def _expand(shards: str, given: str, remote: "_Remote") -> list[str] | list[str | Address]:
    path = Path(_local(shards, given)).expanduser()
    if path.is_dir():
        return _of_folder(path, given)
    if path.suffix in (".txt", ".list"):
        return _of_list_file(path, given, remote)
    if path.is_file():
        return [str(path)]
    paths: list[str] = []
    for pattern in _braces(str(path), given):
        if not glob.has_magic(pattern):
            paths.append(pattern)
            continue
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise CorpusError(f"{given}: nothing matches {pattern}")
        paths += matches
    return paths


def _braces(text: str, given: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise CorpusError(f"{given}: its braces do not match") from error


def _of_folder(folder: Path, given: str) -> list[str]:
    names = sorted(os.listdir(folder))
    tars = [str(folder / name) for name in names if name.endswith(".tar")]
    if not tars:
        raise _no_tar(names, given)
    return tars


def _no_tar(names: list[str], given: str) -> CorpusError:
    other = [name for name in names if name.endswith(_COMPRESSED)]
    hint = f"; it has {some(other, 'compressed file')}: unpack them" if other else ""
    return CorpusError(f"{given}: the folder has no .tar{hint}")


def _of_list_file(path: Path, given: str, remote: "_Remote") -> list[str | Address]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"{given}: the list file cannot be read: {error}") from error
    found: list[str | Address] = []
    for entry in _entries(content, given):
        if is_remote(entry):
            found += remote.expand(entry)
        else:
            local = _local(entry, f"{given}: {without_secret(entry)}")
            found.append(str(path.parent / Path(local).expanduser()))
    return found


def _entries(content: bytes, given: str) -> list[str]:
    """Return the lines of a list file that name a tar."""
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise CorpusError(f"{given}: the list file cannot be read: {error}") from error
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise CorpusError(f"{given}: the list file names no tar")
    return entries


def _local(path: str, given: str) -> str:
    try:
        return local_path(path)
    except ConfigError as error:
        raise CorpusError(f"{given} {error}") from error


class _Remote:
    """Expands addresses. A revision of the hub is resolved to its commit, once a repository."""

    def __init__(self, given: str, anonymous: bool) -> None:
        self._given, self._anonymous = given, anonymous
        self._commits: dict[str, str] = {}

    def expand(self, text: str) -> list[Address]:
        """Return the addresses that one with braces, a glob, a folder or a list file stands for."""
        found: list[Address] = []
        for part in _braces(text, self._given):
            address = self._pinned(self._parse(part))
            if has_magic(address.key):
                matches = glob_objects(address)
                if not matches:
                    raise CorpusError(f"{self._given}: nothing matches {address}")
                found += matches
            elif address.suffix in (".txt", ".list"):
                found += self._of_list_file(address)
            elif address.name.endswith((".tar", *_COMPRESSED)):
                found.append(address)
            else:
                found += self._of_folder(address)
        return found

    def _parse(self, text: str) -> Address:
        try:
            return Address.parse(text, self._anonymous)
        except ConfigError as error:
            raise CorpusError(f"{self._given.partition(' ')[0]}: {error}") from error

    def _pinned(self, address: Address) -> Address:
        if address.scheme != "hf":
            return address
        bucket = address.bucket
        if bucket not in self._commits:
            self._commits[bucket] = hub.pinned(address).bucket
        return Address("hf", self._commits[bucket], address.key, address.anonymous)

    def _of_folder(self, folder: Address) -> list[Address]:
        objects = list(list_folder(folder))
        check_finished(folder, folder / UNFINISHED_NAME in objects)
        tars = [address for address in objects if address.suffix == ".tar"]
        if not tars:
            raise _no_tar([address.name for address in objects], self._given)
        return tars

    def _of_list_file(self, address: Address) -> list[Address]:
        content = read_or_none(opened(address))
        if content is None:
            raise CorpusError(f"{self._given}: the list file {address} does not exist")
        found: list[Address] = []
        for entry in _entries(content, self._given):
            if is_remote(entry):
                found += self.expand(entry)
            else:
                found.append(address.parent / entry)
        return found


def _check_name(path: Location, flag: str) -> None:
    name = str(path)
    if name.endswith(_COMPRESSED):
        raise CorpusError(
            f"{path}: compressed tars cannot be read from the middle; unpack it to a .tar"
        )
    if not name.endswith(".tar"):
        if isinstance(path, Path) and not path.exists():
            raise CorpusError(f"{flag}: {path} does not exist")
        raise CorpusError(
            f"{path}: not a .tar; {flag} takes tars, a folder, a glob, braces or a list file"
        )
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{name!r}: the path is not UTF-8; rename it") from error
