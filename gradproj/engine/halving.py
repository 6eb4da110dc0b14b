"""Batches that do not fit the device's memory: halved until they do."""

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.kernels.memory import is_out_of_memory

T = TypeVar("T")

log = logging.getLogger(__name__)


def run_in_halves(
    engine: GradProjLoraEngine, sequences: np.ndarray, run: Callable[[np.ndarray], T]
) -> Iterator[tuple[np.ndarray, T | None]]:
    """Run a batch; halve it and try again while the device has no memory for it.

    Args:
        engine: what a failed attempt left in it is dropped.
        sequences: ``(N,)`` the batch's sequences.
        run: computes some of them: forward, backward, rows.

    Yields:
        ``(sequences, result)`` of each part that ran; the result is None for a single sequence
        that does not fit.
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
    engine.clear_gradients()
    engine.take_token_covariances()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(sequences) == 1:
        yield sequences, None
        return
    log.warning("out of memory with %d sequences: halving the batch", len(sequences))
    middle = len(sequences) // 2
    for half in (sequences[:middle], sequences[middle:]):
        yield from run_in_halves(engine, half, run)
