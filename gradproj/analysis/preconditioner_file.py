"""File format of a preconditioner: curvature, settings, and the identity of its store."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from gradproj.analysis.curvature import Curvature, Dense, Kronecker, Truncated
from gradproj.analysis.eigen_moments import EigenMoments, WeightedMoments
from gradproj.analysis.eigenbasis import Eigenvalues
from gradproj.analysis.tensor_file import read_tensors, write_tensors
from gradproj.errors import StoreError, settings_mismatch
from gradproj.store import ProjectionStore
from gradproj.store.layout import PRECONDITIONERS_DIR

_TYPES = {
    frozenset(field.name for field in fields(cls)): cls
    for cls in (Kronecker, Dense, Truncated, Eigenvalues, EigenMoments, WeightedMoments)
}


def folder_of(store: ProjectionStore) -> Path:
    """Return the directory of a store's preconditioner files, in its output directory."""
    return store.path.parent / PRECONDITIONERS_DIR


def identity_of(store: ProjectionStore) -> dict[str, Any]:
    """Return what distinguishes a store from others of its size and from one written again."""
    return {
        "store_id": store.attributes.get("store_id"),
        "identity_hash": store.attributes.get("identity_hash"),
        "n_samples": len(store),
        "proj_dtype": store.layout.stored_as,
        # Without the places in a stored row, which files of format 1 stores do not have.
        "layers": [
            {name: value for name, value in asdict(layer).items() if not name.startswith("stored_")}
            for layer in store.layers
        ],
    }


def refuse_other_store(recorded: Mapping[str, Any], store: ProjectionStore, subject: str) -> None:
    """Raise ``StoreError`` with every difference unless ``recorded`` is this store's identity."""
    mismatch = settings_mismatch(
        f"{subject} does not belong to {store.path}: it was fitted on another store",
        recorded,
        identity_of(store),
        "Fit one on this store.",
        labels=("fitted on", "this store"),
        show=_show,
    )
    if mismatch:
        raise StoreError(mismatch)


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} layers ({value[0]['name']}, ...)"
    return repr(value)


def write_curvature(
    path: Path, settings: dict[str, Any], curvatures: Mapping[str, Curvature]
) -> None:
    """Write the file atomically."""
    tensors = {
        f"{part}/{name}": tensor
        for part, curvature in curvatures.items()
        for name, tensor in vars(curvature).items()
    }
    write_tensors(path, settings, tensors)


def read_curvature(path: Path) -> tuple[dict[str, Any], dict[str, Curvature]]:
    """Return the settings and each part's curvature.

    Raises:
        StoreError: no file, a damaged one, or one of another format version.
    """
    if not path.is_file():
        raise StoreError(f"there is no preconditioner at {path}; fit one and save it")
    settings, tensors = read_tensors(path, "fit the preconditioner again")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.rpartition("/")
        parts.setdefault(part, {})[name] = tensor
    try:
        curvatures: dict[str, Curvature] = {
            part: _TYPES[frozenset(of)](**of) for part, of in parts.items()
        }
        return settings, curvatures
    except KeyError as error:
        raise StoreError(
            f"{path} is damaged (it holds {error}): delete it and fit the preconditioner again"
        ) from error
