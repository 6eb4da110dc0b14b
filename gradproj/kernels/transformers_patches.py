"""A temporary change of a function of transformers, undone when its context ends."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

_FIND = "find_packed_sequence_indices"


class _ThreadState(threading.local):
    """Not a context variable: ``torch.compile`` reads this without a graph break."""

    one_sequence_a_row = False


_STATE = _ThreadState()
_lock = threading.Lock()
_n_contexts = 0
_is_installed = False
"""Stays True if another library has wrapped our function meanwhile: its wrapper still calls it."""
_replaced: Callable[..., Any] = getattr(masking_utils, _FIND, lambda *_, **__: None)


@functools.wraps(_replaced)
def _find_unless_known(*args: Any, **kwargs: Any) -> Any:
    return None if _STATE.one_sequence_a_row else _replaced(*args, **kwargs)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that this thread's rows are not packed, in passes without position ids.

    Without a mask or a cache, transformers looks for several sequences in one row: it reads the
    position ids back to the host in every forward pass, for which a GPU stands still. A model
    that counts the positions itself cannot have packed rows. Other threads are not affected.
    """
    with _find_replaced():
        before, _STATE.one_sequence_a_row = _STATE.one_sequence_a_row, True
        try:
            yield
        finally:
            _STATE.one_sequence_a_row = before


@contextmanager
def _find_replaced() -> Iterator[None]:
    """Replace transformers' function, until the last of all threads' contexts ends."""
    global _n_contexts, _is_installed, _replaced
    with _lock:
        # A release of transformers without this function does not look for packed rows.
        current = getattr(masking_utils, _FIND, None)
        # A function that wraps ours must not become the one that ours calls.
        if _n_contexts == 0 and current and (not _is_installed or current is _replaced):
            _replaced, _is_installed = current, True
            setattr(masking_utils, _FIND, _find_unless_known)
        _n_contexts += 1
    try:
        yield
    finally:
        with _lock:
            _n_contexts -= 1
            if _n_contexts == 0 and getattr(masking_utils, _FIND, None) is _find_unless_known:
                setattr(masking_utils, _FIND, _replaced)
                _is_installed = False
