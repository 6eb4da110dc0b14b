"""The identity of a run: every setting that a row depends on, recorded in the store."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradproj.errors import OtherSettingsError, settings_mismatch
from gradproj.job.config import RunConfig
from gradproj.storage.object_path import names_in
from gradproj.store.layout import PARTIAL_DIR, STORE_NAME, UNITS_DIR, StoreConfig, StoreLayout
from gradproj.store.metadata import read_attributes, store_exists
from gradproj.store.texts import DOCUMENT_FORMS
from gradproj.store.unit_record import list_records

FORMAT_1 = {
    "--encoding": "dense",
    "--basis": "random",
    "--head_rows": "0",
    "--hidden_state": "none",
    "--loss_on": "assistant",
    "--truncate_side": "right",
    "--chat_template": "",
    "--preference_beta": 0.1,
    "--quantize": "",
    "--experts": "none",
}
"""Values of flags that format 1 did not have. An identity names them only if it has others, so that
a store of format 1 has the identity of its job's settings today."""


def identity_of_flags(config: RunConfig, layout: StoreLayout) -> dict[str, Any]:
    """Return the flags that a row depends on, after defaults are filled in."""
    projection, model, batch = config.projection, config.model, config.batch
    later: dict[str, Any] = {"--encoding": layout.encoding, "--basis": projection.basis}
    later["--experts"] = projection.experts
    later["--head_rows"] = config.head.head_rows
    later["--hidden_state"] = config.store.hidden_state
    later["--quantize"] = model.quantize
    later |= config.rules.identity()
    if config.head.head_rows != "0":
        later["--head_damping"] = config.head.head_damping
    if projection.basis != "random" and not projection.basis_from:
        later["--pilot_tokens"] = projection.pilot_tokens
    return {
        "--revision": model.revision,
        "--special_tokens": model.special_tokens,
        "--model_dtype": model.model_dtype,
        "--max_length": batch.max_length,
        "--long_documents": batch.long_documents,
        "--loss_reduction": batch.loss_reduction,
        "--proj_layers": projection.layers,
        "--proj_rank_total": projection.rank_total,
        "--proj_rank_min": projection.rank_min,
        "--proj_seed": projection.seed,
        "--proj_kind": projection.kind,
        "--include_embeddings": projection.include_embeddings,
        "--proj_dtype": layout.proj_dtype,
        "--compressor": layout.compressor,
        "--rows_per_shard": layout.rows_per_shard,
        "--max_samples": layout.n_samples,
        "--domains": list(config.corpus.chosen_domains),
        "--max_document_bytes": config.limits.max_document_bytes,
        "--max_json_depth": config.limits.max_json_depth,
        **{name: value for name, value in later.items() if FORMAT_1.get(name) != value},
    }


def identity_hash(identity: dict[str, Any]) -> str:
    """Return a 32-character digest of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def is_untouched(output: Path) -> bool:
    """Return whether no row was ever computed in an output; it may have a job's empty store.

    That is left if the first check of a model refuses it. Nothing else may be lost with it.
    """
    store = output / STORE_NAME
    if list_records(output / UNITS_DIR).size or any((output / PARTIAL_DIR).glob("*")):
        return False
    if not store_exists(output):
        return True
    is_jobs = not store.is_symlink() and "wanted_units" in read_attributes(store)
    return is_jobs and names_in(store / "projections") == ["zarr.json"]


def reads_texts_only(output: Path, identity_hash: str) -> bool:
    """Return whether a start with this identity continues a store that knows no forms of documents.

    A version before them began it, and read what is a prompt or a conversation today otherwise.
    """
    store = output / STORE_NAME
    if not store_exists(output):
        return False
    attributes = read_attributes(store)
    # An empty store of another identity is replaced.
    is_replaced = is_untouched(output) and attributes.get("identity_hash") != identity_hash
    return DOCUMENT_FORMS not in attributes and not is_replaced


def store_to_plan(config: RunConfig) -> StoreConfig:
    """Return the settings of the form; those of a store that is begun keep its shards' rows.

    How many rows a shard has by default depends on the version that began the store.
    """
    output = config.output
    if config.store.rows_per_shard or is_untouched(output) or not store_exists(output):
        return config.store
    recorded = read_attributes(output / STORE_NAME).get("identity", {})
    return replace(config.store, rows_per_shard=recorded.get("--rows_per_shard", 0))


def check_identity(store: Path, ours: dict[str, Any]) -> None:
    """Raise ``OtherSettingsError`` with every setting that differs from an existing store's."""
    if not store_exists(store.parent):
        return
    theirs, ours = FORMAT_1 | read_attributes(store)["identity"], FORMAT_1 | ours
    way_out = "Run with the store's settings, or give --output_dir a new path."
    every = {**dict.fromkeys(theirs), **ours}
    # The layers follow from other settings. If one of those differs, the long list would hide it.
    flags = {name: value for name, value in every.items() if name != "layers"}
    for settings in (flags, every):
        mismatch = settings_mismatch(
            f"cannot add to {store}: it was made with other settings",
            theirs,
            settings,
            way_out,
        )
        if mismatch:
            raise OtherSettingsError(mismatch)
