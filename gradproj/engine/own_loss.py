"""Rows of a caller's own loss: any scalar of each sample that the model computes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.targets import IGNORE, LOSS_WEIGHTS, LossWeights, loss_key
from gradproj.errors import ConfigError, StaleBatchError
from gradproj.kernels.device_copy import to_device
from gradproj.model.sequences import TokenSequence

Inputs = Mapping[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels`` of a batch, each ``(N, S)`` int64."""

_OF_NO_LAYER = (
    "rows_of: the loss does not depend on the layers of the model that it is given: call that "
    "model in it, with gradients (no torch.no_grad, no detach), and make the value of its outputs"
)

OwnLoss = Callable[[Any, Inputs], Tensor]
"""``loss(model, inputs) -> (N,)``."""


def inputs_of(sequences: Sequence[TokenSequence], device: torch.device) -> dict[str, Tensor]:
    """Return sequences as transformers' models take them, padded on the right.

    ``attention_mask`` is 1 at their tokens. ``labels`` are not shifted: the token itself where
    it is a target, else -100.
    """
    shape = len(sequences), max(map(len, sequences))
    inputs = {"input_ids": np.zeros(shape, np.int64), "attention_mask": np.zeros(shape, np.int64)}
    inputs["labels"] = np.full(shape, IGNORE)
    for n, sequence in enumerate(sequences):
        here = slice(len(sequence))
        inputs["input_ids"][n, here] = sequence.ids
        inputs["attention_mask"][n, here] = 1
        inputs["labels"][n, here] = np.where(sequence.is_target, sequence.ids, IGNORE)
    return {name: to_device(torch.from_numpy(x), device) for name, x in inputs.items()}


def run_own_loss(
    model: nn.Module, engine: GradProjLoraEngine, inputs: Inputs, loss: OwnLoss
) -> tuple[Tensor, Tensor]:
    """Run a batch forward and backward through a loss of the caller's.

    A layer that the loss does not reach has zeros in the rows.

    Returns:
        ``(rows (N, D), values (N,))`` on the device: each sample's gradient of its value, if that
        depends on no other sample of the batch.

    Raises:
        ConfigError: the loss is not one differentiable number for each sample, made by one forward
            pass of this model.
    """
    capture, n = engine._capture, len(inputs["input_ids"])
    engine.set_token_mask(inputs["attention_mask"].bool())
    with torch.enable_grad():
        values = loss(model, inputs)
    if not isinstance(values, Tensor) or values.shape != (n,) or not values.is_floating_point():
        got = type(values).__name__
        if isinstance(values, Tensor):
            got = f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}"
        raise ConfigError(
            f"rows_of: the loss of {n} samples is a {got}; return a floating-point tensor ({n},), "
            "one number for each sample, without a sum or a mean over the batch"
        )
    if not values.requires_grad or not capture.called:
        raise ConfigError(_OF_NO_LAYER)
    try:
        values.sum().backward()
    except StaleBatchError as error:
        raise ConfigError(
            "rows_of: the loss runs the model more than once with gradients, and one row is made "
            "from one forward pass: put the texts into queries of their own and combine their "
            "rows (a row is linear in the loss), or run the others under torch.no_grad()"
        ) from error
    if not capture.parts:
        raise ConfigError(_OF_NO_LAYER)
    capture.fill_unreached()
    # A loss that is made of per_sample_loss has announced the weights of its own terms.
    LOSS_WEIGHTS[loss_key(model)] = LossWeights(torch.ones_like(values))
    return engine.collect_batch(), values.detach()
