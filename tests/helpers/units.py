"""Prepare a unit of random tokens without a corpus, and project it."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
from helpers.faults import fake_owner

from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.partial_rows import PartialLog
from gradproj.engine.batching import BatchConfig, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.job.unit_projector import ProjectedUnit, UnitProjector
from gradproj.job.unit_reader import PreparedUnit
from gradproj.store.layout import empty_columns

SETTINGS = SimpleNamespace(
    layout=SimpleNamespace(proj_dtype="float32"), batch=BatchConfig(), identity="the identity"
)
"""The part of ``UnitSettings`` that leads from sums on the device to a record."""


def unit_of(
    lengths: Sequence[int], vocabulary: int, batch_size: int = 256, batch_tokens: int = 8192
) -> PreparedUnit:
    """Prepare documents of random tokens. The last has two sequences."""
    generator = np.random.default_rng(0)
    sequences = [generator.integers(3, vocabulary, n) for n in (*lengths, lengths[-1])]
    n, sizes = len(lengths), [len(tokens) for tokens in sequences]
    columns = empty_columns(n, 4)
    columns["status"][:] = 1
    columns["n_tokens"][:] = np.asarray(lengths) - 1
    columns["n_tokens"][-1] *= 2
    row_of = np.minimum(np.arange(n + 1), n - 1)
    return PreparedUnit(
        0, 0, columns, sequences, row_of, plan_batches(sizes, batch_size, batch_tokens)
    )


def project_unit(model, engine: GradProjLoraEngine, unit: PreparedUnit, folder) -> ProjectedUnit:
    """Run the job's loop over a unit's batches, before anything is copied to the host."""
    projector = UnitProjector(model, engine, SETTINGS, RankProgress())
    nothing_saved = PartialLog(folder / "partial", folder, "key", fake_owner(0))
    projected = projector.project(unit, nothing_saved)
    assert projected is not None
    return projected
