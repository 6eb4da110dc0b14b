"""The Zarr store: its format, its writers and its readers. Only this package imports zarr."""

from gradproj.store import bfloat16
from gradproj.store.hidden_view import HiddenStates
from gradproj.store.layout import STATUS
from gradproj.store.reader import ProjectionStore
from gradproj.store.row_reader import Band

__all__ = ["STATUS", "Band", "HiddenStates", "ProjectionStore"]

# Plain zarr-python needs it to open bfloat16 stores. It is only ever chosen by name, so arrays of
# other types, uint16 among them, are not affected.
bfloat16.register()
