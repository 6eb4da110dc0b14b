"""Temporary changes of transformers' functions, undone when nothing needs them any more."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils

_FIND = "find_packed_sequence_indices"


class Replacement:
    """A function in the place of another library's, from the first ``begin`` to the last ``end``.

    Args:
        function: the replacement. It passes on to ``original`` what it does not handle.
        get: returns the function that is in place now; None if there is none to replace.
        put: puts a function in place.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        get: Callable[[], Callable[..., Any] | None],
        put: Callable[[Callable[..., Any]], None],
    ) -> None:
        self._function, self._get, self._put = function, get, put
        self.original: Any = get()
        self._lock = threading.Lock()
        self._n_users = 0
        # Stays True if a third library has wrapped ours meanwhile: its wrapper still calls ours.
        self._is_in_place = False

    def begin(self) -> None:
        with self._lock:
            current = self._get()
            # A function that wraps ours must not become the one that ours calls.
            is_ours = self._is_in_place and current is not self.original
            if self._n_users == 0 and current is not None and not is_ours:
                self.original, self._is_in_place = current, True
                self._put(self._function)
            self._n_users += 1

    def end(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0 and self._get() is self._function:
                self._put(self.original)
                self._is_in_place = False


class _ThreadState(threading.local):
    """Not a context variable: ``torch.compile`` reads this without a graph break."""

    one_sequence_a_row = False


_STATE = _ThreadState()


def _find_unless_known(*args: Any, **kwargs: Any) -> Any:
    return None if _STATE.one_sequence_a_row else _SEARCH.original(*args, **kwargs)


_SEARCH = Replacement(
    _find_unless_known,
    # A release of transformers without this function does not look for packed rows.
    functools.partial(getattr, masking_utils, _FIND, None),
    functools.partial(setattr, masking_utils, _FIND),
)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that this thread's rows are not packed, in passes without position ids.

    Without a mask or a cache, transformers looks for several sequences in one row: it reads the
    position ids back to the host in every forward pass, for which a GPU stands still. A model
    that counts the positions itself cannot have packed rows. Other threads are not affected.
    """
    _SEARCH.begin()
    before, _STATE.one_sequence_a_row = _STATE.one_sequence_a_row, True
    try:
        yield
    finally:
        _STATE.one_sequence_a_row = before
        _SEARCH.end()
