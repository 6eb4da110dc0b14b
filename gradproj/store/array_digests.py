"""Digests of the arrays that no file's checksum covers: the bases of rows and of head rows.

They are measured, so that they cannot be made again as projection matrices can from their seed.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradproj.errors import damaged
from gradproj.store.head_rows import HEAD_MATRIX, HEAD_SCALE
from gradproj.store.reader import ProjectionStore

DIGESTS = "digests"
"""Entry of an attribute: array -> digest. The first stores of format 2 have none."""
DIGESTED = {"basis_matrices": "basis", "basis_eigenvalues": "basis"}
DIGESTED |= {HEAD_MATRIX: "head", HEAD_SCALE: "head"}
"""Array -> the attribute that has its digest."""


def array_digest(values: np.ndarray) -> str:
    """Return a 32-character digest of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:32]


def with_digests(attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return a new store's attributes with the digests of its arrays."""
    completed = dict(attributes)
    for attribute in ("basis", "head"):
        named = {name: array_digest(arrays[name]) for name in arrays if DIGESTED[name] == attribute}
        if named:
            completed[attribute] = {**completed[attribute], DIGESTS: named}
    return completed


def check_digests(store: ProjectionStore, *names: str) -> None:
    """Compare the named arrays (default: all) with their digests, as far as the store has some.

    Raises:
        StoreError: an array is another than was written, or cannot be read.
    """
    for name in names or DIGESTED:
        attribute = store.attributes.get(DIGESTED[name])
        recorded = attribute.get(DIGESTS, {}).get(name) if isinstance(attribute, dict) else None
        if recorded is not None and array_digest(store.array(name)) != recorded:
            raise damaged(
                store.path / name, "its values are not those that were written (another digest)"
            )
