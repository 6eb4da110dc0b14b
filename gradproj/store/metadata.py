"""Finding a store on disk and reading what it is from its own Zarr metadata, without opening any array."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradproj.errors import StoreError
from gradproj.store.layout import (
    COLUMNS,
    FORMAT_VERSION,
    STORE_NAME,
    STORED_DTYPES,
    LayerSlice,
    StoreLayout,
)

_WAY_OUT = (
    "Put that file back from a copy (OUTPUT/metadata.json keeps the attributes); no row is lost with it. Then "
    "`python -m gradproj verify` tells of other damage"
)


def find_store(path: str | Path) -> Path:
    """The ``projections.zarr`` meant by ``path``, which is that folder or the one above it."""
    path = Path(path)
    for candidate in (path / STORE_NAME, path):
        if (candidate / "zarr.json").is_file():
            return candidate
    if not path.exists():
        raise StoreError(f"there is no store at {path}: no such folder")
    raise StoreError(
        f"{path} is not a gradproj store: it has neither zarr.json nor {STORE_NAME}/zarr.json. "
        "Give the job's --output_dir"
    )


def read_attributes(store_path: Path) -> dict[str, Any]:
    """The group's attributes, once it is known that this gradproj can read them."""
    attributes = _read_json(store_path / "zarr.json", store_path).get("attributes", {})
    if not isinstance(attributes, dict):
        raise _no_metadata(store_path / "zarr.json", "its attributes are no object")
    version = attributes.get("format_version")
    if not isinstance(version, int) or "layers" not in attributes:
        raise StoreError(
            f"{store_path} is a Zarr group but not a gradproj store: it has no format_version or layers"
        )
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{store_path} has format {version}, newer than the {FORMAT_VERSION} this gradproj reads: update gradproj"
        )
    return attributes


class WhichStore:
    """Tells the store at a path from another one that was made there since; cheap enough to ask for every unit.

    Threads may ask together.
    """

    def __init__(self, store_path: Path) -> None:
        self._path = store_path / "zarr.json"
        self._seen: tuple[tuple[int, ...], tuple[Any, Any]] | None = None

    def __call__(self) -> tuple[Any, Any] | None:
        """``(identity_hash, store_id)`` of the store that is there now, each None where it has none; None: no store.

        Raises:
            StoreError: it cannot be read.
        """
        for again in (True, True, False):
            try:
                return self._read()
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                # Over NFS a file that a merge elsewhere replaces can go between its opening and its reading.
                if not again or getattr(error, "errno", None) != errno.ESTALE:
                    raise StoreError(f"cannot read {self._path} ({error})") from error
        raise AssertionError("unreachable")

    def _read(self) -> tuple[Any, Any]:
        # Opened, not only looked at: over NFS an open asks the server, whatever this machine remembers.
        with open(self._path, "rb") as file:
            found, seen = os.fstat(file.fileno()), self._seen
            stamp = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
            if seen is None or seen[0] != stamp:
                content = json.load(file)
                attributes = content.get("attributes", {}) if isinstance(content, dict) else None
                if not isinstance(attributes, dict):
                    raise ValueError("it is no object with attributes")
                seen = stamp, (attributes.get("identity_hash"), attributes.get("store_id"))
                self._seen = seen
            return seen[1]


def layers_of(attributes: dict[str, Any]) -> list[LayerSlice]:
    """The attribute ``layers``; keys that a later gradproj added to them are left aside.

    Raises:
        StoreError: it is no list of layers.
    """
    names = LayerSlice.__dataclass_fields__
    try:
        return [
            LayerSlice(**{name: layer[name] for name in names}) for layer in attributes["layers"]
        ]
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"zarr.json is damaged: its attribute layers is no list of layers ({error!r}). {_WAY_OUT}"
        ) from error


def read_layout(store_path: Path) -> StoreLayout:
    """The layout as the arrays' metadata have it, whoever wrote them.

    Raises:
        StoreError: an array is missing, or ``projections`` is not a sharded 2-D array of a known type.
    """
    path = store_path / "projections" / "zarr.json"
    rows = _read_json(path, store_path)
    columns = {name: _read_json(store_path / name / "zarr.json", store_path) for name in COLUMNS}
    with _explained(store_path / "key" / "zarr.json"):
        key_bytes = columns["key"]["shape"][1]
    with _explained(store_path / "status" / "zarr.json"):
        column_rows = columns["status"]["chunk_grid"]["configuration"]["chunk_shape"][0]
    with _explained(path):
        sharding = rows["codecs"][0]
        if sharding["name"] != "sharding_indexed" or rows["data_type"] not in STORED_DTYPES:
            raise StoreError(
                f"{store_path}/projections is not a sharded array of {', '.join(STORED_DTYPES)}"
            )
        inner = sharding["configuration"]
        for key in ("index_codecs", "codecs"):  # which the reader of shards goes by
            [codec["name"] for codec in inner[key]]
        rows["chunk_key_encoding"].get("configuration", {}).get("separator")
        n_samples, dim = rows["shape"]
        chunk_rows, chunk_width = inner["chunk_shape"]
        return StoreLayout(
            n_samples=n_samples,
            dim=dim,
            rows_per_shard=rows["chunk_grid"]["configuration"]["chunk_shape"][0],
            chunk_rows=chunk_rows,
            chunk_width=chunk_width,
            proj_dtype=rows["data_type"],
            compressor=_compressor_name(inner["codecs"]),
            key_bytes=key_bytes,
            column_rows=column_rows,
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """What a file of metadata lacks becomes a ``StoreError`` that names it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _no_metadata(path, f"it does not describe a store's array ({error!r})") from error


def _compressor_name(codecs: list[dict[str, Any]]) -> str:
    others = [codec["name"] for codec in codecs if codec["name"] != "bytes"]
    return others[0] if others else "none"


def _read_json(path: Path, store_path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"{store_path} is damaged or not a gradproj store: cannot read {path} ({error}). {_WAY_OUT}"
        ) from error
    if not isinstance(content, dict):
        raise _no_metadata(path, "it holds no JSON object")
    return content


def _no_metadata(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged or not of a gradproj store: {what}. {_WAY_OUT}")
