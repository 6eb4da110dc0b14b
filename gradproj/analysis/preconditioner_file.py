"""File format of a preconditioner: curvature, settings, and the identity of its store."""

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
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
"""2 added the checksum."""
_TYPES = {
    frozenset(field.name for field in fields(cls)): cls for cls in (Kronecker, Dense, Truncated)
}


def folder_of(store: ProjectionStore) -> Path:
    """Return the directory of a store's preconditioner files, in its output directory."""
    return store.path.parent / "preconditioners"


def identity_of(store: ProjectionStore) -> dict[str, Any]:
    """Return what distinguishes a store from others of its size and from one written again."""
    return {
        "store_id": store.attributes.get("store_id"),
        "identity_hash": store.attributes.get("identity_hash"),
        "n_samples": len(store),
        "proj_dtype": store.layout.proj_dtype,
        "layers": [asdict(layer) for layer in store.layers],
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
        f"{part}/{name}": tensor.contiguous()
        for part, curvature in curvatures.items()
        for name, tensor in vars(curvature).items()
    }
    text = json.dumps(settings)
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "settings": text,
        "crc32c": _checksum(text, tensors),
    }
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_and_replace(path, [save(tensors, metadata)])


def _checksum(settings: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of the settings and of every tensor with its name."""
    value = crc32c(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].contiguous().cpu().numpy().reshape(-1)
        value = crc32c(values.view(np.uint8), crc32c(name.encode(), value))
    return f"{value:08x}"


def read_curvature(path: Path) -> tuple[dict[str, Any], dict[str, Curvature]]:
    """Return the settings and each part's curvature.

    Raises:
        StoreError: no file, a damaged one, or one of another format version.
    """
    if not path.is_file():
        raise StoreError(f"there is no preconditioner at {path}; fit one and save it")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
            if version != str(FORMAT_VERSION):
                raise StoreError(
                    f"{path} has format {version}, this gradproj reads {FORMAT_VERSION}: fit it "
                    "again"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        if _checksum(metadata["settings"], tensors) != metadata["crc32c"]:
            raise ValueError("its checksum does not match")
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.rpartition("/")
            parts.setdefault(part, {})[name] = tensor
        curvatures: dict[str, Curvature] = {
            part: _TYPES[frozenset(of)](**of) for part, of in parts.items()
        }
        return json.loads(metadata["settings"]), curvatures
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and fit the preconditioner again"
        ) from error
