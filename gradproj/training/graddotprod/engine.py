"""Inner products of every training sample's gradient with a validation gradient, in one backward.

The validation batch is joined to the training rows. While the loss runs backward, every layer hands
over its input and the gradient at its output. From these come the training batch's own gradient,
for the optimizer, and the inner products (``inner_products.py``). arXiv:2406.11011 calls them ghost
dot products.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.layers import without_wrappers
from gradproj.engine.loss import refuse_virtual_tokens
from gradproj.errors import ConfigError, ModelError
from gradproj.training.data_parallel import GradientAverager
from gradproj.training.engine_base import EngineContext, TrainingEngine
from gradproj.training.graddotprod.batch import DotBatch
from gradproj.training.graddotprod.hooks import ModelHooks, check_samples
from gradproj.training.graddotprod.joint_batch import JointBatcher, loss_divisor
from gradproj.training.graddotprod.layer_rules import find_dot_layers
from gradproj.training.graddotprod.shapley import learning_rates, value_table
from gradproj.training.graddotprod.table import DotRows, check_ids

Number = float | Callable[[], float]


class GradDotProdEngine(TrainingEngine):
    """Per-sample inner products ``<g_i, g_validation>`` while a model trains.

    ``g_i`` is the gradient of sample i's contribution to the step's loss: a step's ``g_i`` sum to
    ``.grad`` before clipping. With ``loss_reduction="mean"`` it is the gradient of the sample's
    summed token loss over the number of target tokens of its training batch, with ``"sum"`` that of
    its summed token loss; both divided by ``accumulation`` and the number of ranks.
    ``g_validation`` is the gradient of the validation batch's mean loss per target token. The unit
    is nats squared per unit of weight squared. The folder's README.md has an example.

    The model is causal; samples are padded on the right and need no attention mask. Its weights are
    used through their layers only (Linear, Conv1D, Embedding, layer and RMS norms), never directly.
    Between the forward pass and ``prepare_gradients`` they do not require a gradient. Without
    dropout, whose masks differ, weights after a step equal plain training's within rounding.

    Under DistributedDataParallel ``prepare_gradients`` averages over the ranks. All ranks need the
    same validation data; rank 0 keeps the rows of all.

    Args:
        module: the model, on its device.
        val_data: ``(input_ids, labels)``, each ``(V, S)``; or a mapping with those keys; or token
            ids alone; or a function that returns one of these for every batch. Labels are not
            shifted, -100 = no target.
        loss_reduction: how the loop reduces the loss over all target tokens of the joint batch:
            ``"mean"`` or ``"sum"``.
        result_dir: rows go to ``grad_dotprod/`` in it, a Zarr group; None keeps none.
        save_interval: steps between two writes (``should_save_metrics``); 0 = at the end only.
        learning_rate: for Shapley values: a number, a function, or the optimizer (each parameter's
            own rate when ``aggregate_and_log`` is called); None sums no values.
        accumulation: what the loop divides its loss by and leaves in ``.grad``, as the number of
            micro-batches of a step; a number, or a function called after each backward pass.
        loss_scale: what the loop multiplies its loss by and divides out of ``.grad`` later
            (``scaler.get_scale``).
        labels_shifted: labels are already one position ahead (a loop with its own loss).
        resume_step: the checkpoint's last step, if training continues; later rows are cut.

    Raises:
        ModelError: a trainable parameter is in a layer of an unknown type.
        ConfigError: a setting or ``val_data`` cannot be used.
        StoreError: ``grad_dotprod`` has rows and no ``resume_step`` is given, or another model's.
    """

    def __init__(
        self,
        module: nn.Module,
        val_data: Any,
        *,
        loss_reduction: str = "mean",
        result_dir: str | Path | None = None,
        save_interval: int = 1,
        learning_rate: Any = None,
        accumulation: Number = 1,
        loss_scale: Number = 1.0,
        labels_shifted: bool = False,
        resume_step: int | None = None,
    ) -> None:
        if save_interval < 0:
            raise ConfigError(f"save_interval must be at least 0, got {save_interval}")
        for name, number in (("accumulation", accumulation), ("loss_scale", loss_scale)):
            if not callable(number) and not number > 0:
                raise ConfigError(f"{name} must be more than 0, got {number}")
        if hasattr(module, "_orig_mod"):
            raise ModelError(
                "GradDotProd cannot look into a compiled model: give it the model before "
                "torch.compile"
            )
        refuse_virtual_tokens(module, "GradDotProd")
        self.module, self.learning_rate = module, learning_rate
        self.accumulation, self.loss_scale = accumulation, loss_scale
        self._batcher = JointBatcher(val_data, loss_reduction, labels_shifted)
        layers, inner = find_dot_layers(module), without_wrappers(module)
        trainable = {name: p for name, p in inner.named_parameters() if p.requires_grad}
        self.parameter_names, self._parameters = list(trainable), list(trainable.values())
        self._averager = GradientAverager(module)
        self._world = self._averager.world
        self._hooks = ModelHooks(inner, layers, self._parameters, self._averager)
        folder = None
        if result_dir is not None and not self._world.rank:
            folder = Path(result_dir) / "grad_dotprod"
        self._rows = DotRows(folder, self.parameter_names, save_interval, resume_step)
        self._waiting: dict[nn.Parameter, Tensor] = {}
        self._step = 0
        self._ids: np.ndarray | None = None
        self._n_weighted = 0
        self._prepared = self._checked = False

    @classmethod
    def from_context(cls, context: EngineContext) -> "GradDotProdEngine":
        """Return the attached engine of a ``GhostEngineManager``."""
        if context.val_data is None:
            raise ConfigError(
                "--method GradDotProd compares with validation samples: give "
                "val_data=(input_ids, labels)"
            )
        settings = context.settings
        engine = cls(
            context.model,
            context.val_data,
            loss_reduction=context.loss,
            result_dir=settings.result_dir or None,
            save_interval=settings.proj_save_interval,
            learning_rate=context.optimizer,
            accumulation=settings.grad_accumulation,
            resume_step=context.resume_step,
        )
        engine.context = context
        if context.loss == "sum":
            engine.accumulation = lambda: loss_divisor(engine.module, engine._n_weighted)
        return engine.attach()

    # --- attaching ---

    @property
    def is_attached(self) -> bool:
        return self._hooks.is_attached

    def attach(self) -> "GradDotProdEngine":
        """Put the hooks on, and check the first time that they can tell samples apart.

        A second call does nothing.

        Raises:
            ModelError: a layer sees a batch's tokens in another order than the batch's.
        """
        self._hooks.attach()
        if not self._checked:
            try:
                parameters = zip(self.parameter_names, self._parameters, strict=True)
                check_samples(self._hooks, dict(parameters))
            except BaseException:
                self._hooks.detach()
                raise
            self._checked = True
        return self

    def detach(self) -> None:
        """Take the hooks off and leave the model as it was found; unsaved rows are kept."""
        self._hooks.detach()
        self.clear_gradients()

    def __enter__(self) -> "GradDotProdEngine":
        return self.attach()

    detach_for_evaluation = detach

    def reattach_after_evaluation(self) -> None:
        self.attach()

    def cleanup(self) -> None:
        """Write what is left, and detach; also after an exception."""
        try:
            self.save_metrics()
        finally:
            self.detach()

    # --- a batch ---

    def attach_train_batch(
        self,
        X: Any,
        Y: Any = None,
        iter_num: int | None = None,
        batch_idx: Any = None,
        weights: Any = None,
    ) -> None:
        """Announce the next batch, of the step after the last if ``iter_num`` is None.

        Samples without ids are kept as -1, with no Shapley value. ``weights`` say that the losses
        have some, which are in their gradients already.
        """
        self._ids = check_ids(batch_idx, len(X))
        self._n_weighted = 0 if weights is None else len(X)
        self._step = self._step + 1 if iter_num is None else int(iter_num)

    def prepare_forward_input(self, X: Tensor, Y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Join the training rows with the validation batch, for the forward pass and the loss.

        Returns:
            Joint ids and labels, ``(B + V, S')``: padded on the right to one length, with labels
            -100 there. Without ``Y`` the labels are the token ids.

        Raises:
            ModelError: the engine is not attached, or the last batch was not collected.
            ConfigError: the shapes do not fit, or ``attach_train_batch`` was not called.
        """
        if not self.is_attached:
            raise ModelError(
                "prepare_forward_input: the engine is not attached; call attach() first"
            )
        if self._hooks.batch is not None and self._hooks.batch.n_taken:
            raise ModelError(
                "the batch before was not collected: call prepare_gradients() and "
                "aggregate_and_log() after each backward pass, or clear_gradients() to drop it"
            )
        if self._ids is None or len(self._ids) != len(X):
            raise ConfigError(
                f"prepare_forward_input: call attach_train_batch with these {len(X)} samples first"
            )
        joint = self._batcher.join(X, Y)
        self._hooks.batch = DotBatch(joint, self._deliver)
        return joint.input_ids, joint.labels

    def prepare_gradients(self) -> None:
        """Add the training batch's gradient to ``.grad``; call it after ``loss.backward()``.

        The gradient is averaged over the ranks. Nothing of the validation batch's is in it.
        """
        batch = self._hooks.batch
        if batch is None or self._prepared or not batch.n_taken:
            raise ModelError(
                "prepare_gradients: no batch of prepare_forward_input ran backward; call "
                "loss.backward() first, once"
            )
        batch.finish()
        if self._world.size > 1:
            for parameter, gradient in self._averager.means(self._parameters, self._waiting):
                _add_to_grad(parameter, gradient)
            self._waiting = {}
        self._prepared = True
        self._hooks.unfreeze()

    def aggregate_and_log(self, losses: Tensor | None = None) -> dict[str, Tensor]:
        """Return the batch's inner products; keep them as rows and add up their Shapley values.

        Call it on every rank, before ``scheduler.step()`` changes the learning rate.

        Returns:
            ``sample_id (B,)`` int64, ``total (B,)``, ``per_parameter (B, n_parameters)`` in the
            order of ``parameter_names``, ``value (B,)`` (``lr * dot``; NaN without a learning
            rate); float32 on the CPU.
        """
        batch, ids = self._hooks.batch, self._ids
        if batch is None or ids is None or not self._prepared:
            raise ModelError(
                "aggregate_and_log: call prepare_gradients() first, after loss.backward()"
            )
        factor = batch.joint.train_scale * batch.joint.validation_scale / self._world.size
        # The loss was multiplied by loss_scale / accumulation, which is in both gradients; of this
        # only the training gradient keeps a part, 1 / accumulation.
        factor *= _now(self.accumulation) / _now(self.loss_scale) ** 2
        dots = batch.dots(self._parameters).double().cpu() * factor
        rows = {
            "step": np.full(len(ids), self._step, np.int64),
            "sample_id": ids,
            "total": dots.sum(1).float().numpy(),
            "value": (dots @ learning_rates(self.learning_rate, self._parameters)).float().numpy(),
            "per_parameter": dots.float().numpy(),
        }
        self.clear_gradients()
        self._rows.add(self._world.gather(rows))
        return {name: torch.from_numpy(column) for name, column in rows.items() if name != "step"}

    def clear_gradients(self) -> None:
        """Forget a batch that was not collected. ``.grad`` stays: zeroing it is up to the loop."""
        self._ids, self._waiting, self._prepared = None, {}, False
        self._hooks.drop_batch()

    def _deliver(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        # Several ranks must average this gradient before it meets those of earlier micro-batches.
        if self._world.size > 1:
            self._waiting[parameter] = gradient
        else:
            _add_to_grad(parameter, gradient)

    # --- results ---

    @property
    def shapley_values(self) -> dict[int, float]:
        """Sample id -> in-run data Shapley value so far, nats, of all ranks (``shapley.py``)."""
        return dict(self._rows.values)

    def should_save_metrics(self, iter_num: int | None = None) -> bool:
        """Return whether ``save_interval`` steps are waiting to be written."""
        return self._rows.is_due()

    def save_metrics(self, iter_num: int | None = None) -> Path | None:
        """Append all rows since the last write; return the folder, None if nothing was written."""
        return self._rows.write()

    def reports(
        self, domain_of: Callable[[int], str], text_of: Callable[[int], str]
    ) -> dict[str, str]:
        values = self.shapley_values
        return {"values.md": value_table(values, domain_of, text_of)} if values else {}

    def state_dict(self) -> dict[str, Any]:
        self.save_metrics()
        return {}


def _now(number: Number) -> float:
    return float(number() if callable(number) else number)


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
