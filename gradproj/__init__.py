"""Per-sample projected gradients of a whole corpus, in one shared Zarr array."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradproj.engine.engine import GradProjLoraEngine
    from gradproj.engine.loss import per_sample_loss
    from gradproj.engine.projection import choose_ki_ko
    from gradproj.store.reader import ProjectionStore

__all__ = ["GradProjLoraEngine", "ProjectionStore", "choose_ki_ko", "per_sample_loss"]

_HOMES = {
    "GradProjLoraEngine": "gradproj.engine.engine",
    "ProjectionStore": "gradproj.store.reader",
    "choose_ki_ko": "gradproj.engine.projection",
    "per_sample_loss": "gradproj.engine.loss",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: a store's reader needs no torch, an index worker no transformers.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gradproj' has no attribute {name!r}")
