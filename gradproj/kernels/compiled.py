"""Loops compiled by numba for the CPU."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher


class _OptionalCache(FunctionCache):
    """A cache that may fail: its folder can be full, or another user's."""

    def load_overload(self, *args: Any) -> Any:
        try:
            return super().load_overload(*args)
        except OSError:
            return None

    def save_overload(self, *args: Any) -> None:
        with suppress(OSError):
            super().save_overload(*args)


def compiled(*signatures: Any, **settings: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a loop, which then runs without Python's lock.

    The machine code is kept in a folder if numba finds one that it can write to. With signatures it
    is compiled at once, else at the first call. ``settings`` are those of ``numba.njit``.
    """

    def compile_it(function: Callable[..., Any]) -> Any:
        loop = njit(nogil=True, **settings)(function)
        if not isinstance(loop, Dispatcher):  # NUMBA_DISABLE_JIT
            return loop
        with suppress(RuntimeError, OSError):  # no folder can be written to
            loop._cache = _OptionalCache(function)  # type: ignore[attr-defined]
        for signature in signatures:
            loop.compile(signature)
        if signatures:
            loop.disable_compile()
        return loop

    return compile_it
