"""The attributes of a job's store."""

import importlib.metadata
from dataclasses import asdict
from typing import Any

from gradproj.coordinator.merge import ranges_of
from gradproj.job.head import head_attribute
from gradproj.job.plan import Plan
from gradproj.model.loading import model_quantization
from gradproj.store.encoding import row_formula
from gradproj.store.hidden_states import HIDDEN_STATE
from gradproj.store.texts import DOCUMENT_FORMS


def attributes_of(plan: Plan) -> dict[str, Any]:
    """Return the attributes of the store's group."""
    projection, model = plan.config.projection, plan.config.model
    quantization = model_quantization(plan.files)
    drawn_by = {"kind": "given", "seed": None} if projection.matrices else {}
    return {
        "layers": [asdict(layer) for layer in plan.layers],
        "domains": list(plan.index.domains),
        "identity": plan.identity,
        "identity_hash": plan.identity_hash,
        "wanted_units": ranges_of(plan.wanted),
        DOCUMENT_FORMS: True,
        "complete": False,
        "how_to_read": f"{row_formula(plan.layout)}; NaN = not there; status 1 = ok",
        "projection": asdict(projection) | drawn_by,
        "selection": asdict(plan.coverage),
        **head_attribute(plan.config, plan.head),
        **hidden_attribute(plan),
        "model": {
            **asdict(model),
            "revision": plan.files.revision or model.revision,
            "quantization": quantization.name if quantization else "",
            "max_length": plan.config.batch.max_length,
            "long_documents": plan.config.batch.long_documents,
            "loss_reduction": plan.config.batch.loss_reduction,
        },
        "corpus": {
            "n_samples": plan.layout.n_samples,
            "n_tars": len(plan.index.tars),
            "fingerprint": plan.index.fingerprint,
            "domain_field": plan.index.domain_field,
            "tars": str(plan.index.tars[0].path.parent.resolve()),
        },
        "versions": versions(),
    }


def hidden_attribute(plan: Plan) -> dict[str, Any]:
    """Return the attribute ``hidden_state`` of a store, if it has hidden states."""
    if not plan.layout.hidden_width:
        return {}
    return {HIDDEN_STATE: {"kind": plan.config.store.hidden_state}}


def versions() -> dict[str, str]:
    names = ("gradproj", "torch", "transformers", "tokenizers", "webdataset", "zarr", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
