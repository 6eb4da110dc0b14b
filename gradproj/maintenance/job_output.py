"""OUTPUT as a person's commands find it on disk: what its store is, which units are wanted, which are committed."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from gradproj.coordinator.merge import ranges_of, wanted_units
from gradproj.errors import StoreError
from gradproj.store.layout import StoreLayout
from gradproj.store.metadata import find_store, read_attributes, read_layout
from gradproj.store.unit_record import list_records

MOST_RANGES_SHOWN = 20
LINE_EVERY_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True)
class Output:
    """A job's output folder at one moment. Reading it writes nothing and needs no model."""

    path: Path
    store: Path
    """``path/projections.zarr``."""
    attributes: dict[str, Any]
    layout: StoreLayout
    wanted: np.ndarray
    """Units that the job computes, sorted int64."""
    recorded: np.ndarray
    """Units that have a record, sorted int64; wanted or not."""

    @property
    def identity_hash(self) -> str:
        """What every record of this output carries."""
        return self.attributes["identity_hash"]

    @property
    def committed(self) -> np.ndarray:
        """Wanted units that have a record, sorted."""
        return np.intersect1d(self.wanted, self.recorded, assume_unique=True)

    @property
    def missing(self) -> np.ndarray:
        """Wanted units without a record, sorted."""
        return np.setdiff1d(self.wanted, self.recorded, assume_unique=True)

    @property
    def is_merged(self) -> bool:
        """Whether the columns and sums were made from the records of every wanted unit."""
        return bool(self.attributes.get("complete"))

    def wants(self, unit: int) -> bool:
        """Whether a unit is one of those that the job computes."""
        at = int(np.searchsorted(self.wanted, unit))
        return at < len(self.wanted) and int(self.wanted[at]) == unit

    def n_samples_in(self, units: np.ndarray) -> int:
        """Documents of sorted units; the last unit may be short."""
        layout = self.layout
        short = layout.n_units * layout.rows_per_shard - layout.n_samples
        return len(units) * layout.rows_per_shard - short * bool(
            len(units) and units[-1] == layout.n_units - 1
        )

    def n_documents(self, unit: int) -> int:
        """Documents of one unit that the job wants; 0 of any other."""
        return self.n_samples_in(np.array([unit], np.int64)) if self.wants(unit) else 0

    def id_ranges(self, units: np.ndarray) -> list[list[int]]:
        """Sorted units as ``[start, stop)`` ranges of sample ids."""
        height, last = self.layout.rows_per_shard, self.layout.n_samples
        return [[first * height, min(stop * height, last)] for first, stop in ranges_of(units)]


def read_output(path: str | Path) -> Output:
    """Look at OUTPUT (or the ``projections.zarr`` in it).

    Raises:
        StoreError: there is no store, a newer gradproj made it, or it is not a job's.
    """
    store = find_store(path)
    attributes, layout = read_attributes(store), read_layout(store)
    if "wanted_units" not in attributes or "identity_hash" not in attributes:
        if (store / "sample_id").is_dir():
            raise StoreError(
                f"{store} is a training run's store: it has rows in the order seen and no units to follow. Read it "
                "with gradproj.ProjectionStore; how far the run is says its loss.csv"
            )
        raise StoreError(
            f"{store} is a store but not a job's output: it does not say which units it wants. "
            "Give the --output_dir of `python -m gradproj.run`"
        )
    wanted = wanted_units(attributes)
    return Output(store.parent, store, attributes, layout, wanted, list_records(store.parent / "units"))


def ranges_text(ranges: Sequence[Sequence[int]], most: int = MOST_RANGES_SHOWN) -> str:
    """``[start, stop)`` ranges as ``0-15, 32``, both ends included; at most so many of them."""
    named = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in ranges[:most]]
    if len(ranges) > most:
        named.append(f"and {len(ranges) - most:,} more ranges")
    return ", ".join(named)


def count(n: int, what: str) -> str:
    """``1 unit``, ``2 units``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def shown(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """``items``, with their progress on standard error: a bar on a terminal, else a line every 10 s."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True)
        return
    started = shown_at = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown_at >= LINE_EVERY_S:
            shown_at = now
            left_s = (now - started) * (total - done) / done
            print(
                f"{label}: {done:,} of {total:,} {unit} ({100 * done / total:.1f} %), about {left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
