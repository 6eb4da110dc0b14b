"""Which layers of a model are projected: the patterns of ``--proj_layers``."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from gradproj.engine.layers import LAYER_RULES, TargetLayer, every_layer, rule_for, without_wrappers
from gradproj.errors import ModelError

ALIASES = {
    "attn": ("attn", "attention", "self_attn", "self_attention"),
    # OPT has no module around its two feed-forward layers.
    "mlp": ("mlp", "ffn", "feed_forward", "fc1", "fc2"),
}
"""Pattern -> the components it matches, so that one flag fits all model families."""
EXCLUDES = "-"
"""Begins a pattern of layers to leave out."""
_MAX_NAMED = 8
"""Layers named in a message."""


def find_layers(
    model: nn.Module, patterns: Sequence[str], include_embeddings: bool = False
) -> list[TargetLayer]:
    """Return the layers that the patterns match, in model order, each once.

    A pattern matches whole dotted components (``h.1`` is not ``h.10``); ``*`` stands for any
    characters of one component. ``mlp`` and ``attn`` stand for each family's own names
    (``ALIASES``). A pattern that begins with ``-`` leaves out what it matches, whatever the others
    say. The token embedding is included by ``include_embeddings`` or by its name. Of modules that
    share a weight one match is enough.

    Matched weights of no layer with a rule (norms, convolutions, fused experts, quantized layers)
    are left out, which ``coverage_of`` reports.

    Raises:
        ModelError: a pattern matches nothing that can be projected; says what to write instead.
    """
    model = without_wrappers(model)
    embedding = _token_embedding(model) if include_embeddings else None
    wanted = [p for p in patterns if not p.startswith(EXCLUDES)]
    excluded = [p.removeprefix(EXCLUDES) for p in patterns if p.startswith(EXCLUDES)]
    used: set[str] = set()
    targets: list[TargetLayer] = []
    for layer in every_layer(model):
        hits = {p for p in wanted if any(matches(p, name) for name in layer.uses)}
        is_excluded = any(matches(p, name) for p in excluded for name in layer.uses)
        if not is_excluded and (hits or embedding in layer.uses.values()):
            used |= hits
            targets.append(layer)
    # Excluded may be what no rule describes.
    used |= {EXCLUDES + p for p in excluded if any(matches(p, n) for n, _ in model.named_modules())}
    unmatched = [p for p in patterns if p not in used]
    if unmatched:
        raise _unmatched_error(model, unmatched, patterns)
    if not targets:
        raise ModelError(f"--proj_layers {','.join(patterns)} leaves no layer to project")
    return targets


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
        # A number alone says too little: it may be a block's or an expert's.
        chosen.append(next((run for run in fitting if not run.isdigit()), name))
    return [EXCLUDES + pattern for pattern in chosen]


def _token_embedding(model: nn.Module) -> nn.Module:
    getter = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter else None
    if embedding is None or rule_for(embedding) is None:
        raise ModelError(
            f"--include_embeddings: {type(model).__name__} has no token embedding that gradproj "
            "supports"
        )
    return embedding


def _unmatched_error(
    model: nn.Module, unmatched: Sequence[str], patterns: Sequence[str]
) -> ModelError:
    found = [
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False)] and any(matches(p, name) for p in unmatched)
    ]
    names = ", ".join(map(repr, unmatched))
    if not found:
        return ModelError(
            f"--proj_layers: no layer of the model matches {names}. Its layers are: "
            f"{', '.join(_projectable(model)[:40])}"
        )
    out = [p for p in patterns if p.startswith(EXCLUDES)]
    if any(rule_for(model.get_submodule(name)) for name in found):
        return ModelError(f"--proj_layers: {','.join(out)} leaves out all that {names} matches")
    rest = [p for p in patterns if p not in {*unmatched, *out}]
    way = ",".join([*rest, *out]) if rest else _others(model, patterns)
    return ModelError(
        f"--proj_layers: {names} matches only weights that gradproj cannot project: "
        f"{_named(model, found)}. It projects "
        f"{', '.join(rule.type_name for rule in LAYER_RULES.values())}; fused experts "
        f"and quantized layers are not supported. Give --proj_layers {way}"
    )


def _named(model: nn.Module, names: Sequence[str]) -> str:
    shown = [f"{name} ({type(model.get_submodule(name)).__name__})" for name in names[:_MAX_NAMED]]
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(shown) + more


def _projectable(model: nn.Module) -> list[str]:
    """Return the names that have a rule, numbers folded: ``h.*.mlp.c_fc`` once for 12 blocks."""
    return list(dict.fromkeys(folded(n) for n, m in model.named_modules() if rule_for(m)))


def _others(model: nn.Module, patterns: Sequence[str]) -> str:
    """Return patterns of layers that can be projected, none of which was given."""
    names = [name for name in _projectable(model) if not any(matches(p, name) for p in patterns)]
    aliases = [alias for alias in ALIASES if any(matches(alias, name) for name in names)]
    return ",".join(aliases or names[:4])
