"""Which layers of a model are projected: the patterns of ``--proj_layers``."""

from collections.abc import Sequence

from torch import nn

from gradproj.engine.layers import LAYER_RULES, TargetLayer, every_layer, rule_for, without_wrappers
from gradproj.engine.patterns import ALIASES, EXCLUDES, folded, matches
from gradproj.errors import ModelError

_MAX_NAMED = 8
"""Layers named in a message."""


def find_layers(
    model: nn.Module, patterns: Sequence[str], include_embeddings: bool = False
) -> list[TargetLayer]:
    """Return the layers that the patterns match, in model order, each once.

    A pattern matches whole dotted components (``h.1`` is not ``h.10``); ``*`` stands for any
    characters of one component. ``mlp`` and ``attn`` stand for each family's own names
    (``ALIASES``). A pattern that begins with ``-`` leaves out what it matches, whatever the others
    say; if it matches nothing that is no error (``idle_exclusions``). The token embedding is
    included by ``include_embeddings`` or by its name. Of modules that share a weight one match is
    enough.

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
    unmatched = [p for p in wanted if p not in used]
    if unmatched:
        raise _unmatched_error(model, unmatched, patterns)
    if not targets:
        raise ModelError(f"--proj_layers {','.join(patterns)} leaves no layer to project")
    return targets


def idle_exclusions(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return a line for people if some exclusions match nothing: one list may fit many models."""
    names = [name for name, _ in model.named_modules()]
    idle = [p for p in patterns if p.startswith(EXCLUDES)]
    idle = [p for p in idle if not any(matches(p.removeprefix(EXCLUDES), name) for name in names)]
    return [f"proj_layers   {','.join(idle)}: the model has nothing of that name"] if idle else []


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
    out = [p for p in patterns if p.startswith(EXCLUDES)]
    rest = [p for p in patterns if p not in unmatched]
    if len(rest) == len(out) or any(p in ALIASES for p in unmatched):
        # All that the model has in place of its feed-forward or attention layers.
        rest += _others(model, patterns)
    if len(rest) == len(out):
        rest += _projectable(model)[:_MAX_NAMED]
    way = ",".join(sorted(rest, key=lambda p: p.startswith(EXCLUDES)))
    if not found:
        return ModelError(
            f"--proj_layers: no layer of the model matches {names}. Its layers are: "
            f"{', '.join(_projectable(model)[:40])}. Give for example --proj_layers {way}"
        )
    if any(rule_for(model.get_submodule(name)) for name in found):
        return ModelError(
            f"--proj_layers: {','.join(out)} leaves out all that {names} matches. Give "
            f"--proj_layers {way}"
        )
    return ModelError(
        f"--proj_layers: {names} matches only weights that gradproj cannot project: "
        f"{_named(model, found)}. It projects "
        f"{', '.join(rule.type_name for rule in LAYER_RULES.values())}; fused experts "
        f"and quantized layers are not supported. Give --proj_layers {way}"
    )


def _named(model: nn.Module, names: Sequence[str]) -> str:
    typed = [f"{folded(name)} ({type(model.get_submodule(name)).__name__})" for name in names]
    typed = list(dict.fromkeys(typed))
    more = f" and {len(typed) - _MAX_NAMED} more" if len(typed) > _MAX_NAMED else ""
    return ", ".join(typed[:_MAX_NAMED]) + more


def _projectable(model: nn.Module) -> list[str]:
    """Return the names that have a rule, numbers folded: ``h.*.mlp.c_fc`` once for 12 blocks."""
    return list(dict.fromkeys(folded(n) for n, m in model.named_modules() if rule_for(m)))


def _others(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return patterns that take what the given ones leave of the blocks' layers.

    Each is the component after a block's number (``mixer`` of ``layers.*.mixer.in_proj``), or that
    before it (``ffns`` of ``ffns.*.lin1``).
    """
    given = [p.removeprefix(EXCLUDES) for p in patterns]
    names = [name for name in _projectable(model) if not any(matches(p, name) for p in given)]
    aliases = [alias for alias in ALIASES if any(matches(alias, name) for name in names)]
    parts = []
    for name in names:
        before, number, after = name.partition(".*.")
        if number and not any(matches(alias, name) for alias in aliases):
            inside, _, _ = after.partition(".")
            parts.append(inside if inside != after else before.rpartition(".")[2])
    return [*aliases, *dict.fromkeys(parts)]
