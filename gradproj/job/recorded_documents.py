"""Documents of a store by their ids, read from their tars and tokenized as the job did."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from gradproj.corpus.documents import Document
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_documents
from gradproj.errors import StoreError
from gradproj.job.config import RunConfig
from gradproj.job.unit_reader import UnitReader, UnitSettings
from gradproj.model.sequences import TokenSequence
from gradproj.model.token_texts import TokenTexts
from gradproj.store import ProjectionStore

_Made = TypeVar("_Made")


class RecordedDocuments:
    """Reads documents that have rows.

    Args:
        store: of the job.
        run: its settings.
        tokenizer: its model's.
        vocabulary: number of token ids that the model has.
        index: where the documents are now (``recorded_index``).
    """

    def __init__(
        self,
        store: ProjectionStore,
        run: RunConfig,
        tokenizer: Any,
        vocabulary: int,
        index: CorpusIndex,
    ) -> None:
        self._store, self._index = store, index
        settings = UnitSettings(
            store.layout, store.attributes["identity_hash"], run.batch, run.model.special_tokens,
            vocabulary, self._index.domains, run.corpus.chosen_domains, run.limits, run.rules,
        )  # fmt: skip
        self._reader = UnitReader(self._index, tokenizer, settings)

    def sequences(self, sample_ids: np.ndarray) -> list[TokenSequence]:
        """Return the documents' sequences; an owner is its document's place in the ids.

        Raises:
            CorpusError: a tar is missing or has changed.
            StoreError: a document has no target token now.
        """
        return _owned(self._each(sample_ids, self._reader.sequences_of))

    def with_texts(
        self,
        sample_ids: np.ndarray,
        most: int,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[np.ndarray, list[TokenSequence], list[TokenTexts]]:
        """Return the ids of documents of at most ``most`` tokens, their sequences, and texts.

        The sequences have ``places``, and an owner is its document's place in the returned ids; the
        texts are what its tokens stand for. ``turn`` is entered around each use of the tokenizer.
        Raises as ``sequences``.
        """

        def make(document: Document) -> tuple[list[TokenSequence], TokenTexts]:
            with turn():
                return self._reader.with_texts(document)

        made = self._each(sample_ids, make)
        fits = np.array([sum(map(len, sequences)) <= most for sequences, _ in made], bool)
        kept = [each for each, fit in zip(made, fits, strict=True) if fit]
        return sample_ids[fits], _owned([x for x, _ in kept]), [texts for _, texts in kept]

    def _each(self, sample_ids: np.ndarray, make: Callable[[Document], _Made]) -> list[_Made]:
        made = []
        for sample_id in sample_ids.tolist():
            (document,) = read_documents(
                self._index, sample_id, sample_id + 1, self._reader.settings.limits
            )
            found = make(document)
            if not (found[0] if isinstance(found, tuple) else found):
                raise StoreError(
                    f"{self._store.path} is damaged: it has a row of document {sample_id}, which "
                    "has no target token"
                )
            made.append(found)
        return made


def _owned(of_each: list[list[TokenSequence]]) -> list[TokenSequence]:
    return [each.owned_by(place) for place, some in enumerate(of_each) for each in some]
