"""Scores of hidden states: cosines of their differences from the documents' mean.

That mean is most of every text's hidden state, so that plain cosines are all near 1.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.query_sets import QuerySets
from gradproj.analysis.row_blocks import Block, rank_range, scan_blocks, scan_world
from gradproj.analysis.score_blocks import Blocks
from gradproj.analysis.score_stream import Part, ScoreStream
from gradproj.distributed import World
from gradproj.kernels.device_copy import to_device
from gradproj.store import HiddenStates


def mean_state(hidden: HiddenStates, device: torch.device, world: World | None = None) -> Tensor:
    """Return the mean of all documents' hidden states, ``(d,)`` float64; the ranks share a scan."""
    world = world or World()
    start, stop = rank_range(hidden, world)
    total = torch.zeros(hidden.dim + 1, dtype=torch.float64, device=device)
    for block in scan_blocks(hidden, device=device, start=start, stop=stop):
        there = _has_state(block)
        total[:-1] += torch.where(there[:, None], block.rows, 0.0).sum(dim=0, dtype=torch.float64)
        total[-1] += there.sum()
    total = world.sum(total)
    return total[:-1] / total[-1].clamp_min(1)


def hidden_stream(
    hidden: HiddenStates,
    queries: np.ndarray,
    domains: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    together: bool = False,
    progress: bool = False,
    sets: QuerySets | None = None,
) -> ScoreStream:
    """Return all documents' scores for the hidden states of queries, ``(Q, d)``, in bounded memory.

    The documents are scanned once here, for their mean, and once by the stream. A document without
    a state, or of another domain, has NaN. Arguments: see ``ScanOptions``.
    """
    device, world = torch.device(device), scan_world(together)
    mean = mean_state(hidden, device, world).float()
    asked = _directions(to_device(torch.from_numpy(queries).float(), device) - mean)
    n_scores = len(queries) if sets is None else len(sets)
    if sets is not None:
        directions, ones = asked.cpu().double(), np.ones(len(queries))
        rows = sets.rows(lambda chosen: (directions[chosen], ones[chosen]), hidden.dim)
        asked = to_device(torch.cat(list(rows)).float(), device)
    start, stop = rank_range(hidden, world)
    label = "scores" if progress and world.rank == 0 else None

    def blocks() -> Blocks:
        for block in scan_blocks(hidden, None, domains, device, label, start=start, stop=stop):
            scores = asked @ _directions(block.rows - mean).T
            scores = scores if sets is None else sets.scores(scores)
            yield block.first, scores.masked_fill(~_has_state(block), torch.nan)

    return ScoreStream([Part(n_scores, blocks)], len(hidden), world, device)


def _has_state(block: Block) -> Tensor:
    """Return which documents of a block are scored, ``(n,)`` bool; float16 did not hold some."""
    ok = to_device(torch.from_numpy(block.ok), block.rows.device)
    return ok & block.rows[:, 0].isfinite()


def _directions(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states, dim=1)
