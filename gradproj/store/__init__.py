"""The Zarr store: its layout, its one writer per object, its readers. Only this package imports zarr."""

import zarr

from gradproj.store import bfloat16
from gradproj.store.bands import Band
from gradproj.store.layer_view import LayerView, Sample
from gradproj.store.layout import (
    FORMAT_VERSION,
    STATUS,
    LayerSlice,
    StoreConfig,
    StoreLayout,
    plan_layout,
)
from gradproj.store.reader import ProjectionStore
from gradproj.store.unit_record import UnitRecord
from gradproj.store.writer import StoreExists, create_store

__all__ = [
    "FORMAT_VERSION",
    "STATUS",
    "Band",
    "LayerSlice",
    "LayerView",
    "ProjectionStore",
    "Sample",
    "StoreConfig",
    "StoreExists",
    "StoreLayout",
    "UnitRecord",
    "create_store",
    "plan_layout",
]

# Zarr's own defaults start cores + 4 threads in every process; with eight ranks on a node that is hundreds.
zarr.config.set({"threading.max_workers": 2, "async.concurrency": 4})
bfloat16.register()
