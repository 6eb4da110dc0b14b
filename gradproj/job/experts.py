"""Fused experts in a job: what ``--experts`` stands for, and what it costs."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gradproj.engine.compiled_capture import check_compilable
from gradproj.engine.inner_layers import ExpertsLayer, InnerLayer
from gradproj.engine.layers import TargetLayer
from gradproj.engine.selection import find_layers
from gradproj.formatting import count, human_bytes
from gradproj.job.config import RunConfig
from gradproj.job.identity import is_untouched
from gradproj.store.layout import STORE_NAME, LayerSlice
from gradproj.store.metadata import read_attributes, store_exists


def with_experts(config: RunConfig, skeleton: nn.Module) -> RunConfig:
    """Return the settings with ``--experts none`` if the rows have no experts or routers.

    So they have none if the model or its chosen layers have none, and in a store that was begun
    before there was a choice.

    Raises:
        ModelError: ``--compile`` with them.
    """
    projection = config.projection
    if projection.experts == "none":
        return config
    targets = find_layers(skeleton, projection.patterns, projection.include_embeddings)
    has_some = any(isinstance(target.module, InnerLayer) for target in targets)
    output = config.output
    if has_some and store_exists(output) and not is_untouched(output):
        recorded = read_attributes(output / STORE_NAME).get("identity", {})
        has_some = projection.experts != type(projection).experts or "--experts" in recorded
    if has_some and config.job.compile:
        check_compilable(targets)
    return config if has_some else replace(config, projection=replace(projection, experts="none"))


def experts_lines(
    targets: Sequence[TargetLayer], layers: Sequence[LayerSlice], row_bytes: int
) -> list[str]:
    """Return a line on the experts' part of a row, in the chosen form and in the other."""
    experts = [
        (target.module, layer)
        for target, layer in zip(targets, layers, strict=True)
        if isinstance(target.module, ExpertsLayer)
    ]
    if not experts:
        return []
    n_values = sum(layer.k_i * layer.k_o for _, layer in experts)
    share = row_bytes * n_values / sum(layer.k_i * layer.k_o for layer in layers)
    n_each = {module: module.n_experts for module, _ in experts}
    n_experts = sum(n_each.values())
    is_joint = len(experts) == len(n_each)
    form, other, n_other = ("joint", "separate", n_experts)
    if not is_joint:
        form, other, n_other = ("separate", "joint", len(n_each))
    return [
        f"experts       {form}: {count(len(experts), 'layer')}, {human_bytes(share)} of a row "
        f"({other}: {n_other:,}, {human_bytes(share * n_other / len(experts))})"
    ]
