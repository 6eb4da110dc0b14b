"""Hidden states of queries, as the job stores those of documents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.batching import Batch
from gradproj.engine.hidden_states import hidden_width
from gradproj.job.hidden_sums import HiddenSums
from gradproj.model.sequences import TokenSequence, targets_by_owner
from gradproj.store import HiddenStates, ProjectionStore
from gradproj.store.hidden_states import HIDDEN_STATE

HIDDEN = "hidden"
"""``--score``: the cosine of two hidden states about their mean."""
MEANING = (
    "cosine of the hidden states of query and document, from -1 to 1, after the documents' mean is "
    "subtracted: how alike the model represents them, no prediction of what training does"
)


def kind_of(store: ProjectionStore) -> str:
    """Return the ``--hidden_state`` of a store's job."""
    attribute = store.attributes.get(HIDDEN_STATE)
    return str(attribute.get("kind")) if isinstance(attribute, dict) else "none"


class QueryStates:
    """The hidden states of queries while they run; none for a store without any."""

    def __init__(
        self, kind: str, model: nn.Module, sequences: Sequence[TokenSequence], n_queries: int
    ) -> None:
        self._model, self._sums = model, None
        self._owners = np.array([sequence.owner for sequence in sequences], np.int64)
        self._device = next(model.parameters()).device
        if kind != "none":
            lengths, n_tokens = list(map(len, sequences)), targets_by_owner(sequences, n_queries)
            made = kind, hidden_width(model), self._owners, lengths, n_tokens
            self._sums = HiddenSums(*made, self._device)

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[list[Tensor]]:
        """Yield a list that gets the batch's part of the sums, if there are any."""
        if self._sums is None:
            yield []
            return
        with self._sums.watching(self._model, batch) as states:
            yield states

    def add(self, chosen: np.ndarray, states: list[Tensor]) -> None:
        """Add the parts of the sequences ``chosen``."""
        for part in states:
            assert self._sums is not None
            index = torch.from_numpy(self._owners[chosen]).to(self._device)
            self._sums.add(index, part)

    def finished(self) -> np.ndarray | None:
        """Return ``(Q, d)`` float32, rounded as the store rounds; None without."""
        return None if self._sums is None else self._sums.finished().float().cpu().numpy()


def states_of_store(
    queries: ProjectionStore, store: ProjectionStore, ids: np.ndarray
) -> np.ndarray | None:
    """Return the hidden states of a query store's documents; None unless both have the same."""
    if kind_of(queries) != kind_of(store) or not queries.layout.hidden_width:
        return None
    with HiddenStates(queries.path) as hidden:
        return hidden.rows(ids)
