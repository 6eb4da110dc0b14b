"""An output directory as commands see it on disk: its store, its wanted and its committed units."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.coordinator.merge import ranges_of, wanted_units
from gradproj.errors import StoreError
from gradproj.store.layout import UNITS_DIR, StoreLayout
from gradproj.store.metadata import find_store, read_attributes, read_layout
from gradproj.store.unit_record import list_records


@dataclass(frozen=True)
class Output:
    """A job's output directory at one moment. Reading it writes nothing and needs no model."""

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
        """Hash of the settings, which every record of this output carries."""
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

    @property
    def is_complete(self) -> bool:
        """Whether every wanted unit is committed and merged."""
        return not len(self.missing) and self.is_merged

    def wants(self, unit: int) -> bool:
        """Return whether the job computes a unit."""
        at = int(np.searchsorted(self.wanted, unit))
        return at < len(self.wanted) and int(self.wanted[at]) == unit

    def n_documents(self, unit: int) -> int:
        """Return the number of documents of a wanted unit; 0 for any other unit."""
        return self.layout.n_samples_in(np.array([unit], np.int64)) if self.wants(unit) else 0

    def id_ranges(self, units: np.ndarray) -> list[list[int]]:
        """Return sorted units as ``[start, stop)`` ranges of sample ids."""
        height, last = self.layout.rows_per_shard, self.layout.n_samples
        return [[first * height, min(stop * height, last)] for first, stop in ranges_of(units)]


def read_output(path: str | Path) -> Output:
    """Read an output directory (or the ``projections.zarr`` in it).

    Raises:
        StoreError: there is no store, a newer gradproj made it, or no job did.
    """
    store = find_store(path)
    attributes, layout = read_attributes(store), read_layout(store)
    if "wanted_units" not in attributes or "identity_hash" not in attributes:
        if (store / "sample_id").is_dir():
            raise StoreError(
                f"{store} is a training run's store: its rows are in the order seen, and it has no "
                "units. Read it with gradproj.ProjectionStore; loss.csv shows the run's progress"
            )
        raise StoreError(
            f"{store} is a store but not a job's output: it does not list the units to compute. "
            "Give the --output_dir of `python -m gradproj.run`"
        )
    wanted = wanted_units(attributes)
    return Output(
        store.parent, store, attributes, layout, wanted, list_records(store.parent / UNITS_DIR)
    )
