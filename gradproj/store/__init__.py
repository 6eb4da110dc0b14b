"""The Zarr store: its format, its writers and its readers. Only this package imports zarr."""

from gradproj.store import bfloat16
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
from gradproj.store.row_reader import Band
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

# Plain zarr-python needs it to open bfloat16 stores. It is only ever chosen by name, so arrays of
# other types, uint16 among them, are not affected.
bfloat16.register()
