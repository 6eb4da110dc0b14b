"""Scores of several stores of one corpus, at checkpoints of one model, and their weighted sum.

The sum over checkpoints of the learning rate times the inner product of gradients is TracIn
(arXiv:2002.08484), with the rows of any score in place of the gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np
import torch

from gradproj.analysis.preconditioner import Preconditioner
from gradproj.analysis.ranking import Ranker
from gradproj.analysis.scan import ScanOptions
from gradproj.analysis.score_blocks import Columns, on_host
from gradproj.analysis.score_stream import Part, ScoreStream
from gradproj.analysis.score_types import DEFAULT_SCORE, SCORES
from gradproj.errors import ConfigError, settings_mismatch
from gradproj.formatting import listed
from gradproj.store import ProjectionStore

_SAME = (
    "--shards (corpus index)", "--max_samples", "--domains", "--rows_per_shard", "--max_length",
    "--long_documents", "--special_tokens", "--loss_on", "--truncate_side", "--chat_template",
    "--preference_beta",
)  # fmt: skip
"""Settings of the job that say which documents and tokens a row is of, and where it lies."""
_LAYERS, _N_SAMPLES = "layers", "documents"


def check_same_documents(stores: Sequence[ProjectionStore]) -> None:
    """Reject stores whose sample ids are not the same documents, or whose layers differ.

    Raises:
        ConfigError: a store that records no corpus, or every difference to the first store.
    """
    first, *others = stores
    if not others:
        return
    ours = _facts(first)
    for other in others:
        mismatch = settings_mismatch(
            f"{other.path} does not belong to {first.path}: scores at several checkpoints are of "
            "the same documents and layers",
            _facts(other),
            ours,
            "Give stores of one corpus, made with the same --shards, --max_samples and layers",
            labels=(str(other.path.parent), str(first.path.parent)),
        )
        if mismatch:
            raise ConfigError(mismatch)


def _facts(store: ProjectionStore) -> dict[str, str]:
    identity = store.attributes.get("identity")
    if not isinstance(identity, dict) or _SAME[0] not in identity:
        raise ConfigError(
            f"{store.path} does not record which documents its ids are, so its scores cannot be "
            "added to those of another store: give outputs of the job"
        )
    facts = {name: str(identity.get(name)) for name in _SAME}
    facts[_N_SAMPLES] = f"{len(store):,}"
    facts[_LAYERS] = listed(layer.name for layer in store.layers)
    return facts


def summed(streams: Sequence[ScoreStream], weights: Sequence[float]) -> ScoreStream:
    """Return the weighted sum of the scores of stores of the same documents, in one pass of each.

    The streams have the same parts. A document without a score in one of them has none.
    """
    spans = [[part.n_scores for part in stream.parts] for stream in streams]
    if any(other != spans[0] for other in spans):
        raise ConfigError("the stores' scores are not of the same queries")

    def blocks(number: int) -> Iterator[tuple[int, torch.Tensor]]:
        first, *others = [
            on_host(stream.parts[number].blocks(), stream.device) for stream in streams
        ]
        columns = [Columns(other) for other in others]
        for start, values in first:
            total = weights[0] * values.astype(np.float64)
            for weight, column in zip(weights[1:], columns, strict=True):
                total += weight * column.take(start, values.shape[1]).astype(np.float64)
            yield start, torch.from_numpy(total.astype(np.float32))

    parts = [
        Part(part.n_scores, lambda number=number: blocks(number))  # type: ignore[misc]
        for number, part in enumerate(streams[0].parts)
    ]
    return replace(streams[0], parts=parts, device=torch.device("cpu"))


def checkpoint_sum(
    query_rows: Sequence[np.ndarray],
    stores: Sequence[ProjectionStore],
    weights: Sequence[float] | None = None,
    **options: Unpack[ScanOptions],
) -> ScoreStream:
    """Return the weighted sum of the scores at several checkpoints, to be ranked or grouped.

    ``checkpoint_sum(rows, stores, rates).ends(20, 20)`` are the documents with the highest and the
    lowest sums; each store is scanned once.

    Args:
        query_rows: the queries' rows ``(Q, D)`` at each checkpoint.
        stores: of the same documents and layers.
        weights: such as the learning rates; default: 1 each.
        **options: see ``ScanOptions``, without preconditioner and head rows.

    Raises:
        ConfigError: stores that do not belong together, or not one array of rows for each.
    """
    weights = [1.0] * len(stores) if weights is None else weights
    if not len(stores) == len(query_rows) == len(weights):
        raise ConfigError(
            f"{len(stores)} stores, {len(query_rows)} arrays of rows and {len(weights)} weights: "
            "give as many of each"
        )
    check_same_documents(stores)
    kind = SCORES[options.get("score", DEFAULT_SCORE)].curvature
    damping = options.get("damping", "auto")
    rankers = [
        Ranker(
            store,
            0,
            0,
            {"layers": None, **{k: v for k, v in options.items() if k != "damping"}},  # type: ignore[typeddict-item]
            None if kind is None else Preconditioner.fit(store, kind, damping),
        )
        for store in stores
    ]
    return summed(streams_of(rankers, query_rows, damping), weights)


def streams_of(
    rankers: Sequence[Ranker], query_rows: Sequence[np.ndarray], damping: float | str
) -> list[ScoreStream]:
    """Return a stream of each store's scores, all with the same parts."""
    pairs = list(zip(rankers, query_rows, strict=True))
    widest, rows = max(pairs, key=lambda pair: pair[1].shape[1])
    parts = widest.parts(rows)
    return [ranker.stream(rows, damping, parts) for ranker, rows in pairs]
