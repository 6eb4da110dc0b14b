"""Documents that a selection must not hold, by id or by key, from a file."""

import json
from pathlib import Path

import numpy as np

from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore

_BLOCK_ROWS = 2**18


def read_excluded(path: Path, store: ProjectionStore) -> tuple[np.ndarray, int]:
    """Return the sample ids that a file names, sorted, and how many entries name no document.

    ``.npy`` holds ids; ``.jsonl`` one object a line with an ``id``, as a selection's, or a ``key``;
    any other file one key a line. Memory: the keys.

    Raises:
        ConfigError: the file cannot be read, is of another form, or has an id that the store has
            not.
    """
    try:
        if path.suffix == ".npy":
            return _checked(np.load(path, allow_pickle=False), path, store), 0
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"--not_in {path} cannot be read: {error}") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if path.suffix != ".jsonl":
        return _ids_of_keys([line for line in lines if line], store)
    ids: list[int] = []
    keys: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            entry = _entry(line, f"--not_in {path}, line {number}")
            if isinstance(entry, int):
                ids.append(entry)
            else:
                keys.append(entry)
    found, n_unknown = _ids_of_keys(keys, store)
    given = _checked(np.array(ids, np.int64), path, store)
    return np.union1d(given, found), n_unknown


def _entry(line: str, where: str) -> int | str:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    fields = fields if isinstance(fields, dict) else {}
    sample_id, key = fields.get("id"), fields.get("key")
    if type(sample_id) is int:
        if not 0 <= sample_id < 2**63:
            raise ConfigError(f"{where}: {str(sample_id)[:30]} is the id of no document")
        return sample_id
    if type(key) is str:
        return key
    raise ConfigError(f'{where}: give an object with "id" (a number) or "key" (a string)')


def _checked(ids: np.ndarray, path: Path, store: ProjectionStore) -> np.ndarray:
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(
            f"--not_in {path} holds {ids.dtype} {ids.shape}; give a list of sample ids (integers)"
        )
    wrong = ids[(ids < 0) | (ids >= len(store))]
    if len(wrong):
        raise ConfigError(
            f"--not_in {path} names document {wrong[0]}, and {store.path} has documents 0 to "
            f"{len(store) - 1:,}: ids of another store? Name documents by their keys"
        )
    return np.unique(ids.astype(np.int64))


def _ids_of_keys(keys: list[str], store: ProjectionStore) -> tuple[np.ndarray, int]:
    """Return the ids of all documents with one of the keys, and how many keys no document has."""
    width = store.layout.key_bytes
    encoded = {key.encode("utf-8", "surrogateescape") for key in keys}
    wanted = np.array([key for key in sorted(encoded) if len(key) <= width], f"S{width}")
    ids, found = [np.empty(0, np.int64)], np.zeros(len(wanted), bool)
    for first in range(0, len(store) if len(wanted) else 0, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, len(store))
        here = np.ascontiguousarray(store.column("key", first, last)).view(f"S{width}")[:, 0]
        at = np.minimum(np.searchsorted(wanted, here), len(wanted) - 1)
        same = (wanted[at] == here) & (here != b"")
        ids.append(first + np.flatnonzero(same))
        found[at[same]] = True
    return np.concatenate(ids), len(encoded) - int(found.sum())
