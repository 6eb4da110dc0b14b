"""Rows of a store as tensors on a device, a block at a time: what every analysis is a loop over."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gradproj.distributed import World, has_process_group
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.kernels.device_copy import send
from gradproj.store import STATUS, ProjectionStore

_DEVICE_BLOCK_BYTES = 2**26  # a GPU wants longer blocks than a processor's cache


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a store."""

    first: int
    """The first sample's id."""
    ok: np.ndarray
    """``(n,)`` bool: which of the block's samples take part: status ok, of a domain that was asked for."""
    rows: Tensor
    """``(n, W)`` float32 on the device; NaN where there is none."""

    def ids(self) -> np.ndarray:
        """Sample ids of the rows that take part, int64."""
        return self.first + np.flatnonzero(self.ok)

    def ok_rows(self) -> Tensor:
        """Rows that take part, ``(m, W)``."""
        return (
            self.rows
            if self.ok.all()
            else self.rows[torch.from_numpy(self.ok).to(self.rows.device)]
        )


def scan_blocks(
    store: ProjectionStore,
    layers: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    progress: str | None = None,
    rows_per_block: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Block]:
    """Every sample from ``start`` to ``stop`` once, in order of ids; each byte of a row is read once.

    A GPU gets the rows as they are stored and decodes them itself.

    Args:
        store: finished or not.
        layers: names; their values stand one layer after the other. None: the whole row.
        domains: names; documents of others take no part. None: all.
        device: where the rows are wanted.
        progress: what a progress bar on standard error calls the scan; None for no bar.
        rows_per_block: None chooses it.
        start: first sample id.
        stop: the one after the last; None: all.

    Raises:
        ConfigError: no such domain.
        StoreError: no such layer, or the store is damaged.
    """
    device, takes_part = torch.device(device), SampleFilter(store, domains)
    if device.type == "cpu":
        scanned = _decoded(store, layers, rows_per_block, start, stop)
    else:
        scanned = decoded_on(device, store, layers, rows_per_block, start, stop)
    with progress_bar(store, progress, start, stop) as bar:
        for ids, rows in scanned:
            first, last = int(ids[0]), int(ids[-1]) + 1
            yield Block(first, takes_part(first, store.column("status", first, last)), rows)
            bar.update(len(ids))


def scan_world(together: bool) -> World:
    """Return the ranks that share a scan; without ``together``, this process alone.

    Raises:
        ConfigError: ``together``, and ``torch.distributed`` is not initialised.
    """
    if not together:
        return World()
    if not has_process_group():
        raise ConfigError(
            "together=True needs ranks that torch.distributed joins: start them by torchrun and call "
            "torch.distributed.init_process_group() first, or leave it out"
        )
    return World.current()


def rank_range(store: ProjectionStore, world: World) -> tuple[int, int]:
    """Return ``[start, stop)`` of the samples that a rank scans: whole units, since those are files."""
    n_units, height = store.layout.n_units, store.layout.rows_per_shard
    first, last = (n_units * rank // world.size for rank in (world.rank, world.rank + 1))
    return first * height, min(last * height, len(store))


class SampleFilter:
    """Tells which samples an analysis is about."""

    def __init__(self, store: ProjectionStore, domains: Sequence[str] | None) -> None:
        """``domains`` by name; None: all. ``ConfigError``: no such domain."""
        self._store, self._wanted = store, _domain_numbers(store, domains)

    def __call__(self, first: int, status: np.ndarray) -> np.ndarray:
        """``(n,)`` bool: which of the samples ``first, first + 1, ...`` are ok and of a domain that was asked for."""
        ok = status == STATUS["ok"]
        if self._wanted is not None:
            ok &= np.isin(self._store.column("domain", first, first + len(status)), self._wanted)
        return ok


def progress_bar(store: ProjectionStore, label: str | None, start: int, stop: int | None) -> tqdm:
    """Of a scan, on standard error; silent without a label."""
    total = (len(store) if stop is None else stop) - start
    return tqdm(total=total, desc=label, unit="row", unit_scale=True, disable=label is None)


def _decoded(
    store: ProjectionStore,
    layers: Sequence[str] | None,
    height: int | None,
    start: int,
    stop: int | None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Rows decoded by the processor."""
    for ids, rows in store.scan(height, layers, start, stop):
        yield ids, torch.from_numpy(rows)


def decoded_on(
    device: torch.device,
    store: ProjectionStore,
    layers: Sequence[str] | None = None,
    height: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """``(ids, rows (n, W) float32)`` that go to the device as they are stored and are decoded there."""
    row_bytes = width_of(store, layers) * store.layout.stored_dtype.itemsize
    height = height or max(1, _DEVICE_BLOCK_BYTES // row_bytes)
    for ids, stored, row_scale in store.scan_stored(height, layers, start, stop):
        values = send(as_tensor(stored, store.layout.proj_dtype), device)
        yield ids, values.float() * send(torch.from_numpy(row_scale), device)[:, None]


def as_tensor(stored: np.ndarray, proj_dtype: str) -> Tensor:
    """Stored values in the type that they are, without a copy."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if proj_dtype == "bfloat16" else tensor


def width_of(store: ProjectionStore, layers: Sequence[str] | None) -> int:
    """Values of a row that a scan of these layers gives."""
    if layers is None:
        return store.dim
    widths = {layer.name: layer.slice_end - layer.slice_start for layer in store.layers}
    return sum(widths[name] for name in chosen_layers(store, layers))


def chosen_layers(store: ProjectionStore, layers: Sequence[str] | None) -> list[str]:
    """The layers' names, all of the store's where none are given.

    Raises:
        ConfigError: a name that the store does not have, one twice, or none at all.
    """
    names = [layer.name for layer in store.layers]
    if layers is None:
        return names
    if isinstance(layers, str):
        raise ConfigError(f"layers is {layers!r}; give a list of names")
    unknown = [name for name in layers if name not in names]
    if unknown:
        raise ConfigError(f"{store.path} has no layer {unknown[0]!r}; it has {listed(names)}")
    if not layers:
        raise ConfigError(f"layers is empty; name some of {listed(names)}, or leave it out for all")
    twice = [name for name in set(layers) if list(layers).count(name) > 1]
    if twice:
        raise ConfigError(f"layers names {min(twice)!r} more than once")
    return list(layers)


def _domain_numbers(store: ProjectionStore, domains: Sequence[str] | None) -> list[int] | None:
    if domains is None:
        return None
    unknown = [name for name in domains if name not in store.domains]
    if unknown or not domains:
        what = f"has no domain {unknown[0]!r}" if unknown else "is asked about no domain at all"
        raise ConfigError(f"{store.path} {what}; it has {listed(store.domains) or 'none'}")
    return [store.domains.index(name) for name in domains]
