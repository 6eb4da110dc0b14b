"""``--basis_from``: a new store takes the basis of another, so that their rows are comparable."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.engine.matrix_file import Matrices, matrices_digest
from gradproj.errors import ConfigError
from gradproj.formatting import listed
from gradproj.storage.object_path import path_of
from gradproj.store import ProjectionStore
from gradproj.store.array_digests import check_digests
from gradproj.store.layout import LayerSlice
from gradproj.store.metadata import store_exists


@dataclass(frozen=True)
class BorrowedBasis:
    """The basis of another store."""

    arrays: dict[str, np.ndarray]
    """The group's arrays."""
    attribute: dict[str, Any]
    """The group's attribute ``basis``."""
    digest: str
    """Of the matrices R, for the identity."""


MODEL = ("--model (weights)", "--model (config)", "--model (adapter)")
"""Entries of an identity that say which model's gradients a basis was measured on."""


def borrowed_basis(
    path: str,
    output: Path,
    layers: list[LayerSlice],
    matrices: Matrices,
    identity: Mapping[str, Any],
) -> BorrowedBasis:
    """Read the basis of the output ``path`` for a store of these layers and matrices.

    If there is no store at ``path`` any more, the copy in the run's own store is read, so that a
    run can be resumed without the other output. ``identity`` is the run's, with its model.

    Raises:
        ConfigError: the store there has no basis, or another model, other layers or matrices.
        StoreError: there is no store, or it is damaged.
    """
    gone = not store_exists(path_of(path)) and store_exists(output)
    with ProjectionStore(output if gone else path) as store:
        if store.basis is None:
            raise ConfigError(
                f"--basis_from {path}: the rows there have no basis of their own; give --basis "
                "random for rows that are comparable with them"
            )
        recorded = store.attributes["identity"]
        if others := [name for name in MODEL if recorded.get(name, "") != identity[name]]:
            raise ConfigError(
                f"--basis_from {path}: the basis there was measured on another model "
                f"({listed(others)}); give that, or leave --basis_from out"
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
        check_digests(store, *names)
        arrays = {name: store.array(name) for name in names}
        digest = matrices_digest(store.basis, layers)
        return BorrowedBasis(arrays, store.attributes["basis"], digest)
