"""Arrays that zarr-python reads, on disk or in a bucket."""

from asyncio import sleep
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import ObjectStore

from gradproj.storage.object_path import ObjectPath
from gradproj.storage.retry import Patience


class _PatientStore(ObjectStore):
    """Repeats reads whose reply was cut, which obstore itself does not do for short ones."""

    place: ObjectPath

    async def get(self, *args: Any, **options: Any) -> Any:
        patience = Patience(self.place)
        while True:
            try:
                result = await super().get(*args, **options)
            except Exception as error:
                pause = patience.pause_after(error)
                if pause is None:
                    raise
            else:
                patience.succeeded()
                return result
            await sleep(pause)


def open_array(path: Path) -> zarr.Array:
    """Open an array for reading."""
    if isinstance(path, ObjectPath):
        store = _PatientStore(path.store, read_only=True)
        store.place = path
        return zarr.open_array(store, path=path.key, mode="r", zarr_format=3)
    return zarr.open_array(str(path), mode="r", zarr_format=3)
