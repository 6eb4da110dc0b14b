"""Rules by which one list, or several lists in turn, choose documents within a budget."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradproj.selection.score_lists import Chosen, ScoreLists, Weights, one_each

_STEP_MIN, _STEPS_MAX = 2**10, 2**22
"""Documents that a list sorts at a time: least of one list, most of all together."""


@dataclass(frozen=True)
class Picks:
    """The selection, best first."""

    chosen: Chosen
    list_of: np.ndarray
    """``(n,)`` int64: the list that chose each document."""
    n_shared: int = 0
    """Documents that a further list chose too (``per_query``)."""


def best(lists: ScoreLists, budget: int, weights: Weights = one_each) -> Picks:
    """Choose the best of the only list."""
    chosen = lists.first(0, budget, weights)
    return Picks(chosen, np.zeros(len(chosen), np.int64))


def per_query(lists: ScoreLists, budget: int, weights: Weights = one_each) -> Picks:
    """Let each list choose its best by an equal share of the budget.

    The first of each list come first, then the second, and so on; a document that several chose
    stands where it comes first. If the budget is no multiple of the lists, the first ones have one
    more.
    """
    share, n_more = divmod(budget, len(lists))
    parts = [
        lists.first(number, share + (number < n_more), weights) for number in range(len(lists))
    ]
    ids = np.concatenate([part.ids for part in parts])
    place = np.concatenate([np.arange(len(part)) for part in parts])
    list_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((list_of, place))
    _, first = np.unique(ids[order], return_index=True)
    order = order[np.sort(first)]
    chosen = Chosen(ids, np.concatenate([part.scores for part in parts]))
    return Picks(chosen[order], list_of[order], len(ids) - len(order))


def round_robin(lists: ScoreLists, budget: int, weights: Weights = one_each) -> Picks:
    """Let the lists choose in turn, each its best document that no list has chosen yet.

    It ends at the first document that exceeds the budget. A list without further documents is left
    out. Chosen documents are no longer allowed in ``lists``.
    """
    step = max(_STEP_MIN, min(2 * budget // len(lists), _STEPS_MAX // len(lists)))
    ids: list[int] = []
    scores: list[float] = []
    list_of: list[int] = []
    for number, (sample_id, score) in _in_turn(lists, step):
        budget -= int(weights(sample_id, sample_id + 1)[0])
        if budget < 0:
            break
        ids.append(sample_id)
        scores.append(score)
        list_of.append(number)
    chosen = Chosen(np.array(ids, np.int64), np.array(scores, np.float32))
    return Picks(chosen, np.array(list_of, np.int64))


def _in_turn(lists: ScoreLists, step: int) -> Iterator[tuple[int, tuple[int, float]]]:
    """Yield list and ``(id, score)`` of each choice, without end before all lists have ended."""
    waiting = dict(enumerate(lists.ranked(number, step) for number in range(len(lists))))
    while waiting:
        for number in list(waiting):
            pick = next(waiting[number], None)
            if pick is None:
                del waiting[number]
                continue
            lists.allowed[pick[0]] = False
            yield number, pick
