"""A preconditioner's file beside its store: the curvature, the settings, and which store they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gradproj.analysis.curvature import Curvature, Dense, Kronecker, Truncated
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore
from gradproj.store.files import explain_os_errors, write_and_replace

FORMAT_VERSION = 1
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
    ours = identity_of(store)
    names = [name for name in ours if recorded.get(name) != ours[name]]
    if names:
        lines = [
            f"  {name}: fitted on {_short(recorded.get(name))}, this store {_short(ours[name])}"
            for name in names
        ]
        raise StoreError(
            f"{what} is not of {store.path}: it was fitted on another store\n" + "\n".join(lines) + "\n"
            "Fit one on this store."
        )


def _short(value: Any) -> str:
    return f"{len(value)} layers ({value[0]['name']}, ...)" if isinstance(value, list) else repr(value)


def write_curvature(path: Path, settings: dict[str, Any], curvatures: Mapping[str, Curvature]) -> None:
    """Publish the file whole or not at all."""
    tensors = {
        f"{part}/{name}": tensor.contiguous()
        for part, curvature in curvatures.items()
        for name, tensor in curvature.tensors().items()
    }
    about = {"format_version": str(FORMAT_VERSION), "settings": json.dumps(settings)}
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_and_replace(path, [save(tensors, about)])


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
            parts: dict[str, dict[str, Any]] = {}
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part, _, name = key.rpartition("/")
                parts.setdefault(part, {})[name] = file.get_tensor(key)
        settings = json.loads(about["settings"])
        return settings, {part: _TYPES[frozenset(tensors)](**tensors) for part, tensors in parts.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(
            f"{path} is damaged ({error}): delete it and fit the preconditioner again"
        ) from error
