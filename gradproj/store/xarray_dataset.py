"""A store as a lazy ``xarray.Dataset``. Needs the extra ``xarray``."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from gradproj.store.hidden_rows import read_hidden
from gradproj.store.hidden_states import HIDDEN_STATE, hidden_layout
from gradproj.store.layout import COLUMNS, STATUS, decode_key

_ABOUT: dict[str, dict[str, Any]] = {
    "rows": {
        "long_name": "projected gradient of the document's loss",
        "units": "nats per unit of weight",
    },
    "loss": {"long_name": "mean loss of the document's target tokens", "units": "nats"},
    "n_tokens": {"long_name": "target tokens"},
    "grad_norm": {"long_name": "norm of the row"},
    "status": {"flag_values": list(STATUS.values()), "flag_meanings": " ".join(STATUS)},
    "tar": {"long_name": "number of the document's tar; -1 if none is recorded"},
    "domain": {"long_name": "the document's domain; empty if none is recorded"},
    "key": {"long_name": "the document's key in its tar"},
    HIDDEN_STATE: {"long_name": "the document's final hidden state"},
}


Store = Any
"""A ``ProjectionStore``; its module imports this one."""


def lazy_dataset(store: Store, dropped: Collection[str] = ()) -> xr.Dataset:
    """Return the store's variables, which are read when indexed; without those ``dropped``."""
    absent = set(dropped) | ({HIDDEN_STATE} if not store.layout.hidden_width else set())
    variables = {name: _variable(store, name) for name in _ABOUT if name not in absent}
    layer_of_value = np.repeat(
        [layer.name for layer in store.layers],
        [layer.slice_end - layer.slice_start for layer in store.layers],
    )
    simple = {k: v for k, v in store.attributes.items() if isinstance(v, (str, int, float))}
    return xr.Dataset(variables, {"layer": ("value", layer_of_value)}, simple).set_xindex("layer")


def _variable(store: Store, name: str) -> xr.Variable:
    n, layout = len(store), store.layout
    if name == HIDDEN_STATE:
        shape = n, layout.hidden_width
        array = _Lazy(shape, np.dtype(np.float32), partial(_read_hidden, store))
        chunks = {"sample": min(layout.rows_per_shard, n), f"{HIDDEN_STATE}_value": shape[1]}
    elif name == "rows":
        array = _Lazy((n, store.dim), np.dtype(np.float32), partial(_read_rows, store))
        chunks = {"sample": min(layout.rows_per_shard, n), "value": store.dim}
    else:
        dtype, read = COLUMNS[name][0], _read_column
        if name == "domain":
            dtype, read = np.array([*store.domains, ""]).dtype, _read_domains
        elif name == "key":
            dtype, read = np.dtype(f"U{layout.key_bytes}"), _read_keys
        array = _Lazy((n,), dtype, partial(read, store, name))
        chunks = {"sample": min(layout.column_rows, n)}
    lazy = indexing.LazilyIndexedArray(array)
    return xr.Variable(tuple(chunks), lazy, _ABOUT[name], {"preferred_chunks": chunks})


class _Lazy(BackendArray):
    """An array whose values ``read`` returns, given positions on every axis."""

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[..., np.ndarray]
    ) -> None:
        self.shape, self.dtype, self._read = shape, dtype, read

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read_key
        )

    def _read_key(self, key: tuple[Any, ...]) -> np.ndarray:
        positions = [
            np.arange(size)[part] if isinstance(part, slice) else np.atleast_1d(part)
            for part, size in zip(key, self.shape, strict=True)
        ]
        single = tuple(axis for axis, part in enumerate(key) if isinstance(part, (int, np.integer)))
        return self._read(*positions).squeeze(axis=single)


# Functions, not closures: dask may pickle them, and a store is pickled as its path.


def _read_rows(store: Store, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Read values ``(n, w)`` of rows, NaN for missing ones; reads only layers that are needed."""
    ends = np.array([layer.slice_end for layer in store.layers])
    touched = [
        store.layers[number] for number in np.unique(np.searchsorted(ends, values, side="right"))
    ]
    columns = np.concatenate(
        [np.arange(x.slice_start, x.slice_end) for x in touched] or [np.empty(0, int)]
    )
    layers = None if len(columns) == store.dim else [layer.name for layer in touched]
    rows = store.rows(ids, layers, missing="nan")
    return rows if np.array_equal(columns, values) else rows[:, np.searchsorted(columns, values)]


def _read_hidden(store: Store, ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    layout = hidden_layout(store.layout)
    assert layout is not None
    return read_hidden(store.path, layout, ids)[:, values]


def _read_column(store: Store, name: str, ids: np.ndarray) -> np.ndarray:
    return store.columns_at([name], ids)[name]


def _read_domains(store: Store, name: str, ids: np.ndarray) -> np.ndarray:
    codes = _read_column(store, name, ids)
    store.check_domains(codes)
    return np.array([*store.domains, ""])[codes]  # -1 takes the last, the empty one


def _read_keys(store: Store, name: str, ids: np.ndarray) -> np.ndarray:
    keys = [decode_key(key) for key in _read_column(store, name, ids)]
    return np.array(keys, f"U{store.layout.key_bytes}")
