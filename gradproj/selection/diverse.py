"""Choose documents that score high and differ from each other: maximal marginal relevance.

The candidates are the P best of a list. Relevance r is their score, scaled so that the best has 1
and the last candidate 0. The next choice is the candidate of the highest

    (1 - w) r(d) - w max over the chosen c of cos(d, c)

with cosines of the documents' rows and the weight w of the redundancy; the first is the best.

Source: Carbonell and Goldstein, "The use of MMR, diversity-based reranking" (SIGIR 1998).
"""

import numpy as np
import torch

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.row_blocks import chosen_layers
from gradproj.selection.score_lists import Chosen
from gradproj.store import ProjectionStore

_ROWS_AT_ONCE = 1024


def cosines_of(
    store: ProjectionStore, ids: np.ndarray, layers: list[str] | None = None
) -> np.ndarray:
    """Return the cosines of rows, ``(n, n)`` float32, as ``--score cosine`` has them.

    The Gram matrix is summed layer by layer, so that memory holds it and one layer of the rows. A
    row of zeros has the cosine 0.
    """
    unweighted = Preconditioner.unweighted(store, layers) if has_weighted_rows(store) else None
    gram = torch.zeros(len(ids), len(ids))
    for name in chosen_layers(store, layers):
        rows = solved = torch.from_numpy(store.rows(ids, [name]))
        if unweighted is not None:
            weights = unweighted.for_layers([name]).to(rows.device, torch.float32)
            solved = torch.cat([weights.solve(part) for part in rows.split(_ROWS_AT_ONCE)])
        gram.addmm_(rows, solved.T)
    inverse = gram.diagonal().sqrt().reciprocal()
    inverse[inverse.isinf()] = 0
    return gram.mul_(inverse).mul_(inverse[:, None]).numpy()


def diverse(
    pool: Chosen, cosines: np.ndarray, weight: float, costs: np.ndarray, budget: int
) -> np.ndarray:
    """Choose from candidates one after the other; return their positions in the order of choice.

    Args:
        pool: the candidates, best first.
        cosines: of the candidates, ``(P, P)``.
        weight: w above, 0 to 1.
        costs: what each takes of the budget, ``(P,)``; the choice ends at the first candidate that
            exceeds it.
        budget: in the unit of the costs.
    """
    scores = np.abs(pool.scores.astype(np.float64) - pool.scores[-1])
    relevance = (1 - weight) * scores / (scores[0] or 1)
    nearest = np.zeros(len(pool))
    waiting = np.ones(len(pool), bool)
    places: list[int] = []
    while waiting.any():
        value = np.where(waiting, relevance - weight * nearest, -np.inf)
        place = int(value.argmax())  # the first of equal ones: that of the better score
        budget -= int(costs[place])
        if budget < 0:
            break
        nearest = np.maximum(nearest, cosines[place]) if places else cosines[place].astype(float)
        places.append(place)
        waiting[place] = False
    return np.array(places, np.int64)
