"""Dataclasses built from command-line flags and a flat TOML file; checks of their values.

A stage declares its settings as a frozen dataclass derived from ``Flags``::

    class BatchConfig(Flags, title="batches"):
        batch_size: int = flag("Largest number of sequences in a batch.", 256, minimum=1)

Bounds and choices are checked whenever the dataclass is built: from a command line, from a file or
in Python code.
"""

from gradproj.flags.declaration import (
    DEVICES,
    Flags,
    as_in,
    current_names,
    flag,
    flag_of,
    from_recorded,
    join_list,
    split_list,
    word_of,
)
from gradproj.flags.parsing import parse

__all__ = [
    "DEVICES",
    "Flags",
    "as_in",
    "current_names",
    "flag",
    "flag_of",
    "from_recorded",
    "join_list",
    "parse",
    "split_list",
    "word_of",
]
