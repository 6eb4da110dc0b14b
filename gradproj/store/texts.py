"""Document texts by sample id, read from the tars that a job recorded in its output directory."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradproj.corpus.content import TokenIds
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import load_index
from gradproj.corpus.tar.paths import INDEX_NAME, list_tars
from gradproj.corpus.tar.places import are_in_place
from gradproj.errors import CorpusError, StoreError
from gradproj.storage.cache import cache_of
from gradproj.store.layout import RUN_CONFIG_NAME, STORE_NAME
from gradproj.store.metadata import read_attributes

DOCUMENT_FORMS = "document_forms"
"""Attribute of a job's store whose documents are read in every form. A store of an earlier version
has it not: it read texts and token ids alone, and is continued so."""


def output_index(output: Path) -> CorpusIndex:
    """Return an output's own index, which reads documents as the output's job does."""
    forms = DOCUMENT_FORMS in read_attributes(output / STORE_NAME)
    try:
        recorded = _run_config(output)
    except (OSError, ValueError):  # a store's other parts can be read without
        recorded = {}
    cache = cache_of(recorded.get("cache_dir", ""), recorded.get("cache_gb", 0))
    return replace(load_index(output / INDEX_NAME), texts_only=not forms, cache=cache)


def _run_config(output: Path) -> dict[str, Any]:
    return json.loads((output / RUN_CONFIG_NAME).read_text())


class RecordedTexts:
    """Read texts through ``corpus.json`` and the ``--shards`` of ``run_config.json``.

    This is the default ``read_text`` of ``ProjectionStore``. Nothing is opened before the first
    call.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._index: CorpusIndex | None = None

    def __call__(self, sample_id: int) -> str:
        """Return a document's text, as ``text_of`` does.

        Raises:
            StoreError: the output directory does not record where its documents are.
            CorpusError: the tars are not where the job found them, or have changed.
        """
        if self._index is None:
            self._index = self._find_index()
        return text_of(self._index, sample_id)

    def _find_index(self) -> CorpusIndex:
        try:
            config = _run_config(self._output)
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self._output} does not record where its documents are ({error}). Open the store "
                "with ProjectionStore(path, read_text=...), a function from a sample id to its text"
            ) from error
        index = output_index(self._output)
        # The index has absolute paths; --shards may be relative to another working directory.
        if are_in_place(index.tars):
            return index
        try:
            shards, anonymous = config["shards"], config.get("anonymous", False)
            return index.relocated(list_tars(shards, anonymous=anonymous))
        except CorpusError as error:
            raise CorpusError(
                f"the texts' tars are not where the job read them: {error}"
            ) from error


def text_of(index: CorpusIndex, sample_id: int) -> str:
    """Return a document's text; if it has none, its problem or its first token ids."""
    # webdataset imports torch, which a reader of rows should not wait for.
    from gradproj.corpus.stream import read_documents

    (document,) = read_documents(index, sample_id, sample_id + 1)
    if document.problem:
        return f"({document.problem})"
    if isinstance(document.content, TokenIds) and not document.text:
        return f"token ids {list(map(int, document.content.ids[:50]))}"
    return document.text
