"""Inverse curvature of a store's rows, layer by layer, fitted in at most one scan."""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Inverse
from gradproj.analysis.eigen_moments import fit_eigen_moments
from gradproj.analysis.eigenbasis import (
    DiagonalInverse,
    Eigenvalues,
    has_weighted_rows,
    read_eigenvalues,
    unweighted,
)
from gradproj.analysis.preconditioner_file import (
    folder_of,
    identity_of,
    read_curvature,
    refuse_other_store,
    write_curvature,
)
from gradproj.analysis.row_blocks import chosen_layers
from gradproj.analysis.second_moment import fit_second_moments
from gradproj.analysis.token_covariances import read_kronecker_factors
from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore

KINDS = ("kfac", "ekfac", "second_moment")
MAX_WIDTH = 2048
"""Widest layer whose second moment is stored whole: 32 MB, and seconds to factorize."""
DIRECTIONS = 256
"""Directions stored of a wider one."""
JOINT = "all layers"
_KRONECKER_DAMPING = {"kfac": 0.03, "ekfac": 0.01}
_NARROW_DAMPING, _WIDE_DAMPING, _WIDE = 0.1, 1.0, 1024


def auto_damping(kind: str, width: int) -> float:
    """Return the damping that ``auto`` stands for, in units of the mean diagonal.

    kfac: 0.03, ekfac: 0.01, in the ranges that measured best or equal. second_moment:
    0.1 for layers of fewer than 1,024 values (16 x 16), 1 for wider ones (32 x 32 and above), whose
    second moment is estimated from fewer rows per direction.
    """
    if kind in _KRONECKER_DAMPING:
        return _KRONECKER_DAMPING[kind]
    return _WIDE_DAMPING if width >= _WIDE else _NARROW_DAMPING


@dataclass(frozen=True)
class _Part:
    """Curvature of one layer, or of all layers jointly, and its number of values in a row."""

    name: str
    width: int
    curvature: Curvature


class Preconditioner:
    """``C^-1`` of a store's rows, block diagonal by layer; turns inner products into influences.

    Made by ``fit`` or ``load``. Rows hold the values of ``layers``, in that order.
    """

    def __init__(self, settings: dict[str, Any], parts: Sequence[_Part]) -> None:
        self._settings, self._parts = settings, tuple(parts)
        self.kind: str = settings["kind"]
        self.damping: float | str = settings["damping"]
        self.layers: list[str] = list(settings["layers"])
        self.n_rows: int = settings["n_rows"]
        """Rows that were summed; for kfac, tokens."""

    @cached_property
    def _inverses(self) -> list[Inverse]:
        # Factorized on first use: callers often change the damping or the layers first.
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
        largest_width: int = MAX_WIDTH,
        directions: int = DIRECTIONS,
        together: bool = False,
        device: str | torch.device = "cpu",
        progress: bool = False,
    ) -> "Preconditioner":
        """Measure a store's curvature.

        ``kfac`` is ``(S + d_o)^-1 (x) (A + d_i)^-1`` from the token covariances that the job
        summed, or from the pilot's eigenvalues for rows weighted in an eigenbasis; it reads no
        row. ``ekfac`` is ``(L + d)^-1`` in the eigenbasis of these covariances, with L the second
        moments of at most ``MAX_ROWS`` rows there. ``second_moment`` is ``(M + d)^-1`` with M the
        mean of ``row^T row`` over the documents that have a row, in one scan. All in float64.

        Args:
            store: finished or not; for kfac of a store without basis, its units must be merged.
            kind: kfac, ekfac or second_moment.
            damping: c in ``d = c mean(diagonal)`` of each matrix; for auto see ``auto_damping``.
            layers: names; None for all.
            joint: fit one second moment over all layers instead of one per layer.
            largest_width: truncate a second moment with more values per side than this.
            directions: number of directions of a truncated second moment.
            together: True if every rank of ``torch.distributed`` makes this call; each scans its
                share of the units and returns the whole.
            device: where the sums are computed.
            progress: show a progress bar.

        Raises:
            ConfigError: an unknown kind, layer or damping, or a matrix that has no inverse with
                a numeric damping. With ``auto``, ``ready`` or the first use raises that.
            StoreError: the store holds no covariances, or no row.
        """
        _check_arguments(kind, joint, largest_width, directions)
        _check_damping(damping)
        names = chosen_layers(store, layers)
        widths = _widths(store, names, joint)
        curvatures: Mapping[str, Curvature]
        if kind == "second_moment":
            curvatures, n_rows = fit_second_moments(
                store, names, widths, largest_width=largest_width, directions=directions,
                together=together, device=torch.device(device), progress=progress,
            )  # fmt: skip
        else:
            read = read_eigenvalues if has_weighted_rows(store) else read_kronecker_factors
            curvatures, n_rows = read(store)
            if kind == "ekfac":
                curvatures, n_rows = fit_eigen_moments(store, names, curvatures)
        settings = _settings(store, kind, damping, names, n_rows, joint)
        parts = [_Part(name, width, curvatures[name]) for name, width in widths.items()]
        fitted = cls(settings, parts)
        return fitted if damping == "auto" else fitted.ready()

    @classmethod
    def unweighted(
        cls, store: ProjectionStore, layers: Sequence[str] | None = None
    ) -> "Preconditioner":
        """Return that by which weighted rows have the inner products of plain gradients."""
        curvatures, names = unweighted(store), chosen_layers(store, layers)
        settings = _settings(store, "none", "auto", names)
        widths = _widths(store, names, joint=False)
        return cls(settings, [_Part(name, w, curvatures[name]) for name, w in widths.items()])

    def ready(self) -> "Preconditioner":
        """Factorize now and return self; ``ConfigError`` if a matrix has no inverse."""
        _ = self._inverses
        return self

    def with_damping(self, damping: float | str) -> "Preconditioner":
        """Return the same curvature with another damping, without a scan."""
        _check_damping(damping)
        if damping == self.damping:
            return self
        return Preconditioner({**self._settings, "damping": damping}, self._parts)

    def for_layers(self, layers: Sequence[str]) -> "Preconditioner":
        """Return the part of some layers, in that order; ``ConfigError`` if it has no such part."""
        if list(layers) == self.layers:
            return self
        parts = {part.name: part for part in self._parts}
        missing = [name for name in layers if name not in parts]
        if missing:
            problem = (
                "one matrix over all its layers"
                if self._settings["joint"]
                else f"no layer {missing[0]!r}"
            )
            raise ConfigError(
                f"this preconditioner has {problem}; its layers are {', '.join(self.layers)}. "
                "Fit one for the chosen layers"
            )
        return Preconditioner(
            {**self._settings, "layers": list(layers)}, [parts[name] for name in layers]
        )

    def solve(self, rows: Tensor) -> Tensor:
        """Return ``rows C^-1``, ``(n, W)``, in the rows' precision and on their device."""
        solved = [i.solve(x) for i, x in zip(self._inverses, self._split(rows), strict=True)]
        return torch.cat(solved, dim=1)

    def self_products(self, rows: Tensor) -> Tensor:
        """Return ``row C^-1 row^T``: ``(n, W)`` -> ``(n,)``; never negative."""
        products = [
            i.self_products(x) for i, x in zip(self._inverses, self._split(rows), strict=True)
        ]
        return torch.stack(products).sum(0)

    def by_part(self) -> list[tuple[int, int, Inverse]]:
        """Return ``(start, stop, inverse)`` of each independent part of a row."""
        stops = list(accumulate(part.width for part in self._parts))
        return list(zip([0, *stops[:-1]], stops, self._inverses, strict=True))

    def fingerprint(self) -> str:
        """Return a text that is another one for another inverse."""
        digest = hashlib.sha256(repr((self.kind, self.damping, self.layers)).encode())
        for part in self._parts:
            for tensor in vars(part.curvature).values():
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def is_identity(self) -> bool:
        return all(isinstance(i, DiagonalInverse) and i.is_identity for i in self._inverses)

    def traces(self) -> list[float] | None:
        """Return each layer's score with itself of values 1 and -1; None if it is not diagonal."""
        if not all(isinstance(i, DiagonalInverse) for i in self._inverses):
            return None
        return [i.trace for i in self._inverses if isinstance(i, DiagonalInverse)]

    def to(self, device: torch.device, dtype: torch.dtype) -> "Preconditioner":
        """Return a copy that is fast for many rows of this device and precision."""
        moved = copy.copy(self)
        moved._inverses = [inverse.to(device, dtype) for inverse in self._inverses]
        return moved

    def check_store(self, store: ProjectionStore) -> None:
        """Raise ``StoreError`` unless it was fitted on this store."""
        refuse_other_store(self._settings["store"], store, "this preconditioner")

    def save(self, store: ProjectionStore, path: str | Path | None = None) -> Path:
        """Write curvature and settings to a file and return its path.

        The default is ``preconditioners/KIND.safetensors`` in the output directory.
        """
        self.check_store(store)
        path = _default_path(store, self.kind) if path is None else Path(path)
        write_curvature(path, self._settings, {part.name: part.curvature for part in self._parts})
        return path

    @classmethod
    def load(
        cls, store: ProjectionStore, kind: str = "kfac", path: str | Path | None = None
    ) -> "Preconditioner":
        """Read what ``save`` wrote for the same store.

        Raises:
            StoreError: no file, a damaged one, or one of another store.
        """
        path = _default_path(store, kind) if path is None else Path(path)
        settings, curvatures = read_curvature(path)
        refuse_other_store(settings["store"], store, str(path))
        widths = _widths(store, settings["layers"], settings["joint"])
        return cls(
            settings, [_Part(name, width, curvatures[name]) for name, width in widths.items()]
        )

    def _damping_of(self, part: _Part) -> float:
        if isinstance(self.damping, str) and isinstance(part.curvature, Eigenvalues):
            return part.curvature.damping.item()
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


def _settings(
    store: ProjectionStore,
    kind: str,
    damping: float | str,
    layers: Sequence[str],
    n_rows: int = 0,
    joint: bool = False,
) -> dict[str, Any]:
    return {
        "kind": kind, "damping": damping, "layers": list(layers), "n_rows": n_rows,
        "joint": joint, "store": identity_of(store),
    }  # fmt: skip


def _check_arguments(kind: str, joint: bool, largest_width: int, directions: int) -> None:
    if kind not in KINDS:
        raise ConfigError(
            f"the preconditioner's kind is {kind!r}; choose one of {', '.join(KINDS)}"
        )
    if joint and kind != "second_moment":
        raise ConfigError(
            "joint requires kind second_moment: Kronecker factors belong to one layer each"
        )
    if largest_width < 1 or directions < 1:
        raise ConfigError(
            f"largest_width and directions must be at least 1, got {largest_width} and {directions}"
        )


def _check_damping(damping: float | str) -> None:
    is_valid = damping == "auto" if isinstance(damping, str) else 0 <= damping < float("inf")
    if not is_valid:
        raise ConfigError(
            f"damping is {damping!r}; give auto or a number, 0 or more (0.01 to 1 are usual)"
        )


def _default_path(store: ProjectionStore, kind: str) -> Path:
    return folder_of(store) / f"{kind}.safetensors"


def _widths(store: ProjectionStore, layers: Sequence[str], joint: bool) -> dict[str, int]:
    """Return the number of values of each part, in the order of a row."""
    widths = {layer.name: layer.slice_end - layer.slice_start for layer in store.layers}
    if joint:
        return {JOINT: sum(widths[name] for name in layers)}
    return {name: widths[name] for name in layers}
