"""Second moments of a store's rows, summed in one scan."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Dense, Truncated
from gradproj.analysis.row_blocks import rank_range, scan_blocks, scan_world
from gradproj.distributed import World
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore


class DenseSum:
    """Sum of ``x^T x`` over rows."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        self._sum = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add rows ``(n, D)`` float64."""
        self._sum.addmm_(x.T, x)

    def reduce(self, world: World) -> None:
        """Add the other ranks' sums."""
        self._sum = world.sum(self._sum)

    def curvature(self, n_rows: int) -> Dense:
        return Dense((self._sum / max(n_rows, 1)).cpu())


class TruncatedSum:
    """Largest directions of ``x^T x`` over streamed rows; exact for at most that many rows."""

    def __init__(self, width: int, n_directions: int, device: torch.device) -> None:
        self.width, self._n_directions = width, n_directions
        self._rows = torch.zeros(0, width, dtype=torch.float64, device=device)
        self._trace = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """Add rows ``(n, D)`` float64."""
        self._trace += x.square().sum()
        for part in x.split(self._n_directions):  # bounds the rows held to twice the directions
            stacked = torch.cat([self._rows, part])
            if len(stacked) > 2 * self._n_directions:
                stacked = torch.cat([self._largest(self._rows), part])
            self._rows = stacked

    def reduce(self, world: World) -> None:
        """Add the other ranks' directions, in the same order on all ranks."""
        trace = world.sum(self._trace).clone()
        parts = world.gather(self._largest(self._rows).cpu())
        self._rows = self._rows[:0]
        for rows in parts:
            self.add(rows.to(self._rows.device))
        self._trace = trace

    def curvature(self, n_rows: int) -> Truncated:
        rows = self._largest(self._rows)
        norms = rows.norm(dim=1)
        mean_diagonal = self._trace / max(n_rows, 1) / rows.shape[1]
        # Linearly dependent rows leave vectors of rounding errors, which are not directions.
        real = norms > 1e-7 * norms.max() if len(norms) else norms > 0
        directions = rows[real] / norms[real, None]
        return Truncated(
            directions.cpu().contiguous(),
            (norms[real].square() / max(n_rows, 1)).cpu(),
            mean_diagonal.cpu(),
        )

    def _largest(self, rows: Tensor) -> Tensor:
        """Return orthogonal rows with the same ``x^T x`` up to its smallest directions."""
        vectors = torch.linalg.eigh(rows @ rows.T)[1].flip(1)[:, : self._n_directions]
        return vectors.T @ rows


def fit_second_moments(
    store: ProjectionStore,
    layers: Sequence[str],
    widths: Mapping[str, int],
    *,
    largest_width: int,
    directions: int,
    together: bool,
    device: torch.device,
    progress: bool,
) -> tuple[dict[str, Curvature], int]:
    """Sum the second moments of all documents' rows in one scan.

    ``widths`` are the numbers of values of each part of the layers' rows, from left to right; the
    other arguments are those of ``Preconditioner.fit``. Returns the curvature of each part and the
    number of documents with a row; a store without any is a ``StoreError``.
    """
    sums = {
        name: DenseSum(width, device)
        if width <= largest_width
        else TruncatedSum(width, directions, device)
        for name, width in widths.items()
    }
    world, n_rows = scan_world(together), 0
    start, stop = rank_range(store, world)
    label = "second moments" if progress and world.rank == 0 else None
    for block in scan_blocks(store, layers, None, device, label, start=start, stop=stop):
        rows = block.ok_rows()
        # By the extremes, which need no array of the block's size.
        finite = torch.isfinite(rows.amin(dim=1)) & torch.isfinite(rows.amax(dim=1))
        rows = rows if finite.all() else rows[finite]
        for part, x in zip(sums.values(), rows.split(list(widths.values()), dim=1), strict=True):
            part.add(x.double())
        n_rows += len(rows)
    n_rows = int(world.sum(torch.tensor(n_rows)))
    if not n_rows:
        raise StoreError(
            f"{store.path} has no row to compute a second moment from; let the job compute some "
            "first"
        )
    for part in sums.values():
        part.reduce(world)
    return {name: part.curvature(n_rows) for name, part in sums.items()}, n_rows
