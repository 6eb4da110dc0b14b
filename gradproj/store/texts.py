"""``ProjectionStore`` as ``from gradproj import ProjectionStore`` gives it: a store that can fetch its documents."""

import json
from collections.abc import Callable
from pathlib import Path

from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import load_index
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.paths import list_tars
from gradproj.errors import CorpusError, StoreError
from gradproj.store import ProjectionStore as RowStore


class ProjectionStore(RowStore):
    """The store's reader; ``samples(ids, text=True)`` reads texts from the tars that the job recorded.

    Args:
        path: the job's ``--output_dir``, or the ``projections.zarr`` in it.
        read_text: from a sample id to its text, in place of the tars.
    """

    def __init__(self, path: str | Path, read_text: Callable[[int], str] | None = None) -> None:
        super().__init__(path, read_text or RecordedTexts(Path(path)))

    def __repr__(self) -> str:
        return f"ProjectionStore({str(self.path)!r}: {len(self):,} rows of {self.dim:,} values)"


class RecordedTexts:
    """Texts by sample id, through ``corpus.json`` and the ``--shards`` of ``run_config.json``."""

    def __init__(self, path: Path) -> None:
        self._output = path.parent if path.name.endswith(".zarr") else path
        self._index: CorpusIndex | None = None

    def __call__(self, sample_id: int) -> str:
        """A document's text; what is wrong with it, or its token ids, where it has none.

        Raises:
            CorpusError: the tars are not where the job found them, or have changed.
        """
        if self._index is None:
            self._index = self._find()
        return text_of(self._index, sample_id)

    def _find(self) -> CorpusIndex:
        try:
            recorded = json.loads((self._output / "run_config.json").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self._output} does not say where its documents are: {error}"
            ) from error
        index = load_index(self._output / "corpus.json")
        # The index knows absolute paths; --shards as it was given may be relative to another folder.
        if all(tar.path.is_file() for tar in index.tars):
            return index
        try:
            return index.relocated(list_tars(recorded["shards"]))
        except CorpusError as error:
            raise CorpusError(
                f"the texts' tars are not where the job read them: {error}"
            ) from error


def text_of(index: CorpusIndex, sample_id: int) -> str:
    """A document's text; what is wrong with it, or its first token ids, where it has none."""
    (document,) = read_documents(index, sample_id, sample_id + 1)
    if document.text is not None:
        return document.text
    return (
        f"({document.problem})"
        if document.problem
        else f"token ids {(document.input_ids or [])[:50]}"
    )
