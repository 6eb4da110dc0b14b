"""An input as its reader is given it, and the records that a reader yields."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE_FIELD = "file"
"""Field with which a document of token ids names its file."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line, row or file of an input."""

    place: str
    """Position in the input, for messages: ``line 7``."""
    value: Any = None
    problem: str | None = None
    """The reason if ``value`` could not be read."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Rules for a file that holds nothing but token ids."""

    dtype: str = ""
    """Of bare numbers; empty if not known."""
    boundary: int | None = None
    """Id of the token between documents."""
    boundary_ends: bool = True
    """Whether it ends a document; else it begins the next one."""

    @property
    def boundary_flag(self) -> str:
        """The flag that gave the id."""
        return "--end_of_document" if self.boundary_ends else "--start_of_document"


@dataclass
class InputReader:
    """An input, what to read from it, and the position reached."""

    location: str
    fields: tuple[str, ...] = ()
    """Top-level names to read, whatever their type. Other nested or binary columns are skipped."""
    token_rules: TokenRules = field(default_factory=TokenRules)
    anonymous: bool = False
    """Read remote inputs without credentials."""
    position: Callable[[], int] = lambda: 0
    """Returns the bytes of the file read so far. Set by the reader, valid between two records."""

    def document(
        self, number: int, ids: NDArray[np.integer], labels: NDArray[np.integer] | None = None
    ) -> Record:
        """Return the record of a document of token ids, with its file's name if that is asked."""
        value: dict[str, Any] = {"input_ids": ids}
        if labels is not None:
            value["labels"] = labels
        if FILE_FIELD in self.fields:
            value[FILE_FIELD] = Path(self.location).name
        return Record(f"document {number}", value)
