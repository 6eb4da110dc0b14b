"""First-order in-run data Shapley values of a training run, and a table of them.

A step of size ``lr`` along a sample's gradient lowers the validation loss by
``lr <g_sample, g_validation>`` to first order. To first order this is the sample's Shapley value
among those of its batch (In-Run Data Shapley, arXiv:2406.11011). Summed over the run, it is the
part of the loss's fall, in nats, that the document contributed: positive helped, negative hurt. It
describes plain gradient steps; for Adam it is a guide only.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

EXCERPT_CHARACTERS = 60


def learning_rates(source: Any, parameters: list[nn.Parameter]) -> Tensor:
    """Return each parameter's current learning rate, float64.

    The source is a number, a function that returns one, an optimizer (0 for parameters that are not
    in it), or None for NaN.
    """
    if isinstance(source, torch.optim.Optimizer):
        rates = {p: float(group["lr"]) for group in source.param_groups for p in group["params"]}
        return torch.tensor([rates.get(p, 0.0) for p in parameters], dtype=torch.float64)
    rate = source() if callable(source) else source
    rate = float("nan") if rate is None else float(rate)
    return torch.full((len(parameters),), rate, dtype=torch.float64)


def value_table(
    values: Mapping[int, float],
    domain_of: Callable[[int], str],
    excerpt_of: Callable[[int], str],
    n_shown: int = 5,
) -> str:
    """Return the most and least valuable documents of every domain, as Markdown.

    Args:
        values: sample id -> nats, from ``GradDotProdEngine.shapley_values``.
        domain_of: sample id -> its domain's name.
        excerpt_of: sample id -> the beginning of its text.
        n_shown: most documents at either end; no document is at both.

    Returns:
        A table of the domains by mean value, then one of documents for each domain, in that order.
    """
    domains: dict[str, list[int]] = defaultdict(list)
    for sample_id in values:
        domains[domain_of(sample_id)].append(sample_id)
    means = {name: float(np.mean([values[i] for i in ids])) for name, ids in domains.items()}
    order = sorted(domains, key=lambda name: (-means[name], name))
    lines = [
        "| domain | documents | mean value (nats) | sum (nats) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in order:
        total = means[name] * len(domains[name])
        counts = f"{len(domains[name]):,} | {means[name]:+.3e} | {total:+.3e}"
        lines.append(f"| {_cell(name)} | {counts} |")
    for name in order:
        ranked = sorted(domains[name], key=lambda i: (-values[i], i))
        lines += ["", f"### {_cell(name)}", "", "| value (nats) | sample | text |"]
        lines += ["| ---: | ---: | --- |"]
        if len(ranked) > 2 * n_shown:
            ranked = ranked[:n_shown] + ranked[len(ranked) - n_shown :]
        lines += [f"| {values[i]:+.3e} | {i} | {_cell(excerpt_of(i))} |" for i in ranked]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    line = " ".join(text[: 4 * EXCERPT_CHARACTERS].split())
    shown = line if len(line) <= EXCERPT_CHARACTERS else line[: EXCERPT_CHARACTERS - 1] + "…"
    return shown.replace("|", "\\|")
