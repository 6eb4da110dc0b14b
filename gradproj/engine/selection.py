"""Which layers of a model are projected: the patterns of ``--proj_layers``."""

from collections.abc import Callable, Sequence

from torch import nn

from gradproj.engine.layers import LAYER_RULES, TargetLayer, every_layer, rule_for, without_wrappers
from gradproj.engine.loss import output_head
from gradproj.engine.patterns import ALL, EXACT, EXCLUDES, HEAD, folded, is_role, matches
from gradproj.errors import ModelError

_MAX_NAMED = 8
"""Layers named in a message."""


def find_layers(
    model: nn.Module,
    patterns: Sequence[str],
    include_embeddings: bool = False,
    experts: str = "joint",
) -> list[TargetLayer]:
    """Return the layers that the patterns match, in model order, each once.

    A pattern matches whole dotted components (``h.1`` is not ``h.10``); ``*`` stands for any
    characters of one component. A role (``patterns.ROLES``) stands for each family's own names, and
    ``all`` for every layer of the blocks; ``=`` begins a whole name. A pattern that begins with
    ``-`` leaves out what it matches, whatever the others say. Exclusions and roles that match
    nothing are no error (``idle_patterns``): one list fits many models. The token embedding is
    included by ``include_embeddings`` or by its name. Of modules that share a weight one match is
    enough.

    Matched weights of no layer with a rule (norms, convolutions) are left out,
    which ``coverage_of`` reports. ``experts``: see ``every_layer``.

    Raises:
        ModelError: no layer is left, or another pattern than a role matches nothing that can be
            projected; says what to write instead.
    """
    model = without_wrappers(model)
    embedding = _token_embedding(model) if include_embeddings else None
    wanted = [p for p in patterns if not p.startswith(EXCLUDES)]
    exact = {p for p in wanted if p.startswith(EXACT)}
    loose = [p for p in wanted if p not in exact]
    excluded = [p.removeprefix(EXCLUDES) for p in patterns if p.startswith(EXCLUDES)]
    used: set[str] = set()
    targets: list[TargetLayer] = []
    every = every_layer(model, experts)
    takes = _matcher(model, every)
    for layer in every:
        hits = {EXACT + layer.name} & exact | {p for p in loose if takes(p, layer)}
        is_excluded = any(takes(p, layer) for p in excluded)
        if not is_excluded and (hits or embedding in layer.uses.values()):
            used |= hits
            targets.append(layer)
    unmatched = [p for p in wanted if p not in used]
    # A role may have no layers in this model, but not by an exclusion, and not every pattern.
    if unmatched and (
        not used or any(not is_role(p) or any(takes(p, x) for x in every) for p in unmatched)
    ):
        raise _unmatched_error(model, [n for x in every for n in x.uses], unmatched, patterns)
    if not targets:
        raise ModelError(f"--proj_layers {','.join(patterns)} leaves no layer to project")
    return targets


def block_layers(layers: Sequence[TargetLayer]) -> list[TargetLayer]:
    """Return the layers of the numbered modules, or all of a model that has none."""
    return [layer for layer in layers if matches(ALL, layer.name)] or list(layers)


def _matcher(model: nn.Module, every: Sequence[TargetLayer]) -> Callable[[str, TargetLayer], bool]:
    """Return what says whether a pattern takes a layer of the model."""
    head, blocks = output_head(model), {layer.name for layer in block_layers(every)}

    def takes(pattern: str, layer: TargetLayer) -> bool:
        if pattern == ALL:
            return layer.name in blocks
        is_head = pattern == HEAD and head in layer.uses.values()
        return is_head or any(matches(pattern, name) for name in layer.uses)

    return takes


def idle_patterns(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return a line for people if some exclusions or roles match nothing of the model."""
    every, names = every_layer(model), [name for name, _ in model.named_modules()]
    takes = _matcher(model, every)
    idle = [
        pattern
        for pattern in patterns
        if not any(matches(pattern.removeprefix(EXCLUDES), name) for name in names)
        and not any(takes(pattern.removeprefix(EXCLUDES), layer) for layer in every)
    ]
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
    model: nn.Module, layers: Sequence[str], unmatched: Sequence[str], patterns: Sequence[str]
) -> ModelError:
    """Say what to write instead; ``layers`` are the names of all that could be projected."""
    found = [
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False)] and any(matches(p, name) for p in unmatched)
    ]
    names = ", ".join(map(repr, unmatched))
    out = [p for p in patterns if p.startswith(EXCLUDES)]
    rest = [p for p in patterns if p not in unmatched and p not in out]
    way = ",".join([*(rest or [ALL]), *out])
    if not found:
        return ModelError(
            f"--proj_layers: no layer of the model matches {names}. Its layers are: "
            f"{', '.join(_shown(layers)[:40])}. Give for example --proj_layers {way}"
        )
    if any(matches(p, name) for p in unmatched for name in layers):
        return ModelError(
            f"--proj_layers: {','.join(out)} leaves out all that {names} matches. Give "
            f"--proj_layers {way if rest else ','.join(unmatched)}"
        )
    return ModelError(
        f"--proj_layers: {names} matches only weights that gradproj cannot project: "
        f"{_named(model, found)}. It projects "
        f"{', '.join(dict.fromkeys(rule.type_name for rule in LAYER_RULES.values()))}; quantized "
        f"layers once pack_quantized has packed them. Give --proj_layers {way}"
    )


def _named(model: nn.Module, names: Sequence[str]) -> str:
    typed = [f"{folded(name)} ({type(model.get_submodule(name)).__name__})" for name in names]
    typed = list(dict.fromkeys(typed))
    more = f" and {len(typed) - _MAX_NAMED} more" if len(typed) > _MAX_NAMED else ""
    return ", ".join(typed[:_MAX_NAMED]) + more


def _shown(layers: Sequence[str]) -> list[str]:
    """Return the names with numbers folded: ``h.*.mlp.c_fc`` once for 12 blocks."""
    return list(dict.fromkeys(map(folded, layers)))
