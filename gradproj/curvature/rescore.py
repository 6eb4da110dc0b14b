"""Scores documents again with whole gradients and exact curvature: the second stage of a query.

For a query ``q`` and a layer, ``M = C^-1 G_q`` is computed once, whole (n_o x n_i). A document's
score is then the inner product of its own whole gradient with ``M``, which needs one forward and
backward pass and keeps nothing of the document.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.curvature.fit import split_layers
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.layer_curvature import AUTO_DAMPING
from gradproj.curvature.recorded_model import RecordedModel, SequenceVisit
from gradproj.distributed import choose_device
from gradproj.engine.whole_gradients import LayerBatch
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.onednn import linear
from gradproj.model.sequences import TokenSequence
from gradproj.store import STATUS, ProjectionStore


@dataclass(frozen=True)
class Rescored:
    """Exact scores of documents for queries, and what they took."""

    scores: np.ndarray
    """``(Q, n)`` float64: of the summed losses of query and document, in nats."""
    n_groups: int
    """Passes over queries and documents, one for each group of layers."""
    matrix_bytes: int
    """Most bytes of the queries' matrices ``M`` at once."""
    seconds: float


def rescore(
    recorded: RecordedModel,
    folder: CurvatureFolder,
    layers: Sequence[str],
    queries: Sequence[TokenSequence],
    documents: Sequence[TokenSequence],
    *,
    kind: str,
    damping: float,
    budget: int,
) -> Rescored:
    """Return ``<G_q, C^-1 G_d>`` summed over layers, for every query and document.

    Args:
        recorded: the model.
        folder: its curvature.
        layers: that count; all have files in the folder.
        queries: sequences of the queries; owners are 0 to Q - 1.
        documents: sequences of the documents; owners are 0 to n - 1.
        kind: ``kfac``, with ``C = (S + d) (x) (A + d)``, or ``ekfac``, with ``C`` the second
            moments in the eigenbasis of ``S (x) A``, plus d.
        damping: c in ``d = c mean(diagonal)``.
        budget: most bytes of ``M`` of all queries at once; layers that do not fit are computed in
            groups, each with passes of its own.

    Raises:
        ConfigError: the damped curvature has no inverse.
        ModelError: the device has no memory for a single text.
        StoreError: a file of the curvature is damaged.
    """
    started = time.monotonic()
    n_queries = 1 + max(each.owner for each in queries)
    n_documents = 1 + max(each.owner for each in documents)
    sizes = [4 * n_queries * int(np.prod(recorded.targets[name].widths)) for name in layers]
    groups = split_layers(layers, sizes, budget)
    size_of = dict(zip(layers, sizes, strict=True))
    total = torch.zeros(n_queries, n_documents, dtype=torch.float64)
    for group in groups:
        matrices = _query_gradients(recorded, group, queries, n_queries)
        for number, name in enumerate(group):
            curvature = folder.read(name, kind).to(recorded.device)
            inverse = curvature.inverse(kind, damping, name)
            for gradient in matrices[number]:  # one query's at a time: solving needs as much again
                gradient.copy_(curvature.solve(gradient, inverse))
        total += _document_scores(recorded, group, documents, matrices, n_documents)
    most = max(sum(size_of[name] for name in group) for group in groups)
    return Rescored(total.numpy(), len(groups), most, time.monotonic() - started)


def exact_scores(
    inputs: RecordedRunArgs,
    queries: Sequence[TokenSequence],
    sample_ids: np.ndarray | None = None,
    *,
    kind: str = "ekfac",
    damping: float | None = None,
    gigabytes: float = 0.0,
) -> Rescored:
    """Score documents of a store, all by default, with whole gradients and its measured curvature.

    Args:
        inputs: the output, and the present places of its model and tars.
        queries: sequences of token ids; owners are 0 to Q - 1.
        sample_ids: of documents with a row.
        kind: kfac or ekfac.
        damping: see ``rescore``; None for the kind's ``AUTO_DAMPING``.
        gigabytes: most memory of the queries' matrices; 0 = half of what is free.

    Raises:
        StoreError: the curvature is not measured, or belongs to another model.
        ModelError, CorpusError: the model or a tar has changed.
    """
    run = config_from(inputs)
    device, _ = choose_device(inputs.device, 0)
    with ProjectionStore(inputs.output) as store:
        folder = CurvatureFolder(store)
        layers = folder.recipe()["layers"]
        if sample_ids is None:
            sample_ids = np.flatnonzero(store.column("status") == STATUS["ok"])
        recorded = RecordedModel(store, run, device, inputs.shards, layers)
        documents = recorded.sequences(sample_ids)
        damping = AUTO_DAMPING[kind] if damping is None else damping
        budget, texts = recorded.budget(gigabytes), (queries, documents)
        return rescore(recorded, folder, layers, *texts, kind=kind, damping=damping, budget=budget)


def _query_gradients(
    recorded: RecordedModel, layers: Sequence[str], queries: Sequence[TokenSequence], n_queries: int
) -> list[Tensor]:
    """Return each layer's whole gradients of all queries, ``(Q, n_o, n_i)`` float32."""
    owners = np.array([each.owner for each in queries], np.int64)
    sums: list[Tensor] = []

    def begin() -> SequenceVisit:
        sums.clear()
        for name in layers:
            n_i, n_o = recorded.targets[name].widths
            sums.append(torch.zeros(n_queries, n_o, n_i, device=recorded.device))
        return add

    def add(number: int, batch: LayerBatch, numbers: np.ndarray) -> None:
        of = torch.from_numpy(owners[numbers]).to(recorded.device)
        for part in batch.parts():
            sums[number].index_add_(0, of[part], batch.gradients(part))

    recorded.run(layers, queries, "queries", begin)
    return sums


def _document_scores(
    recorded: RecordedModel,
    layers: Sequence[str],
    documents: Sequence[TokenSequence],
    matrices: Sequence[Tensor],
    n_documents: int,
) -> Tensor:
    """Return ``<M_q, G_d>`` summed over layers and a document's sequences, ``(Q, n)`` float64."""
    owners = np.array([each.owner for each in documents], np.int64)
    flat = [matrix.flatten(1) for matrix in matrices]
    totals: list[Tensor] = []

    def begin() -> SequenceVisit:
        shape = (len(flat[0]), n_documents)
        totals[:] = [torch.zeros(shape, dtype=torch.float64, device=recorded.device)]
        return add

    def add(number: int, batch: LayerBatch, numbers: np.ndarray) -> None:
        of = torch.from_numpy(owners[numbers]).to(recorded.device)
        for part in batch.parts():
            scores = linear(flat[number], batch.gradients(part).flatten(1))
            totals[0].index_add_(1, of[part], scores.double())

    recorded.run(layers, documents, "documents", begin)
    return totals[0].cpu()
