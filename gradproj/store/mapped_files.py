"""Memory-mapped files of a store, a bounded number of them at a time."""

import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import RLock
from typing import Generic, TypeVar

from gradproj.errors import StoreError

K = TypeVar("K")
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """The last few things that were loaded, by key. What could not be loaded (None) is asked for again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: dict[K, V] = {}
        self._lock = RLock()  # a store may be read by several threads

    def get(self, key: K, load: Callable[[], V | None]) -> V | None:
        with self._lock:
            item = self._items.pop(key, None)
            if item is None:
                item = load()
            if item is not None:
                self._items[key] = item
                while len(self._items) > self._limit:
                    del self._items[next(iter(self._items))]
            return item

    def drop(self, keys: Iterable[K]) -> None:
        with self._lock:
            for key in keys:
                self._items.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._items.clear()

    def __contains__(self, key: K) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)


def map_file(path: Path) -> mmap.mmap | None:
    """A read-only map of a file; None when there is no such file."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        return None
    except ValueError as error:  # an empty file cannot be mapped
        raise damaged(path, "it is empty") from error


def damaged(path: Path, what: str) -> StoreError:
    return StoreError(
        f"{path} is damaged: {what}. Run `python -m gradproj verify` on the output to see all damage"
    )
