"""Which layers a job projects: of a new store by ``--proj_layers``, of a begun one as recorded."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gradproj.engine.coverage import Coverage, coverage_of
from gradproj.engine.layers import TargetLayer, every_layer
from gradproj.engine.reach import reached_layers
from gradproj.engine.selection import find_layers
from gradproj.job.allocation import with_allocation
from gradproj.job.config import RunConfig
from gradproj.job.identity import is_untouched
from gradproj.store.layout import STORE_NAME
from gradproj.store.metadata import read_attributes, store_exists


@dataclass(frozen=True)
class LayerChoice:
    """The layers of a job's rows, and the settings that say so."""

    config: RunConfig
    """With the flags that ``--bytes_per_document`` stands for."""
    targets: list[TargetLayer]
    coverage: Coverage
    notes: list[str]
    """Lines for people on ``--bytes_per_document``."""


def choose_layers(config: RunConfig, model: nn.Module) -> LayerChoice:
    """Choose the layers of a job among those of a model on the meta device.

    Layers of a role that the loss of a text never reaches are left out. A begun store keeps its
    recorded layers if its ``--proj_layers`` is the run's: what a role takes may have been less in
    the version that began it. (If the model lacks one of them, the identity differs anyway.)

    Raises:
        ModelError: a pattern matches nothing, or names layers that the loss never reaches.
    """
    recorded, projection = _recorded_layers(config.output), config.projection
    rest = projection.include_embeddings, projection.experts
    found = find_layers(model, projection.patterns, *rest)
    targets = found
    if recorded is None or projection.bytes_per_document:
        max_length = config.batch.max_length
        targets = reached_layers(model, found, projection.patterns, max_length, projection.experts)
    reached = {target.name for target in targets}
    unreached = [target for target in found if target.name not in reached]
    config, notes = with_allocation(config, model, targets)
    if config.projection.patterns != projection.patterns:
        fewer = find_layers(model, config.projection.patterns, *rest)
        targets = [target for target in fewer if target.name in reached]
    if recorded is not None and recorded[0] == config.projection.layers:
        every = every_layer(model, projection.experts)
        kept = [layer for layer in every if layer.name in recorded[1]]
        targets = kept if len(kept) == len(recorded[1]) else targets
    return LayerChoice(config, targets, coverage_of(model, targets, unreached), notes)


def _recorded_layers(output: Path) -> tuple[str, frozenset[str]] | None:
    """Return ``--proj_layers`` and the layers' names of a begun store; None if there is none."""
    if is_untouched(output) or not store_exists(output):
        return None
    identity = read_attributes(output / STORE_NAME).get("identity", {})
    return identity.get("--proj_layers", ""), frozenset(identity.get("layers", ()))
