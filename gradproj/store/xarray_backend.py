"""xarray's engine ``gradproj``: ``xarray.open_dataset(path, engine="gradproj", chunks={})``.

Without ``chunks`` it needs no dask. ``ProjectionStore.to_xarray`` returns the same dataset.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from gradproj.store.layout import STORE_NAME
from gradproj.store.reader import ProjectionStore
from gradproj.store.xarray_dataset import lazy_dataset


class GradprojBackend(BackendEntrypoint):
    """xarray's engine ``gradproj``."""

    description = "Open the projected gradients of a gradproj store"
    open_dataset_parameters = ("filename_or_obj", "drop_variables")

    def open_dataset(
        self, filename_or_obj: Any, *, drop_variables: str | Iterable[str] | None = None
    ) -> xr.Dataset:
        """Open a store or the store at a path, reading only its metadata."""
        store = filename_or_obj
        if not isinstance(store, ProjectionStore):
            store = ProjectionStore(store)
        dropped = {drop_variables} if isinstance(drop_variables, str) else set(drop_variables or ())
        return lazy_dataset(store, dropped)

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Return whether this is a job's output directory."""
        if not isinstance(filename_or_obj, (str, Path)):
            return False
        return (Path(filename_or_obj) / STORE_NAME / "zarr.json").is_file()
