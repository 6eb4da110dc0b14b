"""Scores of a store's documents for queries: all of them, the best and worst, and each document's with itself.

Every scan streams: memory is bounded whatever the store's size, but for ``score``, whose answer is ``(Q, N)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.blocks import Block, chosen_layers, scan_blocks, width_of
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.errors import ConfigError
from gradproj.store import ProjectionStore

SIGN = "positive: training more on the document lowers the query's loss; negative: raises it"
_NATS = "nats of the query's loss (mean or sum over its tokens, as the store's rows)"
MEANINGS = {
    "kfac": "influence with the curvature taken from token covariances (K-FAC in the projected space): about how many "
    f"{_NATS} fall per unit of the document's weight in training, up to a factor that all documents share",
    "preconditioned": "influence with the curvature taken from the second moment of the rows: about how many "
    f"{_NATS} fall per unit of the document's weight in training, up to a factor that all documents share",
    "dot": f"inner product of the two projected gradients: about how many {_NATS} fall per unit of learning rate, in "
    "one plain gradient step on the document",
    "cosine": "cosine of the two projected gradients, without unit, from -1 to 1",
    "relatif": "influence divided by the square root of the document's influence on itself, so that documents with "
    "large gradients do not come first everywhere; comparable within a query only",
}
"""Score -> what it is, with its unit. ``SIGN`` holds for all."""

Rows = np.ndarray | Tensor


class How(TypedDict, total=False):
    """What every scan can be told besides the query and the store."""

    score: str
    """A key of ``MEANINGS``; default kfac."""
    preconditioner: Preconditioner | None
    """For kfac, preconditioned and relatif; default: fitted here, for relatif as kfac."""
    damping: float | str
    """Of the one that is fitted here; default ``auto``."""
    layers: Sequence[str] | None
    """Names; default all."""
    domains: Sequence[str] | None
    """Names of domains whose documents are scored; default all."""
    device: str | torch.device
    """Where the products are made; default ``cpu``."""
    progress: bool
    """Show a bar on standard error."""
    rows_per_block: int | None
    """Default: chosen for the device."""


@dataclass(frozen=True)
class TopDocuments:
    """The documents at one end of the scores, the outermost first; equal scores by sample id."""

    ids: Rows
    """``(Q, k)`` int64 sample ids."""
    scores: Rows
    """``(Q, k)`` float32."""
    n_scored: int
    """Documents that have a score; where they are fewer than were asked for, so is k."""


def score(
    query_rows: Rows, store: ProjectionStore, out: np.ndarray | None = None, **how: Unpack[How]
) -> Rows:
    """Every document's score for every query; ``MEANINGS`` and ``SIGN`` say what a score is.

    Args:
        query_rows: ``(Q, D)`` or ``(D,)``, of the store's row layout, or as wide as the chosen layers.
        store: finished or not.
        out: ``(Q, N)`` float32 to write into (a memory map, say), which is then given back.
        **how: see ``How``.

    Returns:
        ``(Q, N)`` float32, NaN for documents without a row (missing, empty, failed, of another domain); a tensor on
        the queries' device where the queries are one.

    Raises:
        ConfigError: an unknown score, layer or domain, or rows of another width.
        StoreError: a preconditioner of another store, or a store without what the score needs.
    """
    queries = _queries(query_rows)
    shape = (len(queries), len(store))
    scores = np.empty(shape, np.float32) if out is None else out
    if scores.shape != shape or scores.dtype != np.float32:
        raise ConfigError(f"out is {scores.dtype} {scores.shape}; these scores are float32 {shape}")
    for ids, values in iter_scores(queries, store, **how):
        scores[:, int(ids[0]) : int(ids[-1]) + 1] = values
    return _like(scores, query_rows) if out is None else out


def iter_scores(
    query_rows: Rows, store: ProjectionStore, **how: Unpack[How]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """``score`` a block of documents at a time: ``(ids (n,) int64, scores (Q, n) float32)``, in order of ids."""
    asked = Asked.of(store, how)
    question = asked.question(query_rows)
    for block in asked.blocks():
        values = question(block.rows).cpu().numpy()
        values[:, ~block.ok] = np.nan
        yield np.arange(block.first, block.first + len(block.ok), dtype=np.int64), values


def top_k(query_rows: Rows, store: ProjectionStore, k: int = 20, **how: Unpack[How]) -> TopDocuments:
    """The ``k`` documents with the highest scores for each query, the highest first; arguments as ``score``'s."""
    return top_and_bottom(query_rows, store, k, 0, **how)[0]


def bottom_k(query_rows: Rows, store: ProjectionStore, k: int = 20, **how: Unpack[How]) -> TopDocuments:
    """The ``k`` documents with the lowest scores for each query, the lowest first; arguments as ``score``'s."""
    return top_and_bottom(query_rows, store, 0, k, **how)[1]


def top_and_bottom(
    query_rows: Rows, store: ProjectionStore, n_top: int = 20, n_bottom: int = 20, **how: Unpack[How]
) -> tuple[TopDocuments, TopDocuments]:
    """Both ends of the scores in one scan.

    Raises:
        ConfigError: more documents wanted than the store has samples, or as ``score`` does.
    """
    for wanted in (n_top, n_bottom):
        if not 0 <= wanted <= len(store):
            raise ConfigError(f"{wanted:,} documents are asked for; {store.path} has {len(store):,}")
    asked = Asked.of(store, how)
    question = asked.question(query_rows)
    n_queries = len(_queries(query_rows))
    top, bottom = _Best(n_queries, n_top, asked.device), _Best(n_queries, n_bottom, asked.device)
    n_scored = 0
    for block in asked.blocks():
        values = question(block.ok_rows())
        there = ~values.isnan().any(dim=0)  # a shard may be gone whose rows are recorded as ok
        ids = torch.from_numpy(block.ids()).to(asked.device)[there]
        values = values[:, there]
        top.add(ids, values)
        bottom.add(ids, -values)
        n_scored += len(ids)

    def result(best: _Best, sign: int) -> TopDocuments:
        return TopDocuments(_like(best.ids, query_rows), _like(sign * best.values, query_rows), n_scored)

    return result(top, 1), result(bottom, -1)


def self_influence(store: ProjectionStore, out: np.ndarray | None = None, **how: Unpack[How]) -> np.ndarray:
    """Each document's score with itself: how much its own loss falls when it is trained on more.

    Args:
        store: finished or not.
        out: ``(N,)`` float32 to write into (a memory map, say).
        **how: see ``How``; the score is kfac, preconditioned or dot (the squared norm).

    Returns:
        ``(N,)`` float32, 0 or more; NaN for documents without a row.
    """
    asked = Asked.of(store, how)
    if asked.score not in ("kfac", "preconditioned", "dot"):
        raise ConfigError(
            f"the self-influence of score {asked.score!r} says nothing; take kfac, preconditioned or dot"
        )
    values = np.empty(len(store), np.float32) if out is None else out
    if values.shape != (len(store),) or values.dtype != np.float32:
        raise ConfigError(f"out is {values.dtype} {values.shape}; the answer is float32 {(len(store),)}")
    for block in asked.blocks():
        found = _self_products(block.rows, asked.preconditioner).cpu().numpy()
        values[block.first : block.first + len(found)] = np.where(block.ok, found, np.nan)
    return values


# --- what was asked, checked once ---


@dataclass(frozen=True)
class Asked:
    """A scan's settings, checked, with the preconditioner that its score needs."""

    store: ProjectionStore
    score: str
    preconditioner: Preconditioner | None
    layers: list[str]
    how: How
    device: torch.device

    @classmethod
    def of(cls, store: ProjectionStore, how: How) -> Asked:
        known = set(How.__annotations__)
        if set(how) - known:
            raise TypeError(f"no such argument: {min(set(how) - known)}")
        kind = how.get("score", "kfac")
        if kind not in MEANINGS:
            raise ConfigError(f"score is {kind!r}; choose one of {', '.join(MEANINGS)}")
        layers, device = chosen_layers(store, how.get("layers")), torch.device(how.get("device", "cpu"))
        found = _preconditioner(store, kind, layers, device, how)
        return cls(store, kind, found, layers, how, device)

    @property
    def width(self) -> int:
        """Values of a row of the chosen layers."""
        return width_of(self.store, self.layers)

    def blocks(self) -> Iterator[Block]:
        # A scan of whole rows is a shorter walk than one of every layer.
        layers = None if self.layers == chosen_layers(self.store, None) else self.layers
        return scan_blocks(
            self.store,
            layers,
            self.how.get("domains"),
            self.device,
            "scores" if self.how.get("progress") else None,
            self.how.get("rows_per_block"),
        )

    def question(self, query_rows: Rows) -> _Question:
        """What the rows are multiplied with."""
        queries = _of_layers(_queries(query_rows), self.store, self.layers)
        if not torch.isfinite(queries).all():
            raise ConfigError("a query's row has a value that is not finite: its text has no gradient")
        if self.preconditioner is not None:
            queries = self.preconditioner.solve(queries)
        elif self.score == "cosine":
            norms = queries.norm(dim=1, keepdim=True)
            queries = queries / torch.where(norms > 0, norms, 1.0)
        divisor = self.preconditioner if self.score == "relatif" else None
        return _Question(queries.float().to(self.device), self.score, divisor)


def _preconditioner(
    store: ProjectionStore, kind: str, layers: list[str], device: torch.device, how: How
) -> Preconditioner | None:
    given = how.get("preconditioner")
    if kind in ("dot", "cosine"):
        if given is not None:
            raise ConfigError(
                f"score {kind!r} takes no preconditioner; leave it out, or score by {given.kind}"
            )
        return None
    if given is None:
        fitted = "second_moment" if kind == "preconditioned" else "kfac"
        return Preconditioner.fit(
            store,
            fitted,
            how.get("damping", "auto"),
            layers,
            device=device,
            progress=how.get("progress", False),
        )
    wanted = {"kfac": "kfac", "preconditioned": "second_moment"}.get(kind, given.kind)
    if given.kind != wanted:
        raise ConfigError(f"score {kind!r} takes a preconditioner of kind {wanted}, this one is {given.kind}")
    given.check_store(store)
    given = given.for_layers(layers)
    return given.with_damping(how["damping"]) if "damping" in how else given


@dataclass(frozen=True)
class _Question:
    """Queries ready to be multiplied with rows."""

    weights: Tensor
    """``(Q, W)`` float32."""
    score: str
    divisor: Preconditioner | None

    def __call__(self, rows: Tensor) -> Tensor:
        """``(Q, n)`` float32 scores of rows ``(n, W)``."""
        products = self.weights @ rows.T
        if self.score == "cosine":
            # In float64, where no square of a float32 is lost.
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).float()
        elif self.divisor is not None:
            norms = self.divisor.self_products(rows).sqrt()
        else:
            return products
        return torch.where(norms == 0, 0.0, products / norms)


def _self_products(rows: Tensor, preconditioner: Preconditioner | None) -> Tensor:
    if preconditioner is None:
        return rows.square().sum(dim=1)
    return preconditioner.self_products(rows)


def _queries(query_rows: Rows) -> Tensor:
    """``(Q, D)`` float64 on the CPU."""
    rows = torch.as_tensor(query_rows).detach().to("cpu", torch.float64)
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not len(rows):
        raise ConfigError(f"query rows are {tuple(rows.shape)}; give (Q, D) or (D,), with at least one query")
    return rows


def _of_layers(queries: Tensor, store: ProjectionStore, layers: list[str]) -> Tensor:
    """The chosen layers' values of whole rows; rows of just these layers pass as they are."""
    if queries.shape[1] == store.dim:
        spans = {layer.name: (layer.slice_start, layer.slice_end) for layer in store.layers}
        return torch.cat([queries[:, slice(*spans[name])] for name in layers], dim=1)
    width = width_of(store, layers)
    if queries.shape[1] != width:
        of_layers = "" if width == store.dim else f" (or {width:,} for the layers asked)"
        raise ConfigError(
            f"query rows have {queries.shape[1]:,} values, those of {store.path} {store.dim:,}{of_layers}: make them "
            "with the store's own settings and matrices"
        )
    return queries


def _like(values: np.ndarray | Tensor, example: Rows) -> Rows:
    """A tensor on the example's device where that is one, else numpy."""
    if isinstance(example, Tensor):
        return torch.as_tensor(values).to(example.device)
    return values.cpu().numpy() if isinstance(values, Tensor) else values


class _Best:
    """The highest scores so far, and whose they are; equal ones by sample id."""

    def __init__(self, n_queries: int, k: int, device: torch.device) -> None:
        self._k = k
        self.ids = torch.empty(n_queries, 0, dtype=torch.int64, device=device)
        self.values = torch.empty(n_queries, 0, device=device)

    def add(self, ids: Tensor, values: Tensor) -> None:
        """Scores ``(Q, n)`` of documents ``(n,)`` whose ids follow those before."""
        if not self._k or not len(ids) or not self._changes(values):
            return
        both = torch.cat([self.values, values], dim=1)
        owners = torch.cat([self.ids, ids.expand(len(values), -1)], dim=1)
        order = both.argsort(dim=1, descending=True, stable=True)[:, : self._k]
        self.values, self.ids = both.gather(1, order), owners.gather(1, order)

    def _changes(self, values: Tensor) -> bool:
        """Most blocks of a long scan hold nothing better, and need no sorting."""
        return self.values.shape[1] < self._k or bool((values > self.values[:, -1:]).any())
