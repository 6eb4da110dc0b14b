"""One batch through model and engine; halved until it fits the device's memory."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.batching import Batch
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import head_loss
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.targets import Targets
from gradproj.kernels.head_gradients import HeadSink
from gradproj.kernels.memory import is_out_of_memory

T = TypeVar("T")

log = logging.getLogger(__name__)


def run_batch(
    model: nn.Module,
    engine: GradProjLoraEngine,
    batch: Batch,
    chunked: bool | None = None,
    head: HeadSink | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a batch forward and backward through a model with its engine attached.

    ``chunked`` is the answer of ``chunk_verdict`` for a causal model whose weights do not change;
    if it is None, the model is examined in every batch. ``head`` gets the gradients of the
    vocabulary head, of a model that ``check_head`` accepts.

    Returns:
        ``(rows (N, D), losses (N,))`` on the device: the gradients of the summed losses (nats)
        times the batch's factors, and these losses without them. Token covariances are of the
        losses too.
    """
    engine.set_token_mask(batch.token_mask)
    if head is None:
        targets = Targets(batch.positions, batch.targets)
        inputs = {"input_ids": batch.input_ids, "targets": targets}
        losses = per_sample_loss(model, inputs, chunked=chunked, causal=chunked is None)
    else:
        losses = head_loss(model, batch, head)
    losses.sum().backward()
    rows = engine.collect_batch()
    if batch.factors is not None:
        rows = rows * batch.factors[:, None]
        if head is not None:
            head.weigh(batch.factors)
    return rows, losses.detach()


def run_in_halves(
    engine: GradProjLoraEngine, sequences: np.ndarray, run: Callable[[np.ndarray], T]
) -> Iterator[tuple[np.ndarray, T | None]]:
    """Run a batch; halve it and try again while the device has no memory for it.

    ``run`` computes some of the sequences ``(N,)``: forward, backward, rows. This yields
    ``(sequences, result)`` of each part that ran; the result is None for a single sequence that
    does not fit. What a failed attempt left in the engine is dropped.
    """
    try:
        result = run(sequences)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    else:
        yield sequences, result
        return
    # Outside of the except block, so that the error no longer holds the batch's tensors.
    clear_failed(engine)
    if len(sequences) == 1:
        yield sequences, None
        return
    log.warning("out of memory with %d sequences: halving the batch", len(sequences))
    middle = len(sequences) // 2
    for half in (sequences[:middle], sequences[middle:]):
        yield from run_in_halves(engine, half, run)


def clear_failed(engine: GradProjLoraEngine) -> None:
    """Drop what a batch without enough memory left in the engine and in torch's cache."""
    engine.clear_gradients()
    engine.take_token_covariances()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
