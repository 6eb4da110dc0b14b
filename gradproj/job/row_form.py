"""The form of a run's rows: the store's layout, and the places of layers and head rows in a row."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gradproj.engine.hidden_states import hidden_width
from gradproj.job.config import RunConfig
from gradproj.job.head import plan_head
from gradproj.job.identity import store_to_plan
from gradproj.store.head_rows import HeadSegment
from gradproj.store.layout import LayerSlice, StoreLayout, place_stored, plan_layout


def place_rows(
    config: RunConfig,
    skeleton: nn.Module,
    layers: Sequence[LayerSlice],
    n_samples: int,
    key_bytes: int,
) -> tuple[StoreLayout, list[LayerSlice], HeadSegment | None]:
    """Return the layout, the layers with their stored places, and the head rows' segment.

    Raises:
        ConfigError: head rows that the other settings do not make.
        ModelError: the model's head gives none.
    """
    widths = [layer.slice_end - layer.slice_start for layer in layers]
    head = plan_head(config, skeleton)
    layout = plan_layout(
        n_samples,
        widths,
        key_bytes,
        store_to_plan(config),
        head.n_bytes if head else 0,
        # A unit's longest documents come first: sums of all that have windows can be there at once.
        keeps_sums=config.batch.long_documents == "windows",
        hidden_width=hidden_width(skeleton) if config.store.hidden_state != "none" else 0,
    )
    placed = place_stored(layers, layout)
    return layout, placed, replace(head, stored_start=placed[-1].stored_end) if head else None
