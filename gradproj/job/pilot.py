"""The pilot: some documents, run before the store is made, give the eigenbasis of its rows.

Every process that starts the same job on the same machine with the same batch settings gets the
same bits. The first to publish its store decides for all: ranks read the basis from there.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.coordinator import fault_points
from gradproj.corpus.documents import Document
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.sampling import spread_order
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK
from gradproj.distributed import Rendezvous
from gradproj.engine.basis import eigenbasis
from gradproj.engine.batching import AUTO, BatchConfig, collate, fit_padding, plan_batches
from gradproj.engine.capture import TokenCovariances
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadPilot
from gradproj.engine.matrix_file import Matrices
from gradproj.engine.projection import job_matrices
from gradproj.engine.run_batch import run_batch, run_in_halves
from gradproj.errors import CorpusError, ModelError
from gradproj.formatting import count, human_seconds
from gradproj.job.lockstep import Lockstep, Part, load_job_model
from gradproj.job.plan import Plan
from gradproj.job.unit_reader import UnitReader
from gradproj.model.checkpoint import fetch
from gradproj.model.sequences import TokenSequence
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store.basis import DAMPING
from gradproj.store.layer_arrays import pack_layers
from gradproj.store.layout import LayerSlice
from gradproj.store.writer import StoreExists

RECIPE = (
    "documents in the order of their positions' reversed bits; of each, windows from its beginning "
    "up to its share: a 64th of pilot_tokens, or more if there are fewer documents"
)
MOST_SHARES = 64
"""Least number of documents that the pilot's tokens come from, if there are as many."""
_FIRST_ROUND, _LARGEST_ROUND = 256, 4096  # documents read at once
_REPORT_S = 30.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pilot:
    """The measured basis, and the model that measured it."""

    model: nn.Module
    arrays: dict[str, np.ndarray]
    """Of the store's group: the matrices and the eigenvalues."""
    attribute: dict[str, Any]
    """The group's attribute ``basis``."""


@dataclass(frozen=True)
class PilotRanks:
    """The ranks that run a pilot: rank 0 on its device, or all of its group."""

    device: torch.device
    lockstep: Lockstep | None = None
    ranks: Rendezvous | None = None
    """The meeting at which the others of the group wait; None without a group."""

    def call(self, plan: Plan) -> None:
        """Have the others of the group come, with ``help_pilot``."""
        if self.ranks is not None:
            self.ranks.from_rank_0(replace(plan, index=cast(CorpusIndex, None)))


def run_pilot(
    plan: Plan, matrices: Matrices, where: PilotRanks, published: Callable[[], bool]
) -> Pilot:
    """Measure the token covariances of the pilot's documents, and return their eigenbasis.

    ``matrices`` are the new store's.

    Raises:
        StoreExists: ``published``, asked between batches, was true: another job has made the store.
        CorpusError: no document of the corpus has a target token with a finite gradient.
        ModelError: a layer's covariances, or those of the vocabulary head, are not finite.
    """
    started, wanted = time.monotonic(), plan.config.projection.pilot_tokens
    print(f"pilot         measures the rows' basis on at least {wanted:,} tokens", flush=True)
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    sequences, n_documents = pilot_sequences(plan, reader)
    if not sequences:
        raise _no_basis(plan, "no document has a target token")
    where.call(plan)
    model = load_job_model(plan.files, where.device, plan.config.job.offload, where.lockstep)
    head = HeadPilot.of(model, plan.config.projection, plan.head)
    sums = _sum_covariances(plan, model, matrices, sequences, published, head, where.lockstep)
    n_tokens = int(sums.n_tokens)
    if not n_tokens:
        raise _no_basis(plan, f"no gradient of the pilot's {n_documents:,} documents is finite")
    arrays = _arrays(plan.layers, sums)
    if head is not None:
        arrays |= head.basis(plan.config.head.head_damping).arrays()
    line = f"{n_tokens:,} target tokens of {count(n_documents, 'document')}"
    print(f"pilot         {line}, in {human_seconds(time.monotonic() - started)}", flush=True)
    recipe = {"pilot_tokens": wanted, "recipe": RECIPE}
    measured = {"tokens": n_tokens, "documents": n_documents}
    fault_points.reach("pilot done")
    return Pilot(model, arrays, {"kind": "eigen", "damping": DAMPING, **measured, **recipe})


def help_pilot(plan: Plan, lockstep: Lockstep) -> nn.Module | None:
    """Run a group member's batches of rank 0's pilot. Returns the model.

    None if another job has made the store meanwhile.
    """
    model = lockstep.load(fetch(plan.config.model))
    head = HeadPilot.of(model, plan.config.projection, plan.head)
    matrices = job_matrices(plan.config.projection, plan.layers)
    try:
        _sum_covariances(plan, model, matrices, [], lambda: False, head, lockstep)
    except StoreExists:
        return None
    return model


def _no_basis(plan: Plan, why: str) -> CorpusError:
    return CorpusError(
        f"{why}, so --basis eigen has nothing to measure. Look at the documents of --shards "
        f"{plan.config.corpus.shards} and at --max_length {plan.config.batch.max_length}, or give "
        "--basis random"
    )


# --- which documents ---


def pilot_sequences(plan: Plan, reader: UnitReader) -> tuple[list[TokenSequence], int]:
    """Return ``(token sequences, number of their documents)`` of the pilot, by ``RECIPE``.

    Documents that make no row are passed over. All the corpus is taken if it has fewer tokens.
    """
    ranges = _candidate_ranges(plan)
    n_candidates = sum(stop - start for start, stop in ranges)
    wanted = plan.config.projection.pilot_tokens
    share = -(-wanted // min(MOST_SHARES, n_candidates))
    sequences: list[TokenSequence] = []
    n_tokens = n_documents = 0
    for document in _in_order(plan, ranges):
        taken, before = [], n_tokens
        for sequence in reader.sequences_of(document):
            taken.append(sequence)
            n_tokens += sequence.n_targets
            if n_tokens - before >= share:
                break
        sequences += taken
        n_documents += bool(taken)
        if n_tokens >= wanted:
            break
    return sequences, n_documents


def _candidate_ranges(plan: Plan) -> list[tuple[int, int]]:
    """Return the ranges of sample ids ``[start, stop)`` that can hold a chosen document."""
    n_samples, chosen = plan.layout.n_samples, plan.config.corpus.chosen_domains
    if not chosen:
        return [(0, n_samples)]
    spans = [
        (tar.start_id, min(tar.start_id + tar.n_samples, n_samples))
        for tar in plan.index.tars
        if any(tar.domain_counts.get(name, 0) for name in chosen)
    ]
    return [(start, stop) for start, stop in spans if start < stop]


def _in_order(plan: Plan, ranges: list[tuple[int, int]]) -> Iterator[Document]:
    """Yield the documents of the ranges in ``spread_order``; some hundreds are read at once."""
    starts = np.cumsum([0, *(stop - start for start, stop in ranges)])
    order, size = spread_order(int(starts[-1])), _FIRST_ROUND
    while places := [place for place, _ in zip(order, range(size), strict=False)]:
        numbers = np.searchsorted(starts, places, side="right") - 1
        ids = [ranges[n][0] + p - int(starts[n]) for n, p in zip(numbers, places, strict=True)]
        documents = _read(plan, sorted(ids))
        yield from (documents[sample_id] for sample_id in ids)
        size = min(2 * size, _LARGEST_ROUND)


def _read(plan: Plan, ids: list[int]) -> dict[int, Document]:
    """Read the documents of sorted ids. Those of one block of the tars are read together."""
    documents: dict[int, Document] = {}
    wanted, at = set(ids), 0
    while at < len(ids):
        start = end = ids[at]
        while at < len(ids) and ids[at] - end < SAMPLES_PER_BLOCK:
            end, at = ids[at], at + 1
        for document in read_documents(plan.index, start, end + 1, plan.config.limits):
            if document.sample_id in wanted:
                documents[document.sample_id] = document
    return documents


# --- their covariances ---


def _sum_covariances(
    plan: Plan,
    model: nn.Module,
    matrices: Matrices,
    sequences: list[TokenSequence],
    published: Callable[[], bool],
    head: HeadPilot | None,
    lockstep: Lockstep | None,
) -> TokenCovariances:
    """Return the sums over the sequences' target tokens, and add the head's to ``head``.

    In a group the sequences are rank 0's, and so are the sums.
    """
    projection, options, batch = plan.config.projection, plan.config.job, plan.config.batch
    if batch.batch_tokens == AUTO:  # measured later, with the basis
        batch = replace(batch, batch_tokens=BatchConfig.batch_tokens)
    engine = GradProjLoraEngine.from_config(
        model, projection.of_layers(plan.layers), matrices, options.gradient_checkpointing
    )
    with engine:
        if engine.only_alone and batch.batch_size > 1:
            raise ModelError(engine.only_alone)
        batch = fit_padding(model, batch)
        if lockstep is not None:
            sequences = lockstep.announce(sequences)
            lockstep.rehearse(model, engine)
        lengths = [len(tokens) for tokens in sequences]
        batches = plan_batches(lengths, batch.batch_size, batch.batch_tokens, batch.max_padding)
        total = engine.take_token_covariances()
        assert total is not None  # an engine without a basis
        width = 1 if lockstep is None else lockstep.group.size
        run = functools.partial(_forward_backward, model, engine, sequences, head)
        reported = time.monotonic()
        for first in range(0, len(batches), width):
            if published() if lockstep is None else lockstep.agree(published()):
                raise StoreExists("another job has made the store meanwhile")
            side_by_side = batches[first : first + width]
            for part, sums in _results(lockstep, model, engine, side_by_side, run):
                if sums is None:
                    n = len(sequences[part[0]])
                    log.warning("pilot: a sequence of %d tokens does not fit the memory", n)
                    continue
                total.add(TokenCovariances(*(sums[name] for name in _COVARIANCES)))
                if head is not None:
                    head.add(*(sums[name] for name in _HEAD_MOMENTS))
            fault_points.reach("pilot batch done")
            if time.monotonic() - reported > _REPORT_S:
                reported = time.monotonic()
                print(f"pilot         {first + 1:,} of {len(batches):,} batches", flush=True)
    return total


_COVARIANCES = ("a", "s", "n_tokens")
_HEAD_MOMENTS = ("head_hidden", "head_logits", "head_n_tokens")


def _results(
    lockstep: Lockstep | None,
    model: nn.Module,
    engine: GradProjLoraEngine,
    batches: list[np.ndarray],
    run: Callable[[np.ndarray], dict[str, Tensor]],
) -> Iterator[Part]:
    """Run batches, one for each rank of the group; yield all results on rank 0 alone."""
    if lockstep is None:
        yield from run_in_halves(engine, batches[0], run)
        return
    rank = lockstep.group.rank
    mine = batches[rank] if rank < len(batches) else None
    parts = lockstep.run_in_halves(model, engine, mine, run)
    for computed in lockstep.collect(parts, len(batches)):
        yield from computed


def _forward_backward(
    model: nn.Module,
    engine: GradProjLoraEngine,
    sequences: list[TokenSequence],
    head: HeadPilot | None,
    chosen: np.ndarray,
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    moments = None if head is None else head.sink()
    run_batch(model, engine, collate(sequences, chosen).to(device), head=moments)
    covariances = engine.take_token_covariances()
    assert covariances is not None  # an engine without a basis
    found = {name: getattr(covariances, name) for name in _COVARIANCES}
    if moments is not None:
        sums = moments.hidden, moments.logits, moments.n_tokens
        found |= dict(zip(_HEAD_MOMENTS, sums, strict=True))
    return found


def _arrays(layers: list[LayerSlice], sums: TokenCovariances) -> dict[str, np.ndarray]:
    """Return the eigenbasis of the mean covariances as the store's arrays.

    Raises:
        ModelError: a layer's covariances are not finite.
    """
    n_tokens, at_i, at_o = int(sums.n_tokens), 0, 0
    a, s = (flat.cpu().numpy() / n_tokens for flat in (sums.a, sums.s))
    basis, eigenvalues = {}, {}
    for layer in layers:
        k_i, k_o = layer.k_i, layer.k_o
        of_layer = a[at_i : at_i + k_i**2], s[at_o : at_o + k_o**2]
        if not all(np.isfinite(values).all() for values in of_layer):
            raise ModelError(
                f"the token covariances of layer {layer.name} are not finite, so it has no "
                "eigenbasis: its inputs or gradients are too large for float32. Leave the layer "
                "out of --proj_layers, or give --basis random"
            )
        r_i, e_i = eigenbasis(of_layer[0].reshape(k_i, k_i))
        r_o, e_o = eigenbasis(of_layer[1].reshape(k_o, k_o))
        basis[layer.name], eigenvalues[layer.name] = (r_i, r_o), (e_i, e_o)
        at_i, at_o = at_i + k_i**2, at_o + k_o**2
    pairs = {"basis_matrices": basis, "basis_eigenvalues": eigenvalues}
    return {name: pack_layers(name, layers, values) for name, values in pairs.items()}
