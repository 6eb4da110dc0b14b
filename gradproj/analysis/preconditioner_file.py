"""A preconditioner's file beside its store: the curvature, the settings, and which store they are of."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gradproj.analysis.curvature import Curvature, Dense, Kronecker, Truncated
from gradproj.errors import StoreError, settings_mismatch
from gradproj.files import crc32c, explain_os_errors, write_and_replace
from gradproj.store import ProjectionStore

FORMAT_VERSION = 2
"""2: with a checksum."""
_TYPES: dict[frozenset[str], type] = {
    frozenset({"s", "a"}): Kronecker,
    frozenset({"moment"}): Dense,
    frozenset({"directions", "values", "mean_diagonal"}): Truncated,
}


def identity_of(store: ProjectionStore) -> dict[str, Any]:
    """What tells a store from another: two of one size made with other settings, or one made anew."""
    return {
        "store_id": store.attributes.get("store_id"),
        "identity_hash": store.attributes.get("identity_hash"),
        "n_samples": len(store),
        "proj_dtype": store.layout.proj_dtype,
        "layers": [asdict(layer) for layer in store.layers],
    }


def refuse_other_store(recorded: Mapping[str, Any], store: ProjectionStore, what: str) -> None:
    """Raise ``StoreError`` with every difference unless ``recorded`` is this store's identity."""
    mismatch = settings_mismatch(
        f"{what} is not of {store.path}: it was fitted on another store",
        recorded,
        identity_of(store),
        "Fit one on this store.",
        labels=("fitted on", "this store"),
        show=_short,
    )
    if mismatch:
        raise StoreError(mismatch)


def _short(value: Any) -> str:
    return (
        f"{len(value)} layers ({value[0]['name']}, ...)" if isinstance(value, list) else repr(value)
    )


def write_curvature(
    path: Path, settings: dict[str, Any], curvatures: Mapping[str, Curvature]
) -> None:
    """Publish the file whole or not at all."""
    tensors = {
        f"{part}/{name}": tensor.contiguous()
        for part, curvature in curvatures.items()
        for name, tensor in curvature.tensors().items()
    }
    said = json.dumps(settings)
    about = {
        "format_version": str(FORMAT_VERSION),
        "settings": said,
        "crc32c": _checksum(said, tensors),
    }
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_and_replace(path, [save(tensors, about)])


def _checksum(settings: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the settings and of every tensor with its name."""
    value = crc32c(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].contiguous().cpu().numpy().reshape(-1)
        value = crc32c(values.view(np.uint8), crc32c(name.encode(), value))
    return f"{value:08x}"


def read_curvature(path: Path) -> tuple[dict[str, Any], dict[str, Curvature]]:
    """The settings and each part's curvature.

    Raises:
        StoreError: no file there, a damaged one, or one of a newer gradproj.
    """
    if not path.is_file():
        raise StoreError(f"there is no preconditioner at {path}; fit one and save it")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            version = about.get("format_version")
            if version != str(FORMAT_VERSION):
                raise StoreError(
                    f"{path} has format {version}, this gradproj reads {FORMAT_VERSION}: fit it again"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if _checksum(about["settings"], tensors) != about["crc32c"]:
            raise ValueError("its checksum does not match")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.rpartition("/")
            parts.setdefault(part, {})[name] = tensor
        settings = json.loads(about["settings"])
        return settings, {
            part: _TYPES[frozenset(tensors)](**tensors) for part, tensors in parts.items()
        }
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and fit the preconditioner again"
        ) from error
