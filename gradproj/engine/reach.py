"""Target layers that the loss of a text never reaches: vision towers, unused experts, indexers."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from gradproj.engine.inner_layers import Routes
from gradproj.engine.layers import TargetLayer
from gradproj.engine.patterns import ALL, EXCLUDES, exclusions, folded, is_role, matches
from gradproj.engine.selection import find_layers
from gradproj.errors import ModelError
from gradproj.kernels.meta_values import AssumedValues
from gradproj.kernels.transformers_patches import one_sequence_a_row

_TOKENS, _MAX_TOKENS = 8, 512
"""Tokens of the trial, and of a second one: some layers have a part in longer texts alone (sparse
attention). The first is short, since recurrent models take a step for each token."""

_DTYPES = torch.bfloat16, torch.float32


def reached_layers(
    model: nn.Module,
    targets: Sequence[TargetLayer],
    patterns: Sequence[str],
    max_length: int,
    experts: str = "joint",
) -> list[TargetLayer]:
    """Run some tokens forward and backward; return the targets that take part in the loss.

    Targets without a part are left out if roles or ``all`` took them, and an error if their own
    name did. A layer takes part if it is called and its weight gets a gradient (Mamba uses the
    weight of ``dt_proj`` without calling the layer).

    Only the graph counts, so the model is one on the meta device. It is changed: its weights are
    bfloat16 (fused experts need it there; float32 if it cannot run in that), all but the targets'
    frozen. All targets are returned if the model cannot run there.

    Raises:
        ModelError: names the targets that the loss does not reach, and what to write instead.
    """
    reached: list[TargetLayer] = []
    for n_tokens in (min(_TOKENS, max_length), min(_MAX_TOKENS, max_length)):
        found = _tried(model, targets, n_tokens)
        if found is None and not reached:
            return list(targets)
        if found is None:  # the shorter trial ran: this length does not
            break
        reached, n_with_gradient = found
        if n_with_gradient == len(targets):  # of which some may never be called
            break
    unreached = _without(targets, reached)
    by_name = [p for p in patterns if not p.startswith(EXCLUDES) and not is_role(p)]
    named = any(matches(p, name) for p in by_name for t in unreached for name in t.uses)
    if not unreached or (reached and not named):
        return reached
    names = list(dict.fromkeys(folded(target.name) for target in unreached))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    what = (
        f"the loss of a text never reaches {len(unreached)} of {len(targets)} target layers: "
        f"{', '.join(names[:8])}{more}"
    )
    if reached:
        way, taken = _way_out(model, patterns, reached, unreached, experts)
    else:
        every = find_layers(model, [ALL], experts=experts)
        way, (taken, _) = [ALL], _tried(model, every, n_tokens) or ([], 0)
    if not taken:
        raise ModelError(f"{what}. It reaches no other layer either: no row can be computed")
    blocks = list(dict.fromkeys(folded(target.name).rpartition(".")[0] for target in taken))
    raise ModelError(
        f"{what}. Give --proj_layers {','.join(way)} (it takes {', '.join(blocks[:4])})"
    )


def _without(layers: Sequence[TargetLayer], others: Sequence[TargetLayer]) -> list[TargetLayer]:
    names = {layer.name for layer in others}
    return [layer for layer in layers if layer.name not in names]


def _way_out(
    model: nn.Module,
    patterns: Sequence[str],
    reached: Sequence[TargetLayer],
    unreached: Sequence[TargetLayer],
    experts: str,
) -> tuple[list[str], list[TargetLayer]]:
    """Return patterns that are accepted and take reached layers alone, and these layers."""
    kept = [name for target in reached for name in target.uses]
    unwanted = [name for target in unreached for name in target.uses]
    # A pattern of unreached layers alone would be an error beside the exclusion of all it matches.
    given = [p for p in patterns if p.startswith(EXCLUDES) or any(matches(p, n) for n in kept)]
    short = [
        p for p in dict.fromkeys(map(folded, kept)) if not any(matches(p, n) for n in unwanted)
    ]
    for way in ([*given, *exclusions(unwanted, kept)], short, kept):
        with suppress(ModelError):
            taken = find_layers(model, way, experts=experts)
            if not _without(taken, reached):
                return way, taken
    return [], []


def _tried(
    model: nn.Module, targets: Sequence[TargetLayer], n_tokens: int
) -> tuple[list[TargetLayer], int] | None:
    tries = (_reached(model.to(dtype), targets, n_tokens) for dtype in _DTYPES)
    return next((found for found in tries if found is not None), None)


def _reached(
    model: nn.Module, targets: Sequence[TargetLayer], n_tokens: int
) -> tuple[list[TargetLayer], int] | None:
    """Return the targets that are called and get a gradient, and how many get one.

    None if the model fails.
    """
    model.requires_grad_(False).eval()
    # A weight that is computed is none that a gradient is taken of; what it is computed from is.
    weights = [next(target.module.parameters()) for target in targets]
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.zeros((2, n_tokens), dtype=torch.int64, device=weights[0].device)
    called: set[nn.Module] = set()
    routes = Routes(module for target in targets for module in target.uses.values())
    hooks = [
        module.register_forward_hook(lambda module, *_: called.add(module))
        for target in targets
        for module in target.uses.values()
    ]
    try:
        with one_sequence_a_row(), AssumedValues():
            logits = model(input_ids=ids, use_cache=False).logits
        if not logits.requires_grad:
            return [], 0
        found = torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a model cannot do on the meta device raises many types
        return None
    finally:
        routes.remove()
        for hook in hooks:
            hook.remove()
    used = [t for t, gradient in zip(targets, found, strict=True) if gradient is not None]
    return [t for t in used if not called.isdisjoint(t.uses.values())], len(used)
