"""Arrays that zarr-python reads, on disk or in a bucket."""

import asyncio
from pathlib import Path
from typing import Any

import zarr
from zarr.storage import ObjectStore

from gradproj.storage.failures import RETRIED, reason_of
from gradproj.storage.object_path import ObjectPath
from gradproj.storage.retry import POLICY


class _PatientStore(ObjectStore):
    """Repeats reads whose reply was cut, which obstore itself does not do for short ones."""

    async def get(self, *args: Any, **options: Any) -> Any:
        pauses = POLICY.pauses()
        while True:
            try:
                return await super().get(*args, **options)
            except Exception as error:
                pause = next(pauses, None) if reason_of(error) in RETRIED else None
                if pause is None:
                    raise
                await asyncio.sleep(pause)


def open_array(path: Path) -> zarr.Array:
    """Open an array for reading."""
    if isinstance(path, ObjectPath):
        return zarr.open_array(_PatientStore(path.store, read_only=True), path=path.key, mode="r")
    return zarr.open_array(str(path), mode="r")
