"""The head rows of a run: what can be checked before the model's values, and their attribute."""

from typing import Any

import torch
from torch import nn

from gradproj.engine.head_rows import INPUT_DAMPING
from gradproj.engine.loss import logits_are_the_heads, output_head
from gradproj.errors import ConfigError, ModelError
from gradproj.job.config import RunConfig
from gradproj.kernels.meta_values import AssumedValues
from gradproj.store.head_rows import HeadSegment


def plan_head(config: RunConfig, skeleton: nn.Module) -> HeadSegment | None:
    """Return the form of a run's head rows, not yet placed; None without ``--head_rows``.

    Raises:
        ConfigError: the other settings make no such rows.
        ModelError: the model's head gives none.
    """
    if config.head.segment(1) is None:
        return None
    shape = f"--head_rows {config.head.head_rows}"
    if config.projection.basis != "eigen":
        raise ConfigError(
            f"{shape} needs the pilot of --basis eigen, which measures its basis: give that, or "
            "leave --head_rows out"
        )
    if config.projection.basis_from:
        raise ConfigError(
            f"{shape} measures its own basis by a pilot, and --basis_from runs none: leave one of "
            "them out"
        )
    if config.store.encoding == "dense":
        raise ConfigError(
            f"{shape} are bytes of packed rows, and --encoding is dense: give --encoding signs, or "
            "leave --head_rows out"
        )
    head = output_head(skeleton)
    with torch.device("meta"), AssumedValues():
        plain = head is not None and logits_are_the_heads(skeleton)
    if not plain:
        raise ModelError(
            f"{shape}: the logits of {type(skeleton).__name__} are not its vocabulary head's own "
            "output, so its head has no rows. Leave --head_rows out"
        )
    assert isinstance(head, nn.Linear)
    segment = config.head.segment(head.out_features)
    assert segment is not None
    if segment.n_rows > head.out_features or segment.k > head.in_features:
        raise ConfigError(
            f"{shape}: the vocabulary head has {head.out_features:,} rows of {head.in_features:,} "
            "values; give at most that many of each"
        )
    return segment


def head_attribute(config: RunConfig, segment: HeadSegment | None) -> dict[str, Any]:
    """Return the attribute ``head`` of a store, if it has head rows."""
    if segment is None:
        return {}
    dampings = {"damping": config.head.head_damping, "input_damping": INPUT_DAMPING}
    return {"head": segment.as_attribute() | dampings}
