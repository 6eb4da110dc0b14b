"""What a scan is asked: the scores and what they mean, the settings, and the queries made ready for the rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.row_blocks import (
    Block,
    chosen_layers,
    rank_range,
    scan_blocks,
    scan_world,
    width_of,
)
from gradproj.distributed import World
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
DEFAULT_SCORE = "kfac"
"""What is asked where nobody says otherwise: the kind that the project's own ``lds`` finds best."""
SELF_SCORES = ("kfac", "preconditioned", "dot")
"""Scores that are inner products, so that means and a document's score with itself mean something."""

Rows = np.ndarray | Tensor


class ScanOptions(TypedDict, total=False):
    """What every scan can be told besides the query and the store."""

    score: str
    """A key of ``MEANINGS``; default ``DEFAULT_SCORE``."""
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
    together: bool
    """Of ``top_k`` and its like: every rank of ``torch.distributed`` calls it, scans its share of the units, and gets
    the whole answer. A preconditioner that is not given is fitted together as well."""


@dataclass(frozen=True)
class Scan:
    """A scan's settings, checked, with the preconditioner that its score needs."""

    store: ProjectionStore
    score: str
    preconditioner: Preconditioner | None
    layers: list[str]
    how: ScanOptions
    device: torch.device
    world: World

    @classmethod
    def alone(
        cls,
        store: ProjectionStore,
        how: ScanOptions,
        what: str,
        scores: Sequence[str] = tuple(MEANINGS),
    ) -> "Scan":
        """As ``of``, for answers that one process gives, and for these scores only."""
        if how.get("together"):
            raise ConfigError(f"{what} has no together; top_k, bottom_k and top_and_bottom have")
        kind = how.get("score", DEFAULT_SCORE)
        if kind in MEANINGS and kind not in scores:
            raise ConfigError(
                f"{what} is not made of score {kind!r}; take one of {', '.join(scores)}"
            )
        return cls.of(store, how)

    @classmethod
    def of(cls, store: ProjectionStore, how: ScanOptions) -> "Scan":
        """Check the settings; fit the preconditioner where the score needs one and none is given."""
        known = set(ScanOptions.__annotations__)
        if set(how) - known:
            raise TypeError(f"no such argument: {min(set(how) - known)}")
        kind = how.get("score", DEFAULT_SCORE)
        if kind not in MEANINGS:
            raise ConfigError(f"score is {kind!r}; choose one of {', '.join(MEANINGS)}")
        layers, device = (
            chosen_layers(store, how.get("layers")),
            torch.device(how.get("device", "cpu")),
        )
        found = _preconditioner(store, kind, layers, device, how)
        return cls(store, kind, found, layers, how, device, scan_world(how.get("together", False)))

    @property
    def width(self) -> int:
        """Values of a row of the chosen layers."""
        return width_of(self.store, self.layers)

    @property
    def scanned_layers(self) -> list[str] | None:
        """The chosen layers; None for all of them, which is a shorter walk than one of every layer."""
        return None if self.layers == chosen_layers(self.store, None) else self.layers

    @property
    def label(self) -> str | None:
        """What the progress bar is called, where there is one."""
        return "scores" if self.how.get("progress") and self.world.rank == 0 else None

    def blocks(self) -> Iterator[Block]:
        """This process's share of the rows, decoded."""
        height, samples = self.how.get("rows_per_block"), rank_range(self.store, self.world)
        return scan_blocks(
            self.store,
            self.scanned_layers,
            self.how.get("domains"),
            self.device,
            self.label,
            height,
            *samples,
        )

    def question(self, query_rows: Rows) -> "PreparedQueries":
        """What the rows are multiplied with."""
        queries = _of_layers(queries_of(query_rows), self.store, self.layers)
        if not np.isfinite(_largest(queries)).all():
            raise ConfigError(
                "a query's row has a value that is not finite: its text has no gradient"
            )
        if self.preconditioner is not None:
            queries = self.preconditioner.solve(queries.double())
        elif self.score == "cosine":
            norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True, dtype=torch.float64)
            queries = queries / torch.where(norms > 0, norms, 1.0)
        divisor = self.for_rows() if self.score == "relatif" else None
        # By powers of two, which is exact: a query's size and a row's may each be far outside of float32's reach where
        # their product is not.
        sizes = torch.from_numpy(np.ldexp(1.0, np.frexp(_largest(queries))[1] - 1))
        weights = (queries / sizes.to(queries.dtype)[:, None]).float().to(self.device)
        return PreparedQueries(weights, sizes.to(self.device), self.score, divisor)

    def for_rows(self) -> Preconditioner | None:
        """The preconditioner in the precision and on the device of the rows."""
        return (
            None
            if self.preconditioner is None
            else self.preconditioner.to(self.device, torch.float32)
        )


def _preconditioner(
    store: ProjectionStore, kind: str, layers: list[str], device: torch.device, how: ScanOptions
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
            together=how.get("together", False),
            device=device,
            progress=how.get("progress", False),
        ).ready()
    wanted = {"kfac": "kfac", "preconditioned": "second_moment"}.get(kind, given.kind)
    if given.kind != wanted:
        raise ConfigError(
            f"score {kind!r} takes a preconditioner of kind {wanted}, this one is {given.kind}"
        )
    given.check_store(store)
    given = given.for_layers(layers)
    return (
        given.with_damping(how["damping"]) if "damping" in how else given
    ).ready()  # before any scan


@dataclass(frozen=True)
class PreparedQueries:
    """Queries ready to be multiplied with rows."""

    weights: Tensor
    """``(Q, W)`` float32, none above 2."""
    sizes: Tensor
    """``(Q,)`` float64: what each query was divided by."""
    score: str
    divisor: Preconditioner | None
    """Of relatif: what makes a row's influence on itself."""

    @property
    def has_norms(self) -> bool:
        """Whether a score is divided by a norm of the row: then its scale makes no difference."""
        return self.score == "cosine" or self.divisor is not None

    def of_rows(self, rows: Tensor) -> Tensor:
        """``(Q, n)`` float32 scores of rows ``(n, W)``."""
        products = self.weights @ rows.T
        if self.score == "cosine":
            # In float64, where no square of a float32 is lost.
            return self.finished(
                products, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
            )
        if self.divisor is not None:
            return self.finished(products, self.divisor.self_products(rows).sqrt())
        return self.finished(products)

    def finished(
        self, products: Tensor, norms: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """Scores of inner products ``(Q, n)`` with the weights: divided by norms, times the rows' scale, ``(n,)``."""
        values = products.double() * self.sizes[:, None]
        if norms is not None:
            values = torch.where(norms == 0, 0.0, values / norms)
        return (values if scale is None else values * scale).float()


def self_products(rows: Tensor, preconditioner: Preconditioner | None) -> Tensor:
    """``row C^-1 row^T`` of every row, ``(n,)``; without a preconditioner the squared norm."""
    if preconditioner is None:
        return rows.square().sum(dim=1)
    return preconditioner.self_products(rows)


def queries_of(query_rows: Rows) -> Tensor:
    """``(Q, D)`` on the CPU, float32 or float64."""
    rows = torch.as_tensor(query_rows).detach().cpu()
    rows = rows if rows.dtype == torch.float32 else rows.double()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or not len(rows):
        raise ConfigError(
            f"query rows are {tuple(rows.shape)}; give (Q, D) or (D,), with at least one query"
        )
    return rows


def _largest(queries: Tensor) -> np.ndarray:
    """``(Q,)``: each query's largest magnitude; NaN where it has one."""
    values = queries.numpy()  # whose search is ten times as fast as torch's
    return np.maximum(values.max(axis=1), -values.min(axis=1))


def _of_layers(queries: Tensor, store: ProjectionStore, layers: list[str]) -> Tensor:
    """The chosen layers' values of whole rows; rows of just these layers pass as they are."""
    if queries.shape[1] == store.dim and layers == chosen_layers(store, None):
        return queries
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
