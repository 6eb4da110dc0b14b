"""Compiles the engine ahead of the first unit, and makes the random batches that trials use."""

import time

import torch
from torch import Tensor, nn

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss

COMPILED_TOKENS = 256
"""Length of the sequences by which ``--compile`` compiles."""


def compile_now(model: nn.Module, engine: GradProjLoraEngine, max_length: int) -> float:
    """Have a compiled engine compile, by two small batches of the same shapes in every rank; the seconds that it took.

    A graph holds for any length and any number of samples but one, which torch's compiler takes for a case of its own.
    (A model with sliding windows has other masks above the window: its first longer batches compile once more.)

    What the compiler decides by a batch's size is then the same everywhere, and it fails before the first unit.
    """
    device, started = next(model.parameters()).device, time.perf_counter()
    for n_sequences in (2, 1):
        per_sample_loss(
            model, random_ids(model, n_sequences, min(COMPILED_TOKENS, max_length))
        ).sum().backward()
        engine.collect_batch()
    engine.take_token_covariances()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def random_ids(model: nn.Module, n_sequences: int, length: int) -> Tensor:
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, weight.shape[0], (n_sequences, length), generator=generator).to(
        weight.device
    )
