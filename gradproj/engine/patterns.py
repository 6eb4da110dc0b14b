"""Patterns of layers' dotted names: of ``--proj_layers``, and of ``--layers`` of queries."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

ROLES: dict[str, tuple[str, ...]] = {
    "attn": (
        "attn", "attention", "self_attn", "self_attention", "cross_attn", "encoder_attn",
        "self_att", "multi_head_attention", "attentions", "temporal_block.?_proj",
        "mixer.[qkvo]_proj",
    ),
    # OPT has no module around its two feed-forward layers.
    "mlp": (
        "mlp", "mlps", "mlp_block", "shared_mlp", "ffn", "ffns", "ff", "fc1", "fc2",
        "feed_forward*", "block_sparse_moe", "layer.*.intermediate", "layer.*.output",
        "mixer.up_proj", "mixer.down_proj", "mixer.experts", "mixer.gate", "mixer.shared_experts",
    ),
    # What mixes the tokens in place of attention.
    "mixer": (
        "mixer", "mamba", "linear_attn", "mlstm_layer", "conv", "temporal_block.linear_*",
    ),
    "experts": ("experts",),
    "router": (
        "router", "shared_expert_gate", "mlp.gate", "feed_forward.gate", "block_sparse_moe.gate",
        "mixer.gate",
    ),
    "lm_head": ("lm_head",),
}  # fmt: skip
"""Role -> patterns of the names that its layers have in some family, so that one flag fits all.

A layer may have several roles (a router is part of its MLP), or none: ``all`` takes it too.
"""
ALL = "all"
"""All layers of the model's blocks, which are its numbered modules."""
HEAD = "lm_head"
"""``find_layers`` takes the vocabulary head under any name."""
EXCLUDES = "-"
"""Begins a pattern of layers to leave out."""
EXACT = "="
"""Begins the whole name of a layer."""


def is_role(pattern: str) -> bool:
    """Return whether a pattern stands for each family's own names."""
    return pattern == ALL or pattern in ROLES


def matches(pattern: str, name: str) -> bool:
    """Return whether consecutive components of a dotted name are those of the pattern."""
    if pattern.startswith(EXACT):
        return name == pattern.removeprefix(EXACT)
    parts = name.split(".")
    if pattern == ALL:
        return any(part.isdigit() for part in parts)
    options = [option.split(".") for option in ROLES.get(pattern, (pattern,))]
    return any(
        all(map(fnmatchcase, parts[i : i + len(o)], o))
        for o in options
        for i in range(len(parts) - len(o) + 1)
    )


def folded(name: str) -> str:
    """Replace numbers, so that a layer of all blocks has one name: ``h.*.mlp.c_fc``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def exclusions(unwanted: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Return short patterns that leave out the unwanted layers and none of those to keep."""
    kept = list(kept)
    chosen: list[str] = []
    for name in unwanted:
        if any(matches(pattern, name) for pattern in chosen):
            continue
        parts = name.split(".")
        runs = (
            ".".join(parts[start : start + length])
            for length in range(1, len(parts) + 1)
            for start in range(len(parts) - length + 1)
        )
        fitting = (run for run in runs if not any(matches(run, other) for other in kept))
        # A number says too little without the name before it: it may be a block's or an expert's.
        chosen.append(next((run for run in fitting if not run[0].isdigit()), name))
    return [EXCLUDES + pattern for pattern in chosen]
