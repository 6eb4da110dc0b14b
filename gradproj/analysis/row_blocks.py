"""Stream a store's rows as tensors on a device, block by block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.packed_rows import DeviceDecoder
from gradproj.analysis.watch import ScanProgress
from gradproj.distributed import World, has_process_group
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.kernels.device_copy import to_device
from gradproj.store import STATUS, ProjectionStore

_DEVICE_BLOCK_VALUES = 2**25  # a GPU needs longer blocks than the cache of a CPU holds


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a store."""

    first: int
    """Id of the first sample."""
    ok: np.ndarray
    """``(n,)`` bool: samples of status ok in one of the chosen domains."""
    rows: Tensor
    """``(n, W)`` float32 on the device; NaN for a sample without a row."""

    def ids(self) -> np.ndarray:
        """Return the ids of the samples that are ``ok``, int64."""
        return self.first + np.flatnonzero(self.ok)

    def ok_rows(self) -> Tensor:
        """Return the rows that are ``ok``, ``(m, W)``."""
        if self.ok.all():
            return self.rows
        return self.rows[torch.from_numpy(self.ok).to(self.rows.device)]


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
    """Yield the samples ``[start, stop)`` in order, reading each byte of a row once.

    A GPU receives the rows as they are stored and decodes them itself. Rows hold the values of
    ``layers``, in this order; samples of other than the ``domains`` are not ``ok``. ``progress`` is
    the label of a progress bar on standard error.

    Raises:
        ConfigError: an unknown domain.
        StoreError: an unknown layer, or a damaged store.
    """
    device, sample_filter = torch.device(device), SampleFilter(store, domains)
    blocks: Iterator[tuple[np.ndarray, Tensor]]
    if device.type == "cpu":
        scan = store.scan(rows_per_block, layers, start, stop)
        blocks = ((ids, torch.from_numpy(rows)) for ids, rows in scan)
    else:
        blocks = decoded_on(device, store, layers, rows_per_block, start, stop)
    with progress_bar(store, progress, start, stop) as bar:
        for ids, rows in blocks:
            first, last = int(ids[0]), int(ids[-1]) + 1
            yield Block(first, sample_filter(first, store.column("status", first, last)), rows)
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
            "together=True needs an initialised torch.distributed: start the ranks by torchrun "
            "and call torch.distributed.init_process_group() first, or leave it out"
        )
    return World.current()


def rank_range(store: ProjectionStore, world: World) -> tuple[int, int]:
    """Return the samples ``[start, stop)`` that a rank scans: whole units, which are files."""
    n_units, height = store.layout.n_units, store.layout.rows_per_shard
    first, last = (n_units * rank // world.size for rank in (world.rank, world.rank + 1))
    return first * height, min(last * height, len(store))


class SampleFilter:
    """Selects the samples of status ok in the chosen domains.

    Raises:
        ConfigError: an unknown domain.
    """

    def __init__(self, store: ProjectionStore, domains: Sequence[str] | None) -> None:
        self._store = store
        self._domains: list[int] | None = None
        if domains is None:
            return
        names = listed(store.domains) or "none"
        unknown = [name for name in domains if name not in store.domains]
        if unknown:
            raise ConfigError(f"{store.path} has no domain {unknown[0]!r}; it has {names}")
        if not domains:
            raise ConfigError(f"domains is empty; {store.path} has {names}")
        self._domains = [store.domains.index(name) for name in domains]

    def __call__(self, first: int, status: np.ndarray) -> np.ndarray:
        """Return ``(n,)`` bool for the samples ``first, first + 1, ...`` of this status."""
        ok = status == STATUS["ok"]
        if self._domains is not None:
            ok &= np.isin(self._store.column("domain", first, first + len(status)), self._domains)
        return ok


def progress_bar(
    store: ProjectionStore, label: str | None, start: int, stop: int | None
) -> ScanProgress:
    """Return the progress of a scan: a bar on standard error, if labelled, and for its watch."""
    return ScanProgress((len(store) if stop is None else stop) - start, label)


def decoded_on(
    device: torch.device,
    store: ProjectionStore,
    layers: Sequence[str] | None = None,
    rows_per_block: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield ``(ids, rows (n, W) float32)``, copied to the device as stored and decoded there."""
    rows_per_block = rows_per_block or max(1, _DEVICE_BLOCK_VALUES // width_of(store, layers))
    packed = store.layout.is_packed
    decoder = DeviceDecoder(store, chosen_layers(store, layers)) if packed else None
    for ids, stored, row_scale in store.scan_stored(rows_per_block, layers, start, stop):
        values = to_device(as_tensor(stored, store.layout.proj_dtype), device)
        scale = to_device(torch.from_numpy(row_scale), device)
        yield ids, decoder.decode(values, scale) if decoder else values.float() * scale[:, None]


def as_tensor(stored: np.ndarray, proj_dtype: str) -> Tensor:
    """Return stored values as a tensor of ``proj_dtype``, without a copy."""
    tensor = torch.from_numpy(stored)
    return tensor.view(torch.bfloat16) if proj_dtype == "bfloat16" else tensor


def width_of(store: ProjectionStore, layers: Sequence[str] | None) -> int:
    """Return the number of values of these layers in a row."""
    if layers is None:
        return store.dim
    widths = {layer.name: layer.slice_end - layer.slice_start for layer in store.layers}
    return sum(widths[name] for name in chosen_layers(store, layers))


def chosen_layers(store: ProjectionStore, layers: Sequence[str] | None) -> list[str]:
    """Return the layers' names, all of the store's for None.

    Raises:
        ConfigError: an unknown name, a repeated one, or none.
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
    repeated = [name for name in set(layers) if list(layers).count(name) > 1]
    if repeated:
        raise ConfigError(f"layers names {min(repeated)!r} more than once")
    return list(layers)
