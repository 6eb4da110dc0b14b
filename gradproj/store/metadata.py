"""A store's Zarr metadata: finds the store on disk and reads its attributes and layout."""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradproj.errors import ConfigError, StoreError
from gradproj.flags.paths import local_path, without_secret
from gradproj.storage.address import is_remote
from gradproj.storage.folders import tree_exists
from gradproj.storage.object_path import ObjectPath, Stamp, path_of, read_each, read_if_changed
from gradproj.store.chunk_shapes import SCALE_BYTES
from gradproj.store.head_rows import HeadSegment
from gradproj.store.hidden_states import HIDDEN_STATE
from gradproj.store.layout import (
    COLUMNS,
    FORMAT_VERSION,
    GROUP_NAME,
    PACKED_BITS,
    STORE_NAME,
    STORED_DTYPES,
    LayerSlice,
    StoreLayout,
)

_DTYPES = (*STORED_DTYPES, "uint8")
_WAY_OUT = (
    "Restore that file from a copy (OUTPUT/metadata.json has the attributes); no row is lost with "
    "it. Then `python -m gradproj verify` shows other damage"
)


def find_store(path: str | Path) -> Path:
    """Return the ``projections.zarr`` at ``path`` or in it.

    Raises:
        StoreError: there is none.
    """
    try:
        remote = isinstance(path, ObjectPath) or is_remote(str(path))
        path = path_of(path) if remote else Path(local_path(str(path)))
    except ConfigError as error:
        raise StoreError(
            str(error) if remote else f"{without_secret(str(path))} {error}"
        ) from error
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
    """Read the group's attributes.

    Raises:
        StoreError: they are damaged, not a gradproj store's, or of a newer format.
    """
    attributes = _read_json(store_path / "zarr.json", store_path).get("attributes", {})
    if not isinstance(attributes, dict):
        raise _no_metadata(store_path / "zarr.json", "its attributes are no object")
    version = attributes.get("format_version")
    if not isinstance(version, int) or "layers" not in attributes:
        raise StoreError(
            f"{store_path} is a Zarr group but not a gradproj store: it has no format_version or "
            "layers"
        )
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{store_path} has format {version}, newer than the {FORMAT_VERSION} this gradproj "
            "reads: update gradproj"
        )
    return attributes


def store_exists(output: Path) -> bool:
    """Return whether an output directory has a store, damaged or not."""
    return tree_exists(output / STORE_NAME, GROUP_NAME)


class WhichStore:
    """Identifies the store that is at a path now. Cheap enough to call for every unit.

    Several threads may call it.
    """

    def __init__(self, store_path: Path) -> None:
        self._path = store_path / GROUP_NAME
        self._seen: tuple[Stamp, tuple[Any, Any]] | None = None

    def __call__(self) -> tuple[Any, Any] | None:
        """Return ``(identity_hash, store_id)`` of the store; None if there is no store.

        Either is None if the store has no such attribute.

        Raises:
            StoreError: it cannot be read.
        """
        for again in (True, True, False):
            try:
                return self._read()
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                # On NFS a file that another machine replaces may vanish between open and read.
                if not again or getattr(error, "errno", None) != errno.ESTALE:
                    raise StoreError(f"cannot read {self._path} ({error})") from error
        raise AssertionError("unreachable")

    def _read(self) -> tuple[Any, Any]:
        seen = self._seen
        newer = read_if_changed(self._path, None if seen is None else seen[0])
        if newer is not None:
            content, stamp = json.loads(newer[0]), newer[1]
            attributes = content.get("attributes", {}) if isinstance(content, dict) else None
            if not isinstance(attributes, dict):
                raise ValueError("it is no object with attributes")
            seen = stamp, (attributes.get("identity_hash"), attributes.get("store_id"))
            self._seen = seen
        assert seen is not None
        return seen[1]


def layers_of(attributes: dict[str, Any]) -> list[LayerSlice]:
    """Return the attribute ``layers``; keys that a later gradproj added to a layer are ignored.

    Raises:
        StoreError: it is no list of layers.
    """
    names = LayerSlice.__dataclass_fields__
    try:
        return [
            # Stores of version 1 lack the places in a stored row.
            LayerSlice(**{name: layer[name] for name in names if name in layer})
            for layer in attributes["layers"]
        ]
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"zarr.json is damaged: its attribute layers is no list of layers ({error!r}). "
            f"{_WAY_OUT}"
        ) from error


def head_of(
    store_path: Path, attributes: dict[str, Any], layout: StoreLayout
) -> HeadSegment | None:
    """Return the place of the head rows; None for a store without them.

    Raises:
        StoreError: the attribute is damaged.
    """
    with _explained(store_path / "zarr.json"):
        return HeadSegment.of(attributes, layout.stored_width)


def read_layout(store_path: Path, attributes: dict[str, Any] | None = None) -> StoreLayout:
    """Read the layout from the arrays' metadata, by any writer.

    ``attributes`` are the group's, if they have been read.

    Raises:
        StoreError: an array is missing, or ``projections`` is not a sharded 2-D array of a known
            type.
    """
    path = store_path / "projections" / "zarr.json"
    attributes = attributes or read_attributes(store_path)
    files = [path, *(store_path / name / "zarr.json" for name in COLUMNS)]
    rows, *of_columns = _read_jsons(files, store_path)
    columns = dict(zip(COLUMNS, of_columns, strict=True))
    with _explained(store_path / "key" / "zarr.json"):
        key_bytes = columns["key"]["shape"][1]
    with _explained(store_path / "status" / "zarr.json"):
        column_rows = columns["status"]["chunk_grid"]["configuration"]["chunk_shape"][0]
    with _explained(path):
        sharding = rows["codecs"][0]
        if sharding["name"] != "sharding_indexed" or rows["data_type"] not in _DTYPES:
            raise StoreError(
                f"{store_path}/projections is not a sharded array of {', '.join(_DTYPES)}"
            )
        inner = sharding["configuration"]
        for key in ("index_codecs", "codecs"):  # the shard reader needs their names
            [codec["name"] for codec in inner[key]]
        rows["chunk_key_encoding"].get("configuration", {}).get("separator")
        n_samples, width = rows["shape"]
        chunk_rows, chunk_width = inner["chunk_shape"]
        layout = StoreLayout(
            n_samples=n_samples,
            dim=width,
            rows_per_shard=rows["chunk_grid"]["configuration"]["chunk_shape"][0],
            chunk_rows=chunk_rows,
            chunk_width=chunk_width,
            proj_dtype=rows["data_type"],
            compressor=next(
                (codec["name"] for codec in inner["codecs"] if codec["name"] != "bytes"), "none"
            ),
            key_bytes=key_bytes,
            column_rows=column_rows,
        )
    if layout.proj_dtype == "uint8":
        layout = _packed_layout(store_path, layout, attributes)
    has_hidden = HIDDEN_STATE in attributes
    return replace(layout, hidden_width=_hidden_width(store_path, layout) if has_hidden else 0)


def _hidden_width(store_path: Path, layout: StoreLayout) -> int:
    """Return the values of a hidden state."""
    path = store_path / HIDDEN_STATE / "zarr.json"
    array = _read_json(path, store_path)
    with _explained(path):
        n_samples, width = array["shape"]
        rows = array["chunk_grid"]["configuration"]["chunk_shape"][0]
        if (n_samples, rows) != (layout.n_samples, layout.rows_per_shard) or width < 1:
            raise ValueError(f"its shape is {array['shape']}, in shards of {rows} rows")
        return int(width)


def _packed_layout(
    store_path: Path, layout: StoreLayout, attributes: dict[str, Any]
) -> StoreLayout:
    """Complete the layout of packed rows from the group's attributes."""
    path = store_path / "zarr.json"
    with _explained(path):
        layers, encoding = layers_of(attributes), attributes["encoding"]
        layout = replace(
            layout,
            dim=layers[-1].slice_end,
            encoding=encoding["name"],
            header_width=encoding["header_bytes"],
            packed_width=layout.dim,
        )
        check_packed(layout, layers)
    return layout


def check_packed(layout: StoreLayout, layers: list[LayerSlice]) -> None:
    """Check that the layers follow each other in decoded rows and in packed ones.

    Raises:
        ValueError: names the layer that is not where its bytes are.
    """
    if layout.encoding not in PACKED_BITS:
        raise ValueError(f"the encoding {layout.encoding!r} is unknown")
    if layout.header_width < SCALE_BYTES * len(layers):
        raise ValueError(f"a header of {layout.header_width} bytes holds no {len(layers)} scales")
    value, byte = 0, layout.header_width
    for layer in layers:
        width = layer.k_o * layer.k_i
        want = (value, value + width, byte, byte + -(-width * layout.bits // 8))
        places = (layer.slice_start, layer.slice_end, layer.stored_start, layer.stored_end)
        if places != want:
            raise ValueError(f"layer {layer.name} is at {places}, not at {want}")
        value, byte = want[1], want[3]
    if value != layout.dim or byte > layout.stored_width:
        raise ValueError(f"the layers end at {value} and {byte}, a row at {layout.stored_width}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of reading damaged metadata into a StoreError that names the file."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _no_metadata(path, f"it does not describe a store's array ({error!r})") from error


def _read_json(path: Path, store_path: Path) -> dict[str, Any]:
    return _read_jsons([path], store_path)[0]


def _read_jsons(paths: Sequence[Path], store_path: Path) -> list[dict[str, Any]]:
    contents = []
    for path, data in zip(paths, read_each(paths), strict=True):
        try:
            if isinstance(data, OSError):
                raise data
            content = json.loads(data)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{store_path} is damaged or not a gradproj store: cannot read {path} ({error}). "
                f"{_WAY_OUT}"
            ) from error
        if not isinstance(content, dict):
            raise _no_metadata(path, "it holds no JSON object")
        contents.append(content)
    return contents


def _no_metadata(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged or not of a gradproj store: {what}. {_WAY_OUT}")
