"""Small stores, and the slow, dense float64 way to every score over them."""

from pathlib import Path

import numpy as np
from helpers.encoding import encode
from helpers.stores import Output, make_layers

from gradproj import ProjectionStore
from gradproj.store.layer_arrays import pack_layers
from gradproj.store.layout import STATUS, StoreConfig
from gradproj.store.writer import update_attributes, write_array, write_column_block

WIDTHS = ((2, 3), (4, 2), (3, 3))
NAMES = [layer.name for layer in make_layers(list(WIDTHS))]
N_SAMPLES, N_TOKENS = 70, 900
PILOT_DAMPING = 0.03
# Rows 32 to 47 are missing, and two documents have no text.
MISSING_UNIT, EMPTY = 2, (5, 40 + 25)


def make_store(
    path: Path,
    proj_dtype: str = "float32",
    sizes: float = 1.0,
    eigen: bool = False,
    loss_reduction: str = "sum",
    **settings: object,
) -> Output:
    """Write 70 rows in shards of 16, one unit missing, two rows empty.

    The store has token covariances, or with ``eigen`` the eigenvalues of a basis.
    """
    if settings.get("encoding", "dense") == "dense":
        settings["proj_dtype"] = proj_dtype
    output = Output(
        path,
        N_SAMPLES,
        WIDTHS,
        StoreConfig(**{"encoding": "dense", "rows_per_shard": 16, **settings}),
    )
    generator = np.random.default_rng(7)
    scale = sizes ** generator.uniform(-1, 1, (N_SAMPLES, 1))
    # Layers of different scales and correlated values, so that a preconditioner changes scores.
    mixed = generator.standard_normal((N_SAMPLES, output.layout.dim)) @ generator.standard_normal(
        (output.layout.dim, output.layout.dim)
    )
    mixed[:, 6:14] *= 50
    output.rows = (mixed * scale).astype(np.float32)
    output.stored, output.row_scale = encode(output.rows, output.layout, output.layers)
    units = [unit for unit in range(output.layout.n_units) if unit != MISSING_UNIT]
    for unit in units:
        output.commit(unit)
    output.merge(units)
    with ProjectionStore(path) as store:
        status = store.column("status")
    status[list(EMPTY)] = STATUS["empty"]
    norms = np.linalg.norm(output.rows.astype(float), axis=1).astype(np.float32)
    columns = {"status": status, "grad_norm": norms}
    write_column_block(output.store_path, output.layout, 0, columns)
    about = {"store_id": str(path), "identity": {"--loss_reduction": loss_reduction}}
    if eigen:
        pairs = {
            x.name: (generator.random(x.k_i) ** 4, generator.random(x.k_o) ** 4)
            for x in output.layers
        }
        flat = pack_layers("basis_eigenvalues", output.layers, pairs)
        write_array(output.store_path, "basis_eigenvalues", flat)
        about["basis"] = {"kind": "eigen", "damping": PILOT_DAMPING, "tokens": N_TOKENS}
        update_attributes(output.store_path, about)
        return output
    for name, sides in (("s", [k_o for k_o, _ in WIDTHS]), ("a", [k_i for _, k_i in WIDTHS])):
        flat = [
            tokens.T @ tokens
            for side in sides
            for tokens in [generator.standard_normal((N_TOKENS, side))]
        ]
        write_array(
            output.store_path, f"token_covariance_{name}", np.concatenate([m.ravel() for m in flat])
        )
    update_attributes(output.store_path, {"covariance_tokens": N_TOKENS, **about})
    return output


def rewrite_rows(output: Output) -> None:
    """Write ``output.stored`` and ``output.row_scale`` to the store again."""
    for unit in range(output.layout.n_units):
        if unit != MISSING_UNIT:
            (output.path / output.layout.shard_name(unit)).unlink()
            output.commit(unit)
    with ProjectionStore(output.path) as store:
        present = store.column("status") > 0
    row_scale = np.where(present, output.row_scale, np.nan).astype(np.float32)
    write_column_block(output.store_path, output.layout, 0, {"row_scale": row_scale})


def columns_of(layers: list[str] | None) -> np.ndarray:
    """Return the positions of the layers' values in a row, layer by layer."""
    chosen = {layer.name: layer for layer in make_layers(list(WIDTHS))}
    return np.concatenate(
        [np.arange(chosen[name].slice_start, chosen[name].slice_end) for name in layers or NAMES]
    )


def ok_rows(output: Output) -> np.ndarray:
    """Return ``(N,)`` bool: documents with a row and a gradient."""
    ok = np.ones(N_SAMPLES, bool)
    ok[MISSING_UNIT * 16 : MISSING_UNIT * 16 + 16] = False
    ok[list(EMPTY)] = False
    return ok


def dense_curvature(
    output: Output, kind: str, c: float, layers: list[str] | None = None
) -> np.ndarray:
    """Return the damped curvature of all chosen values as one block-diagonal float64 matrix."""
    rows = output.decoded().astype(np.float64)[ok_rows(output)]
    with ProjectionStore(output.path) as store:
        eigenvalues = store.basis_eigenvalues
        if eigenvalues is None:
            s, a = (store.array(f"token_covariance_{name}") / N_TOKENS for name in "sa")
        else:  # the covariances are diagonal in their eigenbasis
            a, s = (
                np.concatenate([np.diag(pair[side]).ravel() for pair in eigenvalues.values()])
                for side in (0, 1)
            )
    at_s = at_a = 0
    blocks = {}
    for layer, (k_o, k_i) in zip(make_layers(list(WIDTHS)), WIDTHS, strict=True):
        s_l, a_l = (
            s[at_s : at_s + k_o**2].reshape(k_o, k_o),
            a[at_a : at_a + k_i**2].reshape(k_i, k_i),
        )
        at_s, at_a = at_s + k_o**2, at_a + k_i**2
        if kind == "kfac":
            blocks[layer.name] = np.kron(damped(s_l, c), damped(a_l, c))
            if eigenvalues is not None:  # rows were divided by the roots of the pilot's
                pilot = np.kron(damped(s_l, PILOT_DAMPING), damped(a_l, PILOT_DAMPING))
                blocks[layer.name] /= np.where(pilot, pilot, 1)
        elif kind == "ekfac":
            x = rows[:, layer.slice_start : layer.slice_end]
            basis = np.kron(np.linalg.eigh(s_l)[1], np.linalg.eigh(a_l)[1])
            weights = np.ones(len(basis))
            if eigenvalues is not None:  # the rows are in their basis, with weights
                pilot = np.kron(damped(s_l, PILOT_DAMPING), damped(a_l, PILOT_DAMPING))
                basis, weights = np.eye(len(basis)), np.diagonal(pilot) ** -0.5
            moments = ((x / weights @ basis) ** 2).mean(0)
            middle = np.diag(moments + c * moments.mean())
            blocks[layer.name] = weights[:, None] * (basis @ middle @ basis.T) * weights
        elif kind == "plain":
            pilot = np.kron(damped(s_l, PILOT_DAMPING), damped(a_l, PILOT_DAMPING))
            blocks[layer.name] = np.diag(1 / np.diagonal(pilot))
        else:
            x = rows[:, layer.slice_start : layer.slice_end]
            blocks[layer.name] = damped(x.T @ x / len(x), c)
    names = layers or NAMES
    width = sum(len(blocks[name]) for name in names)
    whole, at = np.zeros((width, width)), 0
    for name in names:
        end = at + len(blocks[name])
        whole[at:end, at:end] = blocks[name]
        at = end
    return whole


def damped(matrix: np.ndarray, c: float) -> np.ndarray:
    return matrix + c * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def dense_scores(
    output: Output,
    queries: np.ndarray,
    score: str,
    c: float,
    layers: list[str] | None = None,
    kind: str = "kfac",
) -> np.ndarray:
    """Return ``(Q, N)`` float64 scores by their definitions, NaN without a row."""
    columns = columns_of(layers)
    rows = output.decoded().astype(np.float64)[:, columns]
    queries = queries.astype(np.float64)[:, columns]
    with ProjectionStore(output.path) as store:
        is_weighted = store.basis_eigenvalues is not None
    if is_weighted and score in ("dot", "cosine"):
        # Those of the plain gradients, which the rows are weights times.
        root = np.diagonal(dense_curvature(output, "plain", 0, layers)) ** -0.5
        rows, queries = rows * root, queries * root
    if score == "dot":
        values = queries @ rows.T
    elif score == "cosine":
        values = (
            queries
            @ rows.T
            / np.linalg.norm(queries, axis=1)[:, None]
            / np.linalg.norm(rows, axis=1)
        )
    else:
        kinds = {"kfac": "kfac", "ekfac": "ekfac", "preconditioned": "second_moment"}
        kind = kinds.get(score, kind)
        inverse = np.linalg.inv(dense_curvature(output, kind, c, layers))
        values = queries @ inverse @ rows.T
        if score == "relatif":
            values /= np.sqrt(np.einsum("nd,de,ne->n", rows, inverse, rows))
    values[:, ~ok_rows(output)] = np.nan
    return values
