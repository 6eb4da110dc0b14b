"""Arrays that zarr-python reads, on disk or in a bucket."""

from pathlib import Path

import zarr
from zarr.storage import ObjectStore

from gradproj.storage.object_path import ObjectPath


def open_array(path: Path) -> zarr.Array:
    """Open an array for reading."""
    if isinstance(path, ObjectPath):
        return zarr.open_array(ObjectStore(path.store, read_only=True), path=path.key, mode="r")
    return zarr.open_array(str(path), mode="r")
