"""Which layers of a model are projected: the patterns of ``--proj_layers``."""

from collections.abc import Iterator, Sequence

from torch import nn

from gradproj.engine.layers import LAYER_RULES, TargetLayer, every_layer, rule_for, without_wrappers
from gradproj.errors import ModelError

ALIASES = {
    "attn": ("attn", "attention", "self_attn", "self_attention"),
    # OPT has no module around its two feed-forward layers.
    "mlp": ("mlp", "ffn", "feed_forward", "fc1", "fc2"),
}
"""Pattern -> the components it matches, so that one flag fits all model families."""


def find_layers(
    model: nn.Module, patterns: Sequence[str], include_embeddings: bool = False
) -> list[TargetLayer]:
    """Return the layers that the patterns match, in model order, each once.

    A pattern matches whole dotted components (``h.1`` is not ``h.10``). ``mlp`` and ``attn`` stand
    for each family's own names (``ALIASES``). The token embedding is included by
    ``include_embeddings`` or by its name. Of modules that share a weight one match is enough.

    Raises:
        ModelError: a pattern matches nothing (the message lists the layers), or matches weights
            that no rule describes (fused experts, quantized layers).
    """
    model = without_wrappers(model)
    embedding = _token_embedding(model) if include_embeddings else None
    used: set[str] = set()
    targets: list[TargetLayer] = []
    for layer in every_layer(model):
        hits = {p for p in patterns for name in layer.uses if _matches(p, name)}
        used |= hits
        if hits or embedding in layer.uses.values():
            targets.append(layer)
    unsupported = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(_matches(p, name) for p in patterns)
        and rule_for(module) is None
        and any(p.dim() >= 2 for p in module.parameters(recurse=False))
    ]
    if unsupported:
        more = f" and {len(unsupported) - 8} more" if len(unsupported) > 8 else ""
        supported = ", ".join(rule.type_name for rule in LAYER_RULES.values())
        raise ModelError(
            f"--proj_layers matches weights that gradproj cannot project: "
            f"{', '.join(unsupported[:8])}{more}. It supports {supported}; fused expert weights "
            "and quantized layers are not supported. Name other layers, for example --proj_layers "
            "attn"
        )
    unmatched = [p for p in patterns if p not in used]
    if unmatched:
        raise ModelError(
            f"--proj_layers: no layer of the model matches {', '.join(map(repr, unmatched))}. "
            f"Its layers are: {', '.join(_summary(model))}"
        )
    return targets


def _token_embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter else None
    if embedding is None or rule_for(embedding) is None:
        raise ModelError(
            f"--include_embeddings: {type(model).__name__} has no token embedding that gradproj "
            "supports"
        )
    return embedding


def _matches(pattern: str, name: str) -> bool:
    parts = name.split(".")
    options = [tuple(alias.split(".")) for alias in ALIASES.get(pattern, (pattern,))]
    return any(
        tuple(parts[i : i + len(o)]) == o for o in options for i in range(len(parts) - len(o) + 1)
    )


def _summary(model: nn.Module) -> Iterator[str]:
    """Yield the supported layers' names, numbers folded: ``h.*.mlp.c_fc`` once for 12 blocks."""
    seen: dict[str, None] = {}
    for name, module in model.named_modules():
        if rule_for(module) is not None:
            seen.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")))
    yield from list(seen)[:40]
