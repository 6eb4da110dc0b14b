"""``--basis_from``: a new store takes the basis of another, so that their rows are comparable."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproj.engine.matrix_file import Matrices, matrices_digest
from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore
from gradproj.store.layout import LayerSlice


@dataclass(frozen=True)
class BorrowedBasis:
    """The basis of another store."""

    arrays: dict[str, np.ndarray]
    """The group's arrays."""
    attribute: dict[str, Any]
    """The group's attribute ``basis``."""
    digest: str
    """Of the matrices R, for the identity."""


def borrowed_basis(path: str, layers: list[LayerSlice], matrices: Matrices) -> BorrowedBasis:
    """Read the basis of the output ``path`` for a store of these layers and matrices.

    Raises:
        ConfigError: the store there has no basis, or other layers or matrices.
        StoreError: there is no store, or it is damaged.
    """
    with ProjectionStore(path) as store:
        if store.basis is None:
            raise ConfigError(
                f"--basis_from {path}: the rows there have no basis of their own; give --basis "
                "random for rows that are comparable with them"
            )
        theirs = [(x.name, x.k_i, x.k_o) for x in store.layers]
        same = theirs == [(x.name, x.k_i, x.k_o) for x in layers]
        if not same or matrices_digest(store.projection_matrices, layers) != matrices_digest(
            matrices, layers
        ):
            raise ConfigError(
                f"--basis_from {path}: the rows there have other layers or matrices; give its "
                "--proj_layers, --proj_rank_total, --proj_rank_min, --proj_seed and --proj_kind"
            )
        names = ("basis_matrices", "basis_eigenvalues")
        arrays = {name: store.array(name) for name in names}
        digest = matrices_digest(store.basis, layers)
        return BorrowedBasis(arrays, store.attributes["basis"], digest)
