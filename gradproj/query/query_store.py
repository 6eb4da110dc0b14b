"""``--query_store``: the rows of another output as queries, once they are known to mean the same."""

from collections import Counter
from typing import Any

import numpy as np

from gradproj.errors import ConfigError
from gradproj.query import QueryRows, check_rows_fit
from gradproj.store import STATUS, ProjectionStore

_SAME = (
    "--model (weights)",
    "--model (config)",
    "--model (adapter)",
    "--tokenizer",
    "--loss_reduction",
)
_PROJECTION = (
    "--proj_seed",
    "--proj_kind",
    "--proj_layers",
    "--proj_rank_total",
    "--proj_rank_min",
    "--include_embeddings",
)


def rows_of_query_store(queries: ProjectionStore, store: ProjectionStore) -> QueryRows:
    """Every row of status ok, by its key; of a key that is empty or comes twice, with the sample's id.

    Raises:
        ConfigError: the two were made with another model, other matrices or another reduction, or there is no row, or
            more of them than are asked at once.
    """
    differences = differences_of(queries, store)
    if differences:
        raise ConfigError(
            f"--query_store {queries.path} cannot be asked of {store.path}: their rows do not mean the same\n"
            + "\n".join(differences)
            + "\nMake the queries' output with the store's model and settings; gradproj.analysis takes any rows."
        )
    ids = np.flatnonzero(queries.column("status") == STATUS["ok"])
    if not len(ids):
        raise ConfigError(f"--query_store {queries.path} has no row yet, so it asks nothing")
    check_rows_fit(
        f"--query_store {queries.path}",
        len(ids),
        queries.dim,
        "Ask some at a time in Python: gradproj.analysis.top_k(other.rows(ids), store, k)",
    )
    samples = queries.samples(ids)
    keys = Counter(sample.key for sample in samples)
    names = [s.key if s.key and keys[s.key] == 1 else f"{s.key}#{s.sample_id}" for s in samples]
    n_tokens, loss = (
        np.array([getattr(sample, name) for sample in samples]) for name in ("n_tokens", "loss")
    )
    return QueryRows(names, queries.rows(ids), n_tokens, loss.astype(np.float64), [""] * len(ids))


def differences_of(queries: ProjectionStore, store: ProjectionStore) -> list[str]:
    """A line for each thing that makes rows of the two mean something else; their corpora may differ."""
    theirs, ours = (s.attributes.get("identity", {}) for s in (queries, store))
    lines = [_line(name, theirs, ours) for name in _SAME if theirs.get(name) != ours.get(name)]
    if not _same_projection(queries, store):
        flags = [
            _line(name, theirs, ours) for name in _PROJECTION if theirs.get(name) != ours.get(name)
        ]
        lines += flags or ["  layers or projection matrices"]
    return lines


def _same_projection(queries: ProjectionStore, store: ProjectionStore) -> bool:
    if [vars(layer) for layer in queries.layers] != [vars(layer) for layer in store.layers]:
        return False
    return np.array_equal(queries.array("projection_matrices"), store.array("projection_matrices"))


def _line(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    return f"  {name}: queries {_short(theirs.get(name))}, store {_short(ours.get(name))}"


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 32 else repr(value)
