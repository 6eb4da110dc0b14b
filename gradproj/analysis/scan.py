"""Scan options, and queries prepared for multiplication with rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.reduction import DEFAULT_REDUCTION, check_reduction, reduction_factors
from gradproj.analysis.row_blocks import (
    Block,
    chosen_layers,
    rank_range,
    scan_blocks,
    scan_world,
    width_of,
)
from gradproj.analysis.row_norms import GivenNorms, RowNorms, norms_without_rows
from gradproj.analysis.score_types import DEFAULT_SCORE, HEAD_SUMS, SCORES
from gradproj.distributed import World
from gradproj.errors import ConfigError
from gradproj.kernels.device_copy import to_device
from gradproj.store import ProjectionStore
from gradproj.store.head_rows import HeadQueries

Rows = np.ndarray | Tensor


class ScanOptions(TypedDict, total=False):
    """Options shared by all scans."""

    score: str
    """A key of ``SCORES``; default ``DEFAULT_SCORE``."""
    preconditioner: Preconditioner | None
    """For scores with a curvature; default: fitted for the scan, as kfac for relatif."""
    damping: float | str
    """Damping of the preconditioner; default: the given one's own, or ``auto``."""
    layers: Sequence[str] | None
    """Layer names; default all."""
    domains: Sequence[str] | None
    """Names of the domains whose documents are scored; default all."""
    device: str | torch.device
    """Device of the products; default ``cpu``."""
    progress: bool
    """Show a progress bar on standard error."""
    rows_per_block: int | None
    """Default: chosen for the device."""
    reduction: str
    """Loss of the documents' rows: ``sum`` over a document's target tokens (default) or their
    ``mean``. Rows of either kind are converted exactly by ``n_tokens``. Does not change relatif and
    cosine, which divide by the row."""
    self_influences: np.ndarray
    """For relatif: ``r C^-1 r`` of every row by this preconditioner, ``(N,)`` float32, which are
    then not computed; see ``norm_cache.py``."""
    head: HeadQueries | None
    """The queries' head rows, whose scores are added to those of the layers; for kfac."""
    head_sum: str
    """``plain`` (default), or ``equal``: head and layers with the same deviation, per query."""
    together: bool
    """For ``top_k``, ``bottom_k`` and ``top_and_bottom``: every rank of ``torch.distributed``
    makes the call, scans its share of the units and returns the whole answer. The ranks also fit a
    missing preconditioner together."""


@dataclass(frozen=True)
class Scan:
    """Validated scan options, with the preconditioner that the score needs."""

    store: ProjectionStore
    score: str
    preconditioner: Preconditioner | None
    layers: list[str]
    options: ScanOptions
    device: torch.device
    world: World
    norms: RowNorms | None
    """Norms of the rows by ``preconditioner`` if they can be had without the rows."""

    @classmethod
    def alone(
        cls,
        store: ProjectionStore,
        options: ScanOptions,
        caller: str,
        scores: Sequence[str] = tuple(SCORES),
    ) -> "Scan":
        """Like ``of``, for functions of one process that support only some scores."""
        if options.get("together"):
            raise ConfigError(
                f"{caller} does not take together; top_k, bottom_k and top_and_bottom do"
            )
        score = options.get("score", DEFAULT_SCORE)
        if score in SCORES and score not in scores:
            raise ConfigError(
                f"{caller} does not support score {score!r}; choose one of {', '.join(scores)}"
            )
        return cls.of(store, options)

    @classmethod
    def of(cls, store: ProjectionStore, options: ScanOptions) -> "Scan":
        """Check the options and fit the preconditioner if the score needs one and none is given."""
        unknown = set(options) - set(ScanOptions.__annotations__)
        if unknown:
            raise TypeError(f"no such argument: {min(unknown)}")
        score = options.get("score", DEFAULT_SCORE)
        if score not in SCORES:
            raise ConfigError(f"score is {score!r}; choose one of {', '.join(SCORES)}")
        layers = chosen_layers(store, options.get("layers"))
        device = torch.device(options.get("device", "cpu"))
        check_reduction(options.get("reduction", DEFAULT_REDUCTION))
        _check_head(store, options)
        preconditioner = _preconditioner(store, score, layers, options)
        world = scan_world(options.get("together", False))
        given = options.get("self_influences")
        norms = norms_without_rows(store, layers, preconditioner)
        if given is not None and SCORES[score].divisor == "self_influence":
            norms = GivenNorms(given)
        return cls(store, score, preconditioner, layers, options, device, world, norms)

    @property
    def width(self) -> int:
        """Values of the chosen layers in a row."""
        return width_of(self.store, self.layers)

    @property
    def scanned_layers(self) -> list[str] | None:
        """The chosen layers, or None for all: whole rows are read faster than layer by layer."""
        return None if self.layers == chosen_layers(self.store, None) else self.layers

    @property
    def progress_label(self) -> str | None:
        """Label of the progress bar; None for no bar."""
        return "scores" if self.options.get("progress") and self.world.rank == 0 else None

    def blocks(self) -> Iterator[Block]:
        """Yield this process's share of the rows, decoded."""
        start, stop = rank_range(self.store, self.world)
        return scan_blocks(
            self.store,
            self.scanned_layers,
            self.options.get("domains"),
            self.device,
            self.progress_label,
            self.options.get("rows_per_block"),
            start,
            stop,
        )

    def reduced_blocks(self) -> Iterator[Block]:
        """Yield ``blocks`` with the rows of the reduction."""
        for block in self.blocks():
            factors = self.row_factors(block.first, block.first + len(block.ok))
            if factors is not None:
                block = replace(block, rows=block.rows * factors.float()[:, None])
            yield block

    def row_factors(self, first: int, last: int) -> Tensor | None:
        """Return by how much rows of the reduction are larger than stored ones.

        ``(n,)`` float64 on the device; None for 1.

        Raises:
            StoreError: a row's number of tokens is not known.
        """
        factors = reduction_factors(
            self.store, self.options.get("reduction", DEFAULT_REDUCTION), first, last
        )
        return None if factors is None else to_device(torch.from_numpy(factors), self.device)

    def prepare_queries(
        self, query_rows: Rows, head: HeadQueries | None = None
    ) -> "PreparedQueries":
        """Apply the preconditioner to the queries, once instead of to every row.

        ``head`` are these queries' head rows, by default those of the options.
        """
        queries = _select_layers(query_tensor(query_rows), self.store, self.layers)
        if not np.isfinite(_max_abs(queries)).all():
            raise ConfigError(
                "a query row has a value that is not finite: its text has no gradient"
            )
        solved = queries
        if self.preconditioner is not None and not self.preconditioner.is_identity:
            solved = self.preconditioner.solve(queries.double())
        if SCORES[self.score].divisor == "norms":
            norms = (queries.double() * solved).sum(dim=1, keepdim=True).sqrt()
            solved = solved / torch.where(norms > 0, norms, 1.0)
        return self.prepare_solved(solved, head or self.options.get("head"))

    def prepare_solved(self, queries: Tensor, head: HeadQueries | None = None) -> "PreparedQueries":
        """Prepare queries to which the preconditioner was applied, ``(Q, W)``."""
        if head is not None and len(head.ids) != len(queries):
            raise ConfigError(f"there are head rows of {len(head.ids)} queries for {len(queries)}")
        # Scaling by powers of two is exact. Unscaled, a query and a row may each be far outside of
        # float32's range even if their product is not.
        scales = torch.from_numpy(np.ldexp(1.0, np.frexp(_max_abs(queries))[1] - 1))
        weights = (queries / scales.to(queries.dtype)[:, None]).float().to(self.device)
        divisor = SCORES[self.score].divisor
        for_rows = None if divisor is None else self.row_preconditioner()
        return PreparedQueries(weights, scales.to(self.device), divisor, for_rows, head)

    def row_preconditioner(self) -> Preconditioner | None:
        """Return the preconditioner in the precision and on the device of the rows."""
        if self.preconditioner is None:
            return None
        return self.preconditioner.to(self.device, torch.float32)


def _check_head(store: ProjectionStore, options: ScanOptions) -> None:
    if options.get("head_sum", HEAD_SUMS[0]) not in HEAD_SUMS:
        raise ConfigError(
            f"head_sum is {options['head_sum']!r}; choose one of {', '.join(HEAD_SUMS)}"
        )
    if options.get("head") is None:
        return
    if store.head is None:
        raise ConfigError(f"{store.path} has no head rows: leave head out")
    score = options.get("score", DEFAULT_SCORE)
    if score != "kfac":
        raise ConfigError(f"score {score!r} takes no head rows: leave head out, or take kfac")


def fit_for_scan(
    store: ProjectionStore, kind: str, options: ScanOptions, **settings: Any
) -> Preconditioner:
    """Fit a preconditioner on the device, by the ranks and with the progress bar of a scan."""
    return Preconditioner.fit(
        store,
        kind,
        together=options.get("together", False),
        device=options.get("device", "cpu"),
        progress=options.get("progress", False),
        **settings,
    )


def _preconditioner(
    store: ProjectionStore, score: str, layers: list[str], options: ScanOptions
) -> Preconditioner | None:
    given, kind = options.get("preconditioner"), SCORES[score].curvature
    if kind is None:
        if given is not None:
            raise ConfigError(
                f"score {score!r} takes no preconditioner; leave it out, or take a score of "
                f"curvature {given.kind}"
            )
        # Of weighted rows, dot and cosine are those of the plain gradients.
        return Preconditioner.unweighted(store, layers) if has_weighted_rows(store) else None
    if given is None:
        damping = options.get("damping", "auto")
        return fit_for_scan(store, kind, options, damping=damping, layers=layers).ready()
    if given.kind != kind and not SCORES[score].any_curvature:
        raise ConfigError(
            f"score {score!r} takes a preconditioner of kind {kind}, this one is {given.kind}"
        )
    given.check_store(store)
    given = given.for_layers(layers)
    damped = given.with_damping(options["damping"]) if "damping" in options else given
    return damped.ready()  # fails before the scan, not during it


@dataclass(frozen=True)
class PreparedQueries:
    """Queries ready to be multiplied with rows."""

    weights: Tensor
    """``(Q, W)`` float32, of magnitude at most 2."""
    scales: Tensor
    """``(Q,)`` float64: the factor by which each query was divided."""
    divisor: str | None
    """See ``ScoreType.divisor``."""
    preconditioner: Preconditioner | None
    """If there is a divisor: gives a row's score with itself; None for its squared norm."""
    head: HeadQueries | None = None
    """Head rows, whose scores are added."""

    @property
    def has_norms(self) -> bool:
        """True if a score is divided by a norm of the row, so that the row's scale cancels."""
        return self.divisor is not None

    def scores_of(self, rows: Tensor) -> Tensor:
        """Return the scores ``(Q, n)`` float32 of rows ``(n, W)``."""
        products = self.weights @ rows.T
        if self.preconditioner is not None:
            return self.finish(products, self.preconditioner.self_products(rows).sqrt())
        if self.divisor is not None:
            # In float64, which the square of no float32 value overflows.
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            return self.finish(products, norms)
        return self.finish(products)

    def finish(
        self, products: Tensor, norms: Tensor | None = None, row_scale: Tensor | None = None
    ) -> Tensor:
        """Turn products ``(Q, n)`` of weights and rows into scores.

        They are divided by ``norms (n,)`` and multiplied by ``row_scale (n,)``.
        """
        values = products.double() * self.scales[:, None]
        if norms is not None:
            values = torch.where(norms == 0, 0.0, values / norms)
        return (values if row_scale is None else values * row_scale).float()


def self_products(rows: Tensor, preconditioner: Preconditioner | None) -> Tensor:
    """Return ``r C^-1 r`` of every row, ``(n,)``; without a preconditioner, the squared norm."""
    if preconditioner is None:
        return rows.square().sum(dim=1)
    return preconditioner.self_products(rows)


def query_tensor(query_rows: Rows) -> Tensor:
    """Return queries as ``(Q, D)`` on the CPU, float32 or float64."""
    rows = torch.as_tensor(query_rows).detach().cpu()
    rows = rows if rows.dtype == torch.float32 else rows.double()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not len(rows):
        raise ConfigError(
            f"query rows are {tuple(rows.shape)}; give (Q, D) or (D,), with at least one query"
        )
    return rows


def _max_abs(queries: Tensor) -> np.ndarray:
    """Return each query's largest magnitude, ``(Q,)``; NaN if it has one."""
    values = queries.numpy()  # numpy's reductions are ten times as fast as torch's here
    return np.maximum(values.max(axis=1), -values.min(axis=1))


def _select_layers(queries: Tensor, store: ProjectionStore, layers: list[str]) -> Tensor:
    """Select the layers' values of whole rows; rows of just these layers are returned as is."""
    if queries.shape[1] == store.dim:
        if layers == chosen_layers(store, None):
            return queries
        spans = {layer.name: slice(layer.slice_start, layer.slice_end) for layer in store.layers}
        return torch.cat([queries[:, spans[name]] for name in layers], dim=1)
    width = width_of(store, layers)
    if queries.shape[1] != width:
        of_layers = "" if width == store.dim else f" (or {width:,} for the chosen layers)"
        raise ConfigError(
            f"query rows have {queries.shape[1]:,} values, those of {store.path} "
            f"{store.dim:,}{of_layers}: project them with the store's own settings and matrices"
        )
    return queries
