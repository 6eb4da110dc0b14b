"""Rows of queries by a loss of the caller's, each batch checked by a sample alone."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from gradproj.engine.batching import BatchConfig, fit_padding, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.own_loss import OwnLoss, inputs_of, run_own_loss
from gradproj.engine.run_batch import run_in_halves
from gradproj.errors import ConfigError
from gradproj.model.sequences import TokenSequence

TOLERANCE = {"float32": 1e-3, "bfloat16": 1e-1}
"""Dtype of the model -> largest relative difference of a sample's row alone and in its batch."""


class OwnLossRows:
    """Rows and values of a caller's loss, in the batches of a job.

    Of every batch of several samples the shortest runs again alone. If its row or its value is
    another then, the loss mixes samples or counts padding, and is refused.

    Args:
        model: frozen.
        engine: of the model, attached.
        loss: ``loss(model, inputs) -> (N,)``.
        sequences: one of each sample, in order. Its factor multiplies the row.
        places: names of the samples in messages.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: GradProjLoraEngine,
        loss: OwnLoss,
        sequences: Sequence[TokenSequence],
        places: Sequence[str],
    ) -> None:
        self._model, self._engine, self._loss = model, engine, loss
        self._sequences, self._places = sequences, places
        weight = next(model.parameters())
        self._device = weight.device
        self._tolerance = TOLERANCE[str(weight.dtype).removeprefix("torch.")]

    def compute(self, batch: BatchConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return ``(rows (N, D) float32, values (N,) float64)``.

        Raises:
            ConfigError: the loss is not one number for each sample by itself, or has a gradient
                that is zero or not finite; a sample does not fit the device's memory.
        """
        rows = np.zeros((len(self._sequences), self._engine.total_proj_dim), np.float32)
        values = np.zeros(len(self._sequences))
        lengths = list(map(len, self._sequences))
        budget, padding = batch.batch_tokens or BatchConfig().batch_tokens, batch.max_padding
        if len(set(lengths)) > 1:
            padding = fit_padding(self._model, batch, max(lengths)).max_padding
        for chosen in plan_batches(lengths, batch.batch_size, budget, padding):
            for part, result in run_in_halves(self._engine, chosen, self._run):
                if result is None:
                    raise ConfigError(
                        f"{self._places[part[0]]}: does not fit the memory of {self._device}; try "
                        "--device cpu"
                    )
                rows[part], values[part] = (x.float().cpu().numpy() for x in result)
                self._check_finite(part, rows)
                if len(part) > 1:
                    self._check_alone(part, rows[part], values[part])
        factors = np.array([sequence.factor for sequence in self._sequences], np.float32)
        return rows * factors[:, None], values

    def _run(self, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs = inputs_of([self._sequences[i] for i in chosen], self._device)
        result = run_own_loss(self._model, self._engine, inputs, self._loss)
        self._engine.take_token_covariances()  # a query needs none
        return result

    def _check_finite(self, part: np.ndarray, rows: np.ndarray) -> None:
        for i in part.tolist():
            if not np.isfinite(rows[i]).all():
                raise ConfigError(
                    f"{self._places[i]}: the gradient of its loss is not finite; leave the query "
                    "out"
                )
            if not rows[i].any():
                raise ConfigError(
                    f"{self._places[i]}: the gradient of its loss is zero, which ranks no document"
                )

    def _check_alone(self, part: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
        shortest = part[-1:]  # a batch has its longest sample first
        row, value = (x[0].float().cpu().numpy() for x in self._run(shortest))
        length = max(float(np.linalg.norm(row)), 1e-3 * float(np.median(_norms(rows))))
        moved = float(np.linalg.norm(row - rows[-1])) / length
        most = self._tolerance * float(np.abs(values).max())
        if moved > self._tolerance or abs(float(value) - values[-1]) > most:
            raise ConfigError(
                f"rows_of: {self._places[shortest[0]]} has the loss {value:.6g} alone and "
                f"{values[-1]:.6g} in a batch of {len(part)}, where its row is {moved:.1e} from "
                "that alone. A loss must be of each sample by itself: without a mean, a maximum or "
                "a difference over the batch, and without padding (attention_mask is 0 there)"
            )


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows, axis=1)
