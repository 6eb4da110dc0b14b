"""Reads the hidden states of a store."""

from collections.abc import Callable
from pathlib import Path

from gradproj.errors import StoreError
from gradproj.store.hidden_rows import UnscaledColumns
from gradproj.store.hidden_states import HIDDEN_STATE, hidden_layout
from gradproj.store.layout import LayerSlice
from gradproj.store.reader import ProjectionStore
from gradproj.store.row_reader import Rows


class HiddenStates(ProjectionStore):
    """The hidden states of a store, read and scored as its rows are.

    ``rows(ids)`` is ``(n, d)`` float32, NaN for documents of another status than ok. The functions
    of ``gradproj.analysis`` take it in place of the store, with the scores ``dot`` and ``cosine``
    and hidden states as queries.

    Args:
        path: as for ``ProjectionStore``.
        read_text: as for ``ProjectionStore``.

    Raises:
        StoreError: there is no store, or none with hidden states.
    """

    def __init__(self, path: str | Path, read_text: Callable[[int], str] | None = None) -> None:
        super().__init__(path, read_text)
        layout = hidden_layout(self.layout)
        if layout is None:
            raise StoreError(
                f"{self.path} has no hidden states: its job ran without --hidden_state mean (or "
                "last), and takes it in another --output_dir only"
            )
        self.layout, d = layout, layout.dim
        self.layers = [LayerSlice(HIDDEN_STATE, "hidden", d, 1, d, 1, 0, d)]
        # Basis, head and loss reduction are the rows'.
        kept = ("store_id", "identity_hash", "wanted_units", HIDDEN_STATE)
        self.attributes = {name: self.attributes[name] for name in kept if name in self.attributes}
        self._columns = UnscaledColumns(self.path, layout, self._maps)
        self._rows = Rows(self.path, layout, self._columns, self._maps)
