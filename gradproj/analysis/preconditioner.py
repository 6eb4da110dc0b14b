"""``Preconditioner``: a store's inverse curvature by layer; fitted in at most one scan, kept beside the store."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, DenseSum, Inverse, Kronecker, TruncatedSum
from gradproj.analysis.preconditioner_file import (
    identity_of,
    read_curvature,
    refuse_other_store,
    write_curvature,
)
from gradproj.analysis.row_blocks import chosen_layers, rank_range, scan_blocks, scan_world
from gradproj.distributed import World
from gradproj.errors import ConfigError, StoreError
from gradproj.store import ProjectionStore

KINDS = ("kfac", "second_moment")
LARGEST_WIDTH = 2048
"""Values of a layer whose second moment is kept whole: 32 MB, and seconds for its factorization."""
DIRECTIONS = 256
"""Directions kept of a wider one."""
JOINT = "all layers"
_ROUNDING = 0.01
"""Of sums that a device made in few bits, relative."""
_KFAC_DAMPING = 0.03
_NARROW_DAMPING, _WIDE_DAMPING, _WIDE = 0.1, 1.0, 1024


def auto_damping(kind: str, width: int) -> float:
    """The damping that ``auto`` stands for, in units of the mean diagonal.

    kfac: 0.03, in the middle of the 0.01 to 0.1 that measured best. second_moment: 0.1 for layers of fewer than 1,024
    values (16 x 16), 1 from there on (32 x 32 and above), whose inverse is estimated from fewer rows per direction.
    """
    if kind == "kfac":
        return _KFAC_DAMPING
    return _WIDE_DAMPING if width >= _WIDE else _NARROW_DAMPING


@dataclass(frozen=True)
class _Part:
    """A layer's curvature, or that of all of them jointly, and where its values lie in a row."""

    name: str
    width: int
    curvature: Curvature


class Preconditioner:
    """``C^-1`` of a store's rows, block diagonal by layer: what turns inner products into influences.

    Made by ``fit`` or ``load``. Its layers' values stand one after the other, in the order of ``layers``.
    """

    def __init__(self, settings: dict[str, Any], parts: Sequence[_Part]) -> None:
        self._settings, self._parts = settings, tuple(parts)
        self.kind: str = settings["kind"]
        self.damping: float | str = settings["damping"]
        self.layers: list[str] = list(settings["layers"])
        self.n_rows: int = settings["n_rows"]
        """Rows that were summed; of kfac, tokens."""

    @cached_property
    def _inverses(self) -> list[Inverse]:
        """Factorized when they are wanted: another damping or fewer layers need others."""
        return [part.curvature.damped(self._damping_of(part), part.name) for part in self._parts]

    @classmethod
    def fit(
        cls,
        store: ProjectionStore,
        kind: str = "kfac",
        damping: float | str = "auto",
        layers: Sequence[str] | None = None,
        *,
        joint: bool = False,
        largest_width: int = LARGEST_WIDTH,
        directions: int = DIRECTIONS,
        together: bool = False,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> "Preconditioner":
        """Measure a store's curvature.

        ``kfac`` is ``(S + d_o)^-1 (x) (A + d_i)^-1`` from the token covariances that the job summed; no row is
        read. ``second_moment`` is ``(M + d)^-1`` with M the mean of ``row^T row`` over the documents that have a
        row, in one scan. Sums and factorizations are float64.

        Args:
            store: for kfac, its units have to be merged.
            kind: kfac or second_moment.
            damping: c in ``d = c mean(diagonal)``, of each matrix for itself; ``auto``: see ``auto_damping``.
            layers: names; None: all.
            joint: one second moment over all layers, not one for each.
            largest_width: a second moment of more values a side is kept in its largest directions only.
            directions: as many.
            together: every rank of ``torch.distributed`` calls this, scans its share of the units, and gets the whole.
            device: where the sums are made.
            progress: show a bar.

        Raises:
            ConfigError: an unknown kind, layer or damping, or a matrix that has no inverse with a damping given as
                a number (with ``auto`` that is said where it is used first, or by ``ready``).
            StoreError: the store holds no covariances, or no row.
        """
        if kind not in KINDS:
            raise ConfigError(
                f"the preconditioner's kind is {kind!r}; choose one of {', '.join(KINDS)}"
            )
        if joint and kind == "kfac":
            raise ConfigError(
                "joint is for kind second_moment: Kronecker factors are of one layer each"
            )
        if largest_width < 1 or directions < 1:
            raise ConfigError(
                f"largest_width and directions must be at least 1, got {largest_width} and {directions}"
            )
        _checked_damping(damping)
        names = chosen_layers(store, layers)
        if kind == "kfac":
            parts, n_rows = _token_factors(store, names)
        else:
            widths = _widths(store, names, joint)
            sums = _sums(widths, largest_width, directions, torch.device(device))
            n_rows = _sum_rows(
                store, names, sums, scan_world(together), torch.device(device), progress
            )
            parts = [
                _Part(name, widths[name], part.curvature(n_rows)) for name, part in sums.items()
            ]
        settings = {
            "kind": kind,
            "damping": damping,
            "layers": names,
            "n_rows": n_rows,
            "joint": joint,
        }
        fitted = cls({**settings, "store": identity_of(store)}, parts)
        return fitted if damping == "auto" else fitted.ready()

    def ready(self) -> "Preconditioner":
        """Itself, factorized now; ``ConfigError`` where a matrix has no inverse with this damping."""
        _ = self._inverses
        return self

    def with_damping(self, damping: float | str) -> "Preconditioner":
        """The same curvature, damped otherwise: no scan."""
        _checked_damping(damping)
        if damping == self.damping:
            return self
        return Preconditioner({**self._settings, "damping": damping}, self._parts)

    def for_layers(self, layers: Sequence[str]) -> "Preconditioner":
        """The part of some layers, in that order; ``ConfigError`` where it holds no such part."""
        if list(layers) == self.layers:
            return self
        parts = {part.name: part for part in self._parts}
        lost = [name for name in layers if name not in parts]
        if lost:
            what = (
                "one matrix over all its layers"
                if self._settings["joint"]
                else f"no layer {lost[0]!r}"
            )
            raise ConfigError(
                f"this preconditioner has {what}; its layers are {', '.join(self.layers)}. Fit one for the layers asked"
            )
        return Preconditioner(
            {**self._settings, "layers": list(layers)}, [parts[name] for name in layers]
        )

    def solve(self, rows: Tensor) -> Tensor:
        """``rows C^-1``: ``(n, W)`` -> ``(n, W)``, in the rows' precision and on their device."""
        solved = [i.solve(x) for i, x in zip(self._inverses, self._split(rows), strict=True)]
        return torch.cat(solved, dim=1)

    def self_products(self, rows: Tensor) -> Tensor:
        """``row C^-1 row^T``: ``(n, W)`` -> ``(n,)``; never negative."""
        products = [
            i.self_products(x) for i, x in zip(self._inverses, self._split(rows), strict=True)
        ]
        return torch.stack(products).sum(0)

    def by_part(self) -> list[tuple[int, int, Inverse]]:
        """Where in a row each independent part lies, ``[start, stop)``, and its inverse."""
        stops = list(accumulate(part.width for part in self._parts))
        return list(zip([0, *stops[:-1]], stops, self._inverses, strict=True))

    def to(self, device: torch.device, dtype: torch.dtype) -> "Preconditioner":
        """The same, ready for many rows of one device and precision; other rows are served as well."""
        moved = copy.copy(self)
        moved._inverses = [inverse.to(device, dtype) for inverse in self._inverses]
        return moved

    def check_store(self, store: ProjectionStore) -> None:
        """Refuse another store than the one it was fitted on (``StoreError``)."""
        refuse_other_store(self._settings["store"], store, "this preconditioner")

    def save(self, store: ProjectionStore, path: str | Path | None = None) -> Path:
        """Keep the curvature and its settings in a file, by default ``OUTPUT/preconditioners/KIND.safetensors``."""
        self.check_store(store)
        path = _path_of(store, self.kind) if path is None else Path(path)
        write_curvature(path, self._settings, {part.name: part.curvature for part in self._parts})
        return path

    @classmethod
    def load(
        cls, store: ProjectionStore, kind: str = "kfac", path: str | Path | None = None
    ) -> "Preconditioner":
        """What ``save`` kept, for the same store.

        Raises:
            StoreError: no such file, a damaged one, or one of another store.
        """
        path = _path_of(store, kind) if path is None else Path(path)
        settings, curvatures = read_curvature(path)
        refuse_other_store(settings["store"], store, str(path))
        widths = _widths(store, settings["layers"], settings["joint"])
        return cls(
            settings, [_Part(name, width, curvatures[name]) for name, width in widths.items()]
        )

    def _damping_of(self, part: _Part) -> float:
        if isinstance(self.damping, str):
            return auto_damping(self.kind, part.width)
        return self.damping

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        widths = [part.width for part in self._parts]
        if rows.dim() != 2 or rows.shape[1] != sum(widths):
            raise ConfigError(
                f"rows are {tuple(rows.shape)}; this preconditioner takes (n, {sum(widths)})"
            )
        return rows.split(widths, dim=1)


def _checked_damping(damping: float | str) -> None:
    known = damping == "auto" if isinstance(damping, str) else 0 <= damping < float("inf")
    if not known:
        raise ConfigError(
            f"damping is {damping!r}; give auto or a number, 0 or more (0.01 to 1 are usual)"
        )


def _path_of(store: ProjectionStore, kind: str) -> Path:
    return store.path.parent / "preconditioners" / f"{kind}.safetensors"


def _widths(store: ProjectionStore, layers: Sequence[str], joint: bool) -> dict[str, int]:
    """Values of every matrix's rows, in the order in which they stand in a row."""
    widths = {layer.name: layer.slice_end - layer.slice_start for layer in store.layers}
    if joint:
        return {JOINT: sum(widths[name] for name in layers)}
    return {name: widths[name] for name in layers}


# --- kfac ---


def _token_factors(store: ProjectionStore, layers: Sequence[str]) -> tuple[list[_Part], int]:
    """Each layer's mean token covariances, and the number of tokens."""
    n_tokens = store.attributes.get("covariance_tokens") or 0
    if not isinstance(n_tokens, int) or n_tokens < 0:
        raise _damaged(
            store, f"its attribute covariance_tokens is {n_tokens!r}, no number of tokens"
        )
    if not n_tokens:
        raise StoreError(
            f"{store.path} has no token covariances, which kfac is made of: they are written when its units are "
            f"merged. Run `python -m gradproj merge {store.path.parent}`, or take the second moment of its rows "
            "(--score preconditioned) or no preconditioner (dot, cosine)"
        )
    s = _squares(store, "token_covariance_s", [layer.k_o for layer in store.layers])
    a = _squares(store, "token_covariance_a", [layer.k_i for layer in store.layers])
    factors = {
        layer.name: Kronecker(s[n] / n_tokens, a[n] / n_tokens)
        for n, layer in enumerate(store.layers)
    }
    widths = _widths(store, layers, joint=False)
    return [_Part(name, width, factors[name]) for name, width in widths.items()], n_tokens


def _squares(store: ProjectionStore, array: str, sides: Sequence[int]) -> list[Tensor]:
    """The matrices of an array that holds them flat, one after the other; symmetric, which their sums are but for
    rounding.

    Raises:
        StoreError: it is gone or damaged: no sum of squares is such a matrix.
    """
    flat = store.array(array).astype(np.float64)
    if (
        flat.shape != (sum(side**2 for side in sides),)
        or not np.isfinite(flat).all()
        or not flat.any()
    ):
        raise _damaged(store, f"{array} does not hold the layers' finite sums")
    parts = np.split(flat, np.cumsum([side**2 for side in sides])[:-1])
    matrices = [
        torch.from_numpy(part.reshape(side, side)) for part, side in zip(parts, sides, strict=True)
    ]
    for layer, matrix in zip(store.layers, matrices, strict=True):
        if not _may_be_sum_of_squares(matrix):
            raise _damaged(store, f"{array} holds no token covariance of {layer.name}")
    return [(matrix + matrix.T) / 2 for matrix in matrices]


def _may_be_sum_of_squares(matrix: Tensor) -> bool:
    """Whether it is, to rounding, symmetric and keeps to Cauchy and Schwarz; a flipped bit breaks that mostly."""
    diagonal = matrix.diagonal()
    rounding = _ROUNDING * diagonal.max()
    most = (diagonal.clamp(min=0)[:, None] * diagonal.clamp(min=0)).sqrt() * (
        1 + _ROUNDING
    ) + rounding
    is_bounded = bool((matrix.abs() <= most).all()) and bool((diagonal >= -rounding).all())
    return is_bounded and bool(((matrix - matrix.T).abs() <= _ROUNDING * most + rounding).all())


def _damaged(store: ProjectionStore, what: str) -> StoreError:
    return StoreError(
        f"{store.path} is damaged: {what}. Run `python -m gradproj verify {store.path.parent}` to see all damage"
    )


# --- second moments ---


def _sums(
    widths: dict[str, int], largest_width: int, directions: int, device: torch.device
) -> dict[str, DenseSum | TruncatedSum]:
    return {
        name: DenseSum(width, device)
        if width <= largest_width
        else TruncatedSum(width, directions, device)
        for name, width in widths.items()
    }


def _sum_rows(
    store: ProjectionStore,
    layers: Sequence[str],
    sums: dict[str, DenseSum | TruncatedSum],
    world: World,
    device: torch.device,
    progress: bool,
) -> int:
    """Add every document's row to the sums; the number of documents that have one."""
    start, stop = rank_range(store, world)
    label = "second moments" if progress and world.rank == 0 else None
    n_rows = 0
    for block in scan_blocks(store, layers, None, device, label, start=start, stop=stop):
        rows = block.ok_rows()
        rows = rows[torch.isfinite(rows).all(dim=1)].double()
        at = 0
        for part in sums.values():
            part.add(rows[:, at : at + part.width])
            at += part.width
        n_rows += len(rows)
    n_rows = int(world.sum(torch.tensor(n_rows)))
    if not n_rows:
        raise StoreError(
            f"{store.path} has no row to take a second moment of; let the job compute some first"
        )
    for part in sums.values():
        part.join(world)
    return n_rows
