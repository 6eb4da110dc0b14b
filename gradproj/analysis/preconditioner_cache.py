"""Cache of fitted second moments beside the store, replaced when the store's rows change."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.preconditioner_file import folder_of
from gradproj.analysis.row_blocks import scan_world
from gradproj.analysis.scan import ScanOptions, fit_for_scan
from gradproj.errors import StoreError
from gradproj.storage.contents import folder_stamp
from gradproj.store import ProjectionStore

_KIND = "second_moment"


def fit_cached(
    store: ProjectionStore,
    kind: str,
    options: ScanOptions,
    note: Callable[[str], None] = lambda line: None,
) -> Preconditioner:
    """Fit a preconditioner over all layers, or load the one that an earlier call saved.

    Only a second moment is cached. kfac is fitted from sums that the store itself holds. ``note``
    is called with a line for the user if the cache cannot be read or written.

    Raises:
        StoreError: the store holds no token covariances, or no row.
    """
    if kind != _KIND:
        return Preconditioner.fit(store, kind)
    path, world = (
        folder_of(store) / f"{_KIND}-{state_of(store)}.safetensors",
        scan_world(options.get("together", False)),
    )
    cached = None
    if path.exists():
        try:
            cached = Preconditioner.load(store, _KIND, path)
        except StoreError as error:
            note(f"{error}. Fitting it again")
    # All ranks or none: fitting is collective, so a rank must not fit while another has a file.
    if all(world.gather(cached is not None)) and cached is not None:
        return cached
    fitted = fit_for_scan(store, _KIND, options)
    if world.rank == 0:
        _save(fitted, store, path, note)
    return fitted


def state_of(store: ProjectionStore) -> str:
    """Return a short hash that changes when rows are added, repaired or removed."""
    # Publishing, repairing or removing a shard changes the shards' directory; a unit's rows count
    # once its record is there, which changes the number of ok rows.
    stamp = folder_stamp(store.path / "projections")
    n_ok = store.status_counts()["ok"]
    return hashlib.sha256(f"{stamp} {n_ok}".encode()).hexdigest()[:12]


def _save(
    fitted: Preconditioner, store: ProjectionStore, path: Path, note: Callable[[str], None]
) -> None:
    """Save the file and delete those of earlier states of the store."""
    try:
        fitted.save(store, path)
        for old in path.parent.glob(f"{_KIND}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
    except (StoreError, OSError) as error:
        note(f"the second moment could not be cached for the next query: {error}")
