"""Target layers that the loss of a text never reaches: vision towers, unused experts, indexers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gradproj.engine.layers import TargetLayer
from gradproj.engine.patterns import exclusions, folded
from gradproj.errors import ModelError
from gradproj.kernels.transformers_patches import one_sequence_a_row

_TOKENS, _MAX_TOKENS = 8, 512
"""Tokens of the trial, and of a second one: some layers have a part in longer texts alone (sparse
attention). The first is short, since recurrent models take a step for each token."""


def check_reached(
    model: nn.Module, targets: Sequence[TargetLayer], patterns: Sequence[str], max_length: int
) -> bool:
    """Run some tokens forward and backward and check that every target gets a gradient.

    Only the graph counts, so the model is one on the meta device. It is changed: its weights are
    bfloat16 (fused experts need it there), all but the targets' frozen.

    Returns:
        False if nothing is known, since the model's path depends on values.

    Raises:
        ModelError: names the targets that the loss does not reach, and what to write instead.
    """
    # A weight that is computed is none that a gradient is taken of; what it is computed from is.
    weights = [next(target.module.parameters()) for target in targets]
    gradients: Sequence[Any] = ()
    for n_tokens in (min(_TOKENS, max_length), min(_MAX_TOKENS, max_length)):
        found = _gradients(model, weights, n_tokens)
        if found is None:
            return False
        if all(gradient is not None for gradient in found):
            return True
        gradients = found
    reached = [t.name for t, g in zip(targets, gradients, strict=True) if g is not None]
    unreached = [t.name for t, g in zip(targets, gradients, strict=True) if g is None]
    names = list(dict.fromkeys(map(folded, unreached)))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    way = ",".join([*patterns, *exclusions(unreached, reached)])
    left = list(dict.fromkeys(folded(name).rpartition(".")[0] for name in reached))
    raise ModelError(
        f"the loss of a text never reaches {len(unreached)} of {len(targets)} target layers: "
        f"{', '.join(names[:8])}{more}. Give --proj_layers {way}"
        + (f" (it takes {', '.join(left[:4])})" if left else "")
    )


def _gradients(
    model: nn.Module, weights: list[nn.Parameter], n_tokens: int
) -> Sequence[Any] | None:
    """Return the gradient of each weight, None where there is none; None if the model fails."""
    model.to(torch.bfloat16).requires_grad_(False).eval()
    for weight in weights:
        weight.requires_grad_(True)
    ids = torch.zeros((2, n_tokens), dtype=torch.int64, device=weights[0].device)
    try:
        with one_sequence_a_row():
            logits = model(input_ids=ids, use_cache=False).logits
        return torch.autograd.grad(logits.float().sum(), weights, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a model cannot do on the meta device raises many types
        return None
