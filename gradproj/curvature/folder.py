"""Files of exact curvature beside a store: ``OUTPUT/curvature``, a recipe and two per layer."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import torch

from gradproj.analysis.tensor_file import read_settings, read_tensors, write_tensors
from gradproj.curvature.layer_curvature import LayerCurvature, Side
from gradproj.errors import StoreError, settings_mismatch
from gradproj.files import explain_os_errors
from gradproj.storage.contents import locked
from gradproj.storage.publish import replace
from gradproj.store import ProjectionStore
from gradproj.store.layout import CURVATURE_DIR

_FORMAT_VERSION = 1
_DEPENDS_ON = (
    "--model",
    "--revision",
    "--tokenizer",
    "--special_tokens",
    "--max_length",
    "--long_documents",
    "--domains",
    "--shards",
)
"""Beginnings of the settings of a store's identity that curvature depends on."""


class CurvatureFolder:
    """The curvature of one store's model, on a sample of the store's documents.

    A layer has a file of its factors' eigenvectors and eigenvalues (kfac), and one of EK-FAC's
    second moments, which are moments of coordinates along just those eigenvectors: it holds the
    checksum of its kfac file, and counts as missing beside another. ``recipe.json`` has the sample
    and what the curvature belongs to; its layers are those that were asked for, whether their files
    are there or not.
    """

    def __init__(self, store: ProjectionStore) -> None:
        self._store = store
        self.path = store.path.parent / CURVATURE_DIR
        self._command = f"python -m gradproj curvature {store.path.parent}"
        self._again = f"run `{self._command}` again"

    @contextmanager
    def locked(self) -> Iterator[Self]:
        """Make the folder and lock it for one ``gradproj curvature``.

        Raises:
            StoreError: another process has the lock, or the folder cannot be written.
        """
        with explain_os_errors(self.path):
            self.path.mkdir(exist_ok=True)
        with locked(self.path) as is_locked:
            if is_locked is False:
                raise StoreError(
                    f"another `gradproj curvature` measures in {self.path}: wait for it"
                )
            yield self

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.json"

    # --- recipe ---

    def recipe(self) -> dict[str, Any]:
        """Return the recipe.

        Raises:
            StoreError: there is none, it is damaged, or it belongs to another model or store.
        """
        if not self.recipe_path.is_file():
            raise StoreError(
                f"{self._store.path.parent} has no exact curvature yet, which --rescore needs: run "
                f"`{self._command}`"
            )
        try:
            recipe = json.loads(self.recipe_path.read_text(encoding="utf-8"))
            recipe["sample_ids"] = np.array(recipe["sample_ids"], np.int64)
            ours, theirs = dict(recipe["belongs_to"]), recipe["format_version"]
            list(recipe["layers"])
            int(recipe["curvature_tokens"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{self.recipe_path} is damaged ({error!r}): delete {self.path} and run "
                f"`{self._command}` again"
            ) from error
        if theirs != _FORMAT_VERSION:
            raise StoreError(
                f"{self.path} has format {theirs}, this gradproj reads {_FORMAT_VERSION}: delete "
                f"it and run `{self._command}` again"
            )
        mismatch = settings_mismatch(
            f"{self.path} does not belong to {self._store.path}: it was made with another model or "
            "other settings",
            ours,
            self._belongs_to(),
            f"Delete it and run `{self._command}` again.",
            labels=("curvature", "store"),
        )
        if mismatch:
            raise StoreError(mismatch)
        return recipe

    def begin(
        self, curvature_tokens: int, sample_ids: np.ndarray, n_tokens: int, layers: Sequence[str]
    ) -> None:
        """Write the recipe: the tokens wanted, the sample and its own, all layers asked for.

        The folder is locked by the caller.
        """
        recipe = {
            "format_version": _FORMAT_VERSION,
            "belongs_to": self._belongs_to(),
            "curvature_tokens": curvature_tokens,
            "n_tokens": n_tokens,
            "n_documents": len(sample_ids),
            "layers": list(layers),
            "sample_ids": sample_ids.tolist(),
        }
        replace(self.recipe_path, [json.dumps(recipe).encode()])

    def _belongs_to(self) -> dict[str, Any]:
        attributes = self._store.attributes
        identity = attributes.get("identity", {})
        settings = {name: value for name, value in identity.items() if name.startswith(_DEPENDS_ON)}
        of_store = {"store_id": attributes.get("store_id"), "n_samples": len(self._store)}
        return json.loads(json.dumps({**settings, **of_store}))

    # --- layers ---

    def lacking(self, layers: Sequence[str], kind: str) -> list[str]:
        """Return the layers without a file of this kind; second moments need their own factors."""
        return [name for name in layers if not self._has(name, kind)]

    def _has(self, layer: str, kind: str) -> bool:
        files = [self._file(layer, k) for k in (["kfac"] if kind == "kfac" else ["kfac", "ekfac"])]
        if not all(file.is_file() for file in files):
            return False
        return kind == "kfac" or self._measured_in(layer) == self.factors_sum(layer)

    def factors_sum(self, layer: str) -> str:
        """Return the checksum of a layer's kfac file."""
        return read_settings(self._file(layer, "kfac"), self._again)[1]

    def _measured_in(self, layer: str) -> str | None:
        """Return the checksum of the kfac file whose eigenvectors a layer's moments belong to."""
        settings, _ = read_settings(self._file(layer, "ekfac"), self._again)
        return settings.get("factors")

    def write_factors(self, layer: str, i: Side, o: Side) -> None:
        sides = {"i": i, "o": o}
        tensors = {f"{name}.values": side.values.cpu() for name, side in sides.items()}
        for name, side in sides.items():
            if side.basis is not None:
                tensors[f"{name}.basis"] = side.basis.cpu()
        write_tensors(self._file(layer, "kfac"), {"layer": layer}, tensors)

    def write_second_moments(self, layer: str, moments: torch.Tensor, factors_sum: str) -> None:
        """Write second moments along the eigenvectors of the kfac file with this checksum."""
        tensors = {"second_moments": moments.float().cpu()}
        write_tensors(self._file(layer, "ekfac"), {"layer": layer, "factors": factors_sum}, tensors)

    def read(self, layer: str, kind: str) -> LayerCurvature:
        """Read one layer, on the CPU.

        Raises:
            StoreError: a file is missing or damaged, or the second moments belong to other
                eigenvectors.
        """
        factors = self._read(layer, "kfac")
        i, o = (Side(factors[f"{s}.values"], factors.get(f"{s}.basis")) for s in ("i", "o"))
        if kind == "kfac":
            return LayerCurvature(i, o, None)
        moments = self._read(layer, "ekfac")["second_moments"]
        if not self._has(layer, "ekfac"):
            raise StoreError(
                f"{self._file(layer, 'ekfac')} was measured along other eigenvectors than those of "
                f"{self._file(layer, 'kfac').name}: {self._again}, which measures it again"
            )
        return LayerCurvature(i, o, moments.double())

    def _read(self, layer: str, kind: str) -> dict[str, torch.Tensor]:
        path = self._file(layer, kind)
        if not path.is_file():
            raise StoreError(
                f"{self.path} has no {kind} curvature of layer {layer}: run `{self._command}`, "
                "which computes what is missing"
            )
        _, tensors = read_tensors(path, self._again)
        return tensors

    def _file(self, layer: str, kind: str) -> Path:
        return self.path / f"{quote(layer, safe='')}.{kind}.safetensors"
