"""The curvature that a score needs. A second moment takes a scan: it is kept beside the store until its rows change."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from gradproj.analysis import Preconditioner
from gradproj.analysis.row_blocks import scan_world
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore

FOLDER = "preconditioners"
_SECOND_MOMENT = "second_moment"


def curvature_for(
    kind: str | None,
    store: ProjectionStore,
    n_ok: int,
    *,
    together: bool = False,
    device: torch.device | str = "cpu",
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Preconditioner | None:
    """What a score is made with, of all layers; None for scores without.

    Args:
        kind: kfac, second_moment or None.
        store: finished or not.
        n_ok: its rows of status ok.
        together: every rank of ``torch.distributed`` calls this.
        device: where sums are made.
        progress: show a bar.
        say: told what a person may want to know.

    Raises:
        StoreError: the store holds no token covariances, or no row.
    """
    if kind is None:
        return None
    if kind != _SECOND_MOMENT:
        return Preconditioner.fit(
            store, kind
        )  # from sums that the store itself keeps: a file would gain nothing
    path, world = _path_of(store, n_ok), scan_world(together)
    kept = _load(store, path, say)
    if all(
        world.gather(kept is not None)
    ):  # or one rank would fit alone what all of them fit together
        return kept
    fitted = Preconditioner.fit(
        store, _SECOND_MOMENT, together=together, device=device, progress=progress
    )
    if world.rank == 0:
        _keep(fitted, store, path, say)
    return fitted


def _path_of(store: ProjectionStore, n_ok: int) -> Path:
    """A name that changes with the rows: whatever publishes, mends or removes a shard touches the shards' folder, and a
    unit counts once it is recorded."""
    changed = (store.path / "projections").stat().st_mtime_ns
    stamp = hashlib.sha256(f"{changed} {n_ok}".encode()).hexdigest()[:12]
    return store.path.parent / FOLDER / f"{_SECOND_MOMENT}-{stamp}.safetensors"


def _load(store: ProjectionStore, path: Path, say: Callable[[str], None]) -> Preconditioner | None:
    if not path.exists():
        return None
    try:
        return Preconditioner.load(store, _SECOND_MOMENT, path)
    except StoreError as error:
        say(f"{error}. It is fitted anew")
        return None


def _keep(
    fitted: Preconditioner, store: ProjectionStore, path: Path, say: Callable[[str], None]
) -> None:
    """Save it in place of those that the store has outgrown."""
    try:
        fitted.save(store, path)
        for old in path.parent.glob(f"{_SECOND_MOMENT}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
    except (StoreError, OSError) as error:
        say(f"the second moment is not kept for the next query: {error}")
