"""Rows of the array of hidden states, which have no scale."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.store.column_reader import Columns
from gradproj.store.layout import StoreLayout
from gradproj.store.page_cache import LRUCache
from gradproj.store.row_reader import Rows
from gradproj.store.selection import select_elements

_MAX_MAPS = 64


class UnscaledColumns(Columns):
    """The store's columns, with 1 as the scale of every row."""

    def read(self, names: Sequence[str], ids: np.ndarray) -> dict[str, np.ndarray]:
        values = super().read([name for name in names if name != "row_scale"], ids)
        return values | {"row_scale": np.ones(len(ids), np.float32)}

    def read_range(self, names: Sequence[str], start: int, stop: int) -> dict[str, np.ndarray]:
        values = super().read_range([n for n in names if n != "row_scale"], start, stop)
        return values | {"row_scale": np.ones(stop - start, np.float32)}


def read_hidden(store_path: Path, layout: StoreLayout, ids: np.ndarray) -> np.ndarray:
    """Read the hidden states of samples by ``hidden_layout``, ``(n, d)`` float32; NaN without."""
    maps: LRUCache[tuple[str, int], Any] = LRUCache(_MAX_MAPS)
    rows = Rows(store_path, layout, UnscaledColumns(store_path, layout, maps), maps)
    return rows.read(ids, select_elements(layout, ((0, layout.dim),)), "nan")
