"""Compiles the engine before the first unit, and makes random batches for trials."""

import logging
import time

import torch
from torch import Tensor, nn

from gradproj.engine.compile import remove_torn_libraries
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss

log = logging.getLogger(__name__)

COMPILED_TOKENS = 256
"""Length of the sequences that ``--compile`` compiles with."""


def compile_now(model: nn.Module, engine: GradProjLoraEngine, max_length: int) -> float:
    """Compile a compiled engine by two small batches, and return the seconds it took.

    The shapes are equal in every rank, so that the compiler's decisions by batch size are too, and
    a failure shows before the first unit. A graph holds for any length and any number of samples
    but one, which torch.compile specialises. (A model with sliding windows has other masks above
    the window, so its first longer batches compile once more.)
    """
    device, started = next(model.parameters()).device, time.perf_counter()
    for path in remove_torn_libraries():
        log.warning("%s: unfinished, left by a killed compiler: deleted", path)
    for n_sequences in (2, 1):
        ids = random_ids(model, n_sequences, min(COMPILED_TOKENS, max_length))
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()
    engine.take_token_covariances()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def random_ids(model: nn.Module, n_sequences: int, length: int) -> Tensor:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, weight.shape[0], (n_sequences, length), generator=seeded)
    return ids.to(weight.device)
