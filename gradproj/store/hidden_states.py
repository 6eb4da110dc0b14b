"""The array of documents' hidden states: float16, a row a document, in shards of the same units."""

from collections.abc import Iterator
from dataclasses import replace

from gradproj.store.chunk_shapes import MAX_CHUNK_ROWS, choose_chunk_rows
from gradproj.store.layout import StoreLayout

HIDDEN_STATE = "hidden_state"
"""Name of the array, and of the group's attribute that describes it."""
HIDDEN_STATES = ("none", "mean", "last")
"""Kinds: nothing is kept of the tokens' states, their mean over the target positions, or the state
of the last token."""


def hidden_layout(layout: StoreLayout) -> StoreLayout | None:
    """Return the layout of a store's hidden states; None if it has none."""
    if not layout.hidden_width:
        return None
    return replace(
        layout,
        dim=layout.hidden_width,
        chunk_rows=choose_chunk_rows(layout.rows_per_shard, MAX_CHUNK_ROWS),
        chunk_width=layout.hidden_width,
        proj_dtype="float16",
        compressor="none",
        encoding="dense",
        header_width=0,
        packed_width=0,
        hidden_width=0,
        array=HIDDEN_STATE,
    )


def sharded_layouts(layout: StoreLayout) -> Iterator[StoreLayout]:
    """Yield the layout of every array of which a unit has a shard, the hidden states' first."""
    hidden = hidden_layout(layout)
    if hidden is not None:
        yield hidden
    yield layout
