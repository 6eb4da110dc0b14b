"""Patterns of layers' dotted names: of ``--proj_layers``, and of ``--layers`` of queries."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

ALIASES = {
    "attn": ("attn", "attention", "self_attn", "self_attention"),
    # OPT has no module around its two feed-forward layers.
    "mlp": ("mlp", "ffn", "feed_forward", "block_sparse_moe", "fc1", "fc2"),
}
"""Pattern -> the components it matches, so that one flag fits all model families."""
EXCLUDES = "-"
"""Begins a pattern of layers to leave out."""


def matches(pattern: str, name: str) -> bool:
    """Return whether consecutive components of a dotted name are those of the pattern."""
    parts = name.split(".")
    options = [option.split(".") for option in ALIASES.get(pattern, (pattern,))]
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
