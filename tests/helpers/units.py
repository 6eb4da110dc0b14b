"""Prepare a unit of random tokens without a corpus, and project it."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from helpers.faults import fake_owner
from torch import nn

from gradproj.coordinator.file_commits import FileCommits
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.partial_rows import PartialLog
from gradproj.engine.batching import BatchConfig, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.job.unit_projector import ProjectedUnit, UnitProjector
from gradproj.job.unit_reader import PreparedUnit
from gradproj.model.sequences import TokenSequence
from gradproj.store.head_rows import HeadSegment
from gradproj.store.layout import (
    LayerSlice,
    StoreConfig,
    StoreLayout,
    empty_columns,
    place_stored,
    plan_layout,
)
from gradproj.store.row_encoder import RowEncoder


def unit_of(
    lengths: Sequence[int], vocabulary: int, batch_size: int = 256, batch_tokens: int = 8192
) -> PreparedUnit:
    """Prepare documents of random tokens. The last has two sequences."""
    generator = np.random.default_rng(0)
    n, sizes = len(lengths), [*lengths, lengths[-1]]
    sequences = [
        TokenSequence.of(generator.integers(3, vocabulary, size), owner=min(number, n - 1))
        for number, size in enumerate(sizes)
    ]
    columns = empty_columns(n, 4)
    columns["status"][:] = 1
    columns["n_tokens"][:] = np.asarray(lengths) - 1
    columns["n_tokens"][-1] *= 2
    return PreparedUnit(0, 0, columns, sequences, plan_batches(sizes, batch_size, batch_tokens))


def layout_of(engine: GradProjLoraEngine, **form: Any) -> tuple[StoreLayout, list[LayerSlice]]:
    """Return the layout of a store of this engine's rows, by default dense float32."""
    layers, at = [], 0
    for name, (p_i, p_o) in engine.projection_matrices.items():
        (k_i, n_i), (k_o, n_o) = p_i.shape, p_o.shape
        layers.append(LayerSlice(name, "Linear", n_i, n_o, k_i, k_o, at, at + k_i * k_o))
        at += k_i * k_o
    form = {
        "encoding": "dense",
        **({} if "encoding" in form else {"proj_dtype": "float32"}),
        **form,
    }
    widths = [layer.slice_end - layer.slice_start for layer in layers]
    layout = plan_layout(64, widths, 4, StoreConfig(**form))
    return layout, place_stored(layers, layout)


def project_unit(
    model: nn.Module,
    engine: GradProjLoraEngine,
    unit: PreparedUnit,
    folder: Path,
    head: tuple[HeadBasis, HeadSegment] | None = None,
    hidden: str = "none",
    **form: Any,
) -> ProjectedUnit:
    """Run the job's loop over a unit's batches, before anything is copied to the host."""
    layout, layers = layout_of(engine, **form)
    settings = SimpleNamespace(layout=layout, batch=BatchConfig(), identity="the identity")
    encoder = RowEncoder(layout, layers)
    made = model, engine, settings, encoder, RankProgress()
    projector = UnitProjector(*made, head=head, hidden=hidden)
    nothing_saved = PartialLog(folder / "partial", FileCommits(folder, fake_owner(0)), "key")
    projected = projector.project(unit, nothing_saved)
    assert projected is not None
    return projected
