"""Whole gradients, exact factors and influences by plain autograd in float64, sample by sample."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class ExactModel:
    """A float64 copy of a model whose layers' inputs and output gradients are recorded."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = copy.deepcopy(model).double().requires_grad_(True), list(layers)

    def tokens(self, sequence: Tensor, first: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        """Return layer -> ``(a, g)`` of one sequence, ``(S, n_i)`` and ``(S, n_o)``."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for name in self.layers:

            def hook(module, args, output, name=name):
                output.retain_grad()
                seen[name] = (args[0], output)

            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
        self._loss(sequence, first).backward()
        for handle in handles:
            handle.remove()
        return {n: (a.detach()[0], output.grad[0]) for n, (a, output) in seen.items()}

    def gradient(self, sequence: Tensor, first: int = 1) -> dict[str, Tensor]:
        """Return layer -> the gradient of its weight, ``(n_o, n_i)``."""
        modules = [self.model.get_submodule(name) for name in self.layers]
        weights = [module.weight for module in modules]
        gradients = torch.autograd.grad(self._loss(sequence, first), weights)
        return {
            name: g if isinstance(module, nn.Linear) else g.T
            for name, module, g in zip(self.layers, modules, gradients, strict=True)
        }

    def _loss(self, sequence: Tensor, first: int) -> Tensor:
        logits = self.model(input_ids=sequence[None], use_cache=False).logits[0]
        return nn.functional.cross_entropy(
            logits[first - 1 : -1], sequence[first:], reduction="sum"
        )

    def factors(self, sequences: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return layer -> ``(A, S)``, means over the sequences' target tokens."""
        n_tokens = sum(len(sequence) - 1 for sequence in sequences)
        sums: dict[str, list[Tensor]] = {}
        for sequence in sequences:
            for name, (a, g) in self.tokens(sequence).items():
                a, g = a[:-1], g[:-1]  # the last position has no target
                both = [a.T @ a / n_tokens, g.T @ g / n_tokens]
                sums[name] = [x + y for x, y in zip(sums.get(name, [0, 0]), both, strict=True)]
        return {name: (pair[0], pair[1]) for name, pair in sums.items()}


def damped(matrix: Tensor, c: float) -> Tensor:
    return matrix + c * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def kfac_scores(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    queries: Sequence[Mapping[str, Tensor]],
    documents: Sequence[Mapping[str, Tensor]],
    c: float,
) -> Tensor:
    """Return ``<G_q, (S + d)^-1 G_d (A + d)^-1>`` summed over layers, ``(Q, N)``."""
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for name, (a, s) in factors.items():
        a_inverse, s_inverse = (torch.linalg.inv(damped(x, c)) for x in (a, s))
        for n, document in enumerate(documents):
            solved = s_inverse @ document[name] @ a_inverse
            for q, query in enumerate(queries):
                scores[q, n] += (query[name] * solved).sum()
    return scores


def ekfac_scores(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    sample: Sequence[Mapping[str, Tensor]],
    n_tokens: int,
    queries: Sequence[Mapping[str, Tensor]],
    documents: Sequence[Mapping[str, Tensor]],
    c: float,
) -> Tensor:
    """Return the same with the sample gradients' second moments in the factors' eigenbasis."""
    scores = torch.zeros(len(queries), len(documents), dtype=torch.float64)
    for name, (a, s) in factors.items():
        u_i, u_o = (torch.linalg.eigh(x)[1] for x in (a, s))
        moments = sum((u_o.T @ each[name] @ u_i) ** 2 for each in sample) / n_tokens
        inverse = 1 / (moments + c * moments.mean())
        for n, document in enumerate(documents):
            solved = inverse * (u_o.T @ document[name] @ u_i)
            for q, query in enumerate(queries):
                scores[q, n] += ((u_o.T @ query[name] @ u_i) * solved).sum()
    return scores
