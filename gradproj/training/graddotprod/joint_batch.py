"""Joins training rows with a validation batch, and scales the joint gradient for either part."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.engine.targets import IGNORE, LOSS_WEIGHTS, loss_key
from gradproj.errors import ConfigError, ModelError


@dataclass(frozen=True)
class JointBatch:
    """A joint batch: training rows first."""

    input_ids: Tensor
    """``(B + V, S)``."""
    labels: Tensor
    """``(B + V, S)``."""
    n_train: int
    """B."""
    train_scale: float
    """Factor from the joint loss's gradient at the training rows to that of their own loss."""
    validation_scale: float
    """Likewise at the validation rows, to that of their mean loss per target token."""


class JointBatcher:
    """Joins batches with validation data, which is as ``GradDotProdEngine`` takes it."""

    def __init__(self, val_data: Any, loss_reduction: str, labels_shifted: bool) -> None:
        if loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction is {loss_reduction!r}; choose mean or sum")
        self._val_data, self._reduction, self._shifted = val_data, loss_reduction, labels_shifted
        if not callable(val_data):
            self._validation()  # raises a user's error now and not in the first step

    def join(self, x_train: Tensor, y_train: Tensor | None) -> JointBatch:
        """Put the validation batch below a batch, both padded on the right to one length.

        Raises:
            ConfigError: the shapes of ids and labels differ.
        """
        x, y = _checked("X, Y", x_train, y_train)
        x_val, y_val = (part.to(x.device) for part in self._validation())
        n_train, n_val = self._n_targets(y), self._n_targets(y_val)
        if self._reduction == "sum":
            scales = 1.0, 1 / n_val
        else:
            scales = (n_train + n_val) / max(1, n_train), (n_train + n_val) / n_val
        return JointBatch(_below(x, x_val, 0), _below(y, y_val, IGNORE), len(x), *scales)

    def _validation(self) -> tuple[Tensor, Tensor]:
        data = self._val_data() if callable(self._val_data) else self._val_data
        if isinstance(data, Mapping):
            data = (data.get("input_ids"), data.get("labels"))
        elif isinstance(data, Tensor):
            data = (data, None)
        if not isinstance(data, tuple | list) or len(data) != 2:
            raise ConfigError(
                f"val_data is {type(data).__name__}; give (input_ids, labels), a mapping with "
                "these keys, or token ids"
            )
        x, y = _checked("val_data", *data)
        if not self._n_targets(y):
            raise ConfigError(
                "val_data has no target token: every label is -100, or the samples have one token "
                "each"
            )
        return x, y

    def _n_targets(self, labels: Tensor) -> int:
        return int(((labels if self._shifted else labels[:, 1:]) != IGNORE).sum())


def loss_divisor(model: nn.Module, n_weighted: int = 0) -> float:
    """Return what a loop divided the summed ``per_sample_loss`` of its last backward pass by.

    The first ``n_weighted`` samples have weights of their own; the others, of the validation
    batch, have none.
    """
    weights = LOSS_WEIGHTS.get(loss_key(model))
    if weights is None:
        raise ModelError(
            'a manager with loss="sum" takes per_sample_loss(model, ...).sum(), times any number; '
            'with the mean of transformers\' own loss leave loss="sum" out'
        )
    least, most = torch.stack(weights.values[n_weighted:].aminmax()).tolist()
    if least != most:
        raise ModelError(
            f"GradDotProd takes losses of one weight, got weights from {least:g} to {most:g}: give "
            "per_sample_loss(model, ...).sum() times one number"
        )
    # A loss of weight 0 has no gradient, whatever it is multiplied by.
    return 1 / most if most else 1.0


def _checked(name: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
    y = x if y is None else y
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in (x, y)]
    if not isinstance(x, Tensor) or x.dim() != 2 or not len(x) or shapes[0] != shapes[1]:
        raise ConfigError(
            f"{name}: token ids and labels are (N, S) tensors of one shape, got {shapes[0]} and "
            f"{shapes[1]}"
        )
    return x, y


def _below(train: Tensor, validation: Tensor, pad: int) -> Tensor:
    parts = (train, validation)
    length = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, length - part.shape[1]), value=pad) for part in parts])
