"""Options of a scan of a store's rows, checked, and queries prepared for it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.eigenbasis import has_weighted_rows
from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.prepared_queries import PreparedQueries
from gradproj.analysis.query_sets import QuerySets
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
    sets: QuerySets | None
    """Score sets of the queries instead of each query; not for self-influences and domains."""
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
        if options.get("sets") is not None and caller != "score":
            raise ConfigError(f"{caller} does not take sets, since it has no queries")
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

    def prepare_queries(self, query_rows: Rows, head: HeadQueries | None = None) -> PreparedQueries:
        """Apply the preconditioner to the queries, once instead of to every row.

        ``head`` are these queries' head rows, by default those of the options.
        """
        queries = select_layers(query_tensor(query_rows), self.store, self.layers)
        if not np.isfinite(_max_abs(queries)).all():
            raise ConfigError(
                "a query row has a value that is not finite: its text has no gradient"
            )
        head, sets = head or self.options.get("head"), self.options.get("sets")
        if sets is not None:
            return self._prepare_sets(queries, head, sets)
        solved = self.solved(queries)
        if SCORES[self.score].divisor == "norms":
            norms = (queries.double() * solved).sum(dim=1, keepdim=True).sqrt()
            solved = solved / torch.where(norms > 0, norms, 1.0)
        return self.prepare_solved(solved, head)

    def solved(self, queries: Tensor) -> Tensor:
        """Return ``q C^-1``, float64; the queries themselves without a preconditioner."""
        if self.preconditioner is None or self.preconditioner.is_identity:
            return queries
        return self.preconditioner.solve(queries.double())

    def _prepare_sets(
        self, queries: Tensor, head: HeadQueries | None, sets: QuerySets
    ) -> PreparedQueries:
        if len(sets.of_query) != len(queries):
            raise ConfigError(f"sets are of {len(sets.of_query)} queries, not of {len(queries)}")
        if SCORES[self.score].divisor == "norms":  # which takes each query at unit length
            sets = replace(sets, unit=True)
        lengths = np.zeros(len(queries)) if head is None else head.squares()

        def solve(chosen: np.ndarray) -> tuple[Tensor, np.ndarray]:
            exact = queries[torch.from_numpy(chosen)].double()
            solved = self.solved(exact)
            lengths[chosen] += (exact * solved).sum(dim=1).clamp(min=0).numpy()
            lengths[chosen] = np.sqrt(lengths[chosen])
            return solved, lengths[chosen]

        parts = [self.prepare_solved(rows) for rows in sets.rows(solve, queries.shape[1])]
        prepared = PreparedQueries.joined(parts)
        if head is not None:
            factors = sets.factors(np.arange(len(queries)), lengths)
            head = head.summed(sets.row_of, factors, sets.n_rows)
        return replace(prepared, head=head, sets=sets)

    def prepare_solved(self, queries: Tensor, head: HeadQueries | None = None) -> PreparedQueries:
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


def select_layers(queries: Tensor, store: ProjectionStore, layers: list[str]) -> Tensor:
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
