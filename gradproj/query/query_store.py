"""Rows of another job's store as queries (``--query_store``), if the two are comparable."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np

from gradproj.errors import ConfigError, settings_mismatch
from gradproj.formatting import escaped
from gradproj.query import QueryRows, check_rows_fit
from gradproj.query.hidden import states_of_store
from gradproj.query.projector import entry_bytes
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.head_rows import HEAD_MATRIX, HEAD_SCALE, HeadQueries

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
    "--matrices",
    "--basis",
    "--pilot_tokens",
    "--basis_from",
)
_MATRICES = "layers, projection matrices or basis"
_HEAD = "matrix or scale of head rows"


def rows_of_query_store(queries: ProjectionStore, store: ProjectionStore) -> QueryRows:
    """Return every row of status ok, named by its key.

    The sample id is appended to a key that is empty or repeated. Head rows are those of two stores
    that both have them; else the layers alone are comparable.

    Raises:
        ConfigError: the stores differ in model, matrices or loss reduction, or there is no row, or
            the rows do not fit the memory allowed for queries.
    """
    check_comparable(queries, store)
    ids = np.flatnonzero(queries.column("status") == STATUS["ok"])
    if not len(ids):
        raise ConfigError(f"--query_store {queries.path} has no row, so there is no query")
    head_rows = queries.head if store.head is not None else None
    check_rows_fit(
        f"--query_store {queries.path}",
        len(ids),
        queries.dim,
        0 if head_rows is None else head_rows.segment.n_rows * entry_bytes(head_rows.segment.k),
        "Query some at a time in Python: gradproj.analysis.top_k(other.rows(ids), store, k)",
    )
    samples = queries.samples(ids)
    keys = Counter(sample.key for sample in samples)
    names = [
        escaped(s.key) if s.key and keys[s.key] == 1 else f"{escaped(s.key)}#{s.sample_id}"
        for s in samples
    ]
    n_tokens, loss = (
        np.array([getattr(sample, name) for sample in samples]) for name in ("n_tokens", "loss")
    )
    head = None
    if head_rows is not None:
        rows = head_rows.rows(ids)
        head = HeadQueries(rows.ids, rows.values(head_rows.segment.k))
    losses, excerpts = loss.astype(np.float64), [""] * len(ids)
    hidden = states_of_store(queries, store, ids)
    return QueryRows(names, queries.rows(ids), n_tokens, losses, excerpts, head=head, hidden=hidden)


def check_comparable(queries: ProjectionStore, store: ProjectionStore) -> None:
    """Reject a query store whose rows are not comparable; the two corpora may differ.

    Raises:
        ConfigError: every difference in model, loss reduction and projection.
    """
    theirs, ours = (_comparable_settings(each) for each in (queries, store))
    names = list(_SAME)
    if theirs[_MATRICES] != ours[_MATRICES]:
        # Name the flags that explain it, if there are any.
        names += [n for n in _PROJECTION if theirs.get(n) != ours.get(n)] or [_MATRICES]
    elif theirs.get(_HEAD, ours.get(_HEAD)) != ours.get(_HEAD, theirs.get(_HEAD)):
        names.append(_HEAD)
    basis = f", its basis by --basis_from {store.path.parent}" if store.basis else ""
    mismatch = settings_mismatch(
        f"--query_store {queries.path} does not fit {store.path}: their rows are not comparable",
        theirs,
        {name: ours.get(name) for name in names},
        f"Make the query store with the store's model and settings{basis}, or give its texts by "
        "--queries; gradproj.analysis takes any rows.",
        labels=("queries", "store"),
        show=_short,
    )
    if mismatch:
        raise ConfigError(mismatch)


def _comparable_settings(store: ProjectionStore) -> dict[str, Any]:
    """Return the store's identity with digests of its layers, matrices and basis, and of its head.

    The latter only if there are head rows.
    """
    layers = [
        {name: value for name, value in vars(layer).items() if not name.startswith("stored_")}
        for layer in store.layers  # rows of any encoding are comparable
    ]
    arrays = ["projection_matrices", *(["basis_matrices"] if store.basis is not None else [])]
    digests = {_MATRICES: _digest(store, arrays, json.dumps(layers).encode())}
    if store.head is not None:
        digests[_HEAD] = _digest(store, [HEAD_MATRIX, HEAD_SCALE])
    return {**store.attributes.get("identity", {}), **digests}


def _digest(store: ProjectionStore, arrays: list[str], start: bytes = b"") -> str:
    digest = hashlib.sha256(start)
    for name in arrays:
        digest.update(np.ascontiguousarray(store.array(name)).data)
    return digest.hexdigest()[:32]


def _short(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 32 else repr(value)
