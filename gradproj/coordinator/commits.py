"""The interface through which one process publishes into its output.

``FileCommits`` is for a folder that all processes share, ``ObjectCommits`` for a bucket. Everything
else in this folder works through them, and does not know which it has.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.coordinator.heartbeats import Pace
from gradproj.coordinator.process_id import Owner
from gradproj.storage.publish import Publisher
from gradproj.store.layout import StoreLayout
from gradproj.store.unit_record import UnitRecord

Check = Callable[[], None]
"""Raises if the output was deleted or replaced by another store."""


@dataclass(frozen=True)
class UnitRows:
    """A computed unit in host memory, ready to be committed."""

    record: UnitRecord
    stored: np.ndarray | None
    """``(n, D)`` encoded rows; None if no row of the unit is stored."""
    hidden: np.ndarray | None = None
    """``(n, d)`` float16 hidden states; None without, or if no row of the unit is stored."""


class Commits(ABC):
    """Publishes for one process, and keeps those out whose claims it takes over."""

    publisher: Publisher
    pace: Pace
    """Times between heartbeats, and between looks at those of others."""

    def __init__(self, output: Path, owner: Owner) -> None:
        self.output, self.owner = output, owner

    @abstractmethod
    def begin(self) -> None:
        """Make what this process needs before it publishes anything."""

    @abstractmethod
    def end(self) -> None:
        """Delete what this process has not published."""

    @abstractmethod
    def create(self, final: Path, content: bytes, check: Check) -> bool:
        """Publish a file unless its name is taken.

        Returns:
            Whether it now has this content. ``check`` is called if the folder may be gone.
        """

    @abstractmethod
    def append(self, final: Path, content: bytes, check: Check) -> None:
        """Publish a file in a folder that other processes may delete at any time."""

    @abstractmethod
    def fence(self, old: Owner, check: Check) -> None:
        """Keep a process whose claim was taken over from publishing what it has prepared."""

    @abstractmethod
    def was_fenced(self) -> bool:
        """Return whether another process has fenced this one."""

    @abstractmethod
    def commit(
        self, rows: UnitRows, layout: StoreLayout, may_publish: Callable[[], bool], check: Check
    ) -> bool:
        """Publish a unit's shards, then its record.

        Args:
            rows: the unit. Sizes and checksums are added to its record.
            layout: the store's.
            may_publish: asked right before the first publication whether this process's claim is
                still the newest and the unit not recorded; calls ``check``.
            check: raises if the output is another one.

        Returns:
            Whether this process committed it.
        """

    @abstractmethod
    def forget(self, unit: int) -> None:
        """Delete what was prepared for a unit that is committed."""

    @abstractmethod
    def give_up(self, units: list[int], layout: StoreLayout) -> None:
        """Take the units' records away, under their claims: they are to be computed again.

        Raises:
            Outdated: another process gives one of them up, or commits it.
        """

    @abstractmethod
    def clean_up(self, unit: int, layout: StoreLayout) -> None:
        """Delete the shards of a unit that was given up, long after its record."""

    @abstractmethod
    def orphans(self, layout: StoreLayout, identity: str) -> list[int]:
        """Return the units that nobody can commit before a ``give_up``, because of their shards."""

    @abstractmethod
    def remove_leftovers(self, committed: set[int]) -> set[str]:
        """Delete what dead processes left unpublished.

        Returns:
            The names of those processes.
        """
