"""Tells transformers that a batch's rows are not packed, which it would otherwise ask the device in every forward pass.

Where a model gets neither a mask nor a cache, transformers looks for several sequences in one row by reading its
position ids back, and a GPU then stands still until the host has made the next kernels ready.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


class _Known(threading.local):
    """Not a context variable: ``torch.compile`` reads this one without a break in its graph."""

    one_sequence_a_row = False


_KNOWN = _Known()


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """For forward passes without ``position_ids``: the model counts them from 0 itself, so that no row is packed.

    Only for the calling thread: a model that runs packed rows in another is asked as ever.
    """
    before, _KNOWN.one_sequence_a_row = _KNOWN.one_sequence_a_row, True
    try:
        yield
    finally:
        _KNOWN.one_sequence_a_row = before


def _answer_where_known(name: str) -> None:
    """Put the answer before transformers' own function; a release without that function asks for nothing."""
    ask = getattr(masking_utils, name, None)
    if ask is None:
        return

    @functools.wraps(ask)
    def find(*args: Any, **kwargs: Any) -> Any:
        return None if _KNOWN.one_sequence_a_row else ask(*args, **kwargs)

    setattr(masking_utils, name, find)


_answer_where_known("find_packed_sequence_indices")
