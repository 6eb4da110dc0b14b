"""Inner products of every training sample's gradient with a validation batch's, in the loop's own backward pass.

The validation batch rides along: its rows are joined to the training rows, and while the loss runs backward every layer
hands over its input and the gradient at its output. From these come the training batch's gradient alone, for the
optimizer, and the inner products (``dotproducts.py``). arXiv:2406.11011 calls it a ghost dot product.
"""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.engine.layers import without_wrappers
from gradproj.errors import ConfigError, ModelError
from gradproj.training.data_parallel import GradientAverager
from gradproj.training.graddotprod.batch import DotBatch
from gradproj.training.graddotprod.joint_batch import JointBatch, JointBatcher
from gradproj.training.graddotprod.layer_rules import DotLayer, find_dot_layers
from gradproj.training.graddotprod.shapley import learning_rates
from gradproj.training.graddotprod.table import DotRows

Number = float | Callable[[], float]


class GradDotProdEngine:
    """Per-sample inner products ``<g_i, g_validation>`` while a model trains.

    ``g_i`` is the gradient of sample i's contribution to the step's loss, so that a step's ``g_i`` sum to ``.grad``
    (before clipping): of its summed token loss over the number of target tokens of its training batch
    (``loss_reduction="mean"``) or of its summed token loss (``"sum"``), divided by ``accumulation`` and the number of
    ranks. ``g_validation`` is the gradient of the validation batch's mean loss per target token. Nats squared, per unit
    of weight squared::

        with GradDotProdEngine(model, (X_val, Y_val), learning_rate=optimizer, result_dir="out") as engine:
            for step, (X, Y, sample_ids) in enumerate(batches):
                engine.attach_train_batch(X, Y, step, sample_ids)
                X_joined, Y_joined = engine.prepare_forward_input(X, Y)
                model(input_ids=X_joined, labels=Y_joined).loss.backward()
                engine.prepare_gradients()
                engine.aggregate_and_log()
                optimizer.step(); optimizer.zero_grad()
                if engine.should_save_metrics(step): engine.save_metrics(step)

    The model is causal; samples are padded on the right and need no attention mask. Its weights are used through their
    layers only (Linear, Conv1D, Embedding, layer and RMS norms), never by hand. Between the forward pass and
    ``prepare_gradients`` they do not require a gradient: autograd would make the joined batch's. With dropout, other
    masks are drawn than without the engine; without it, weights after a step equal those of plain training to rounding.

    Under DistributedDataParallel its reducer is told to wait, and ``prepare_gradients`` averages over the ranks itself.
    Give every rank the same validation data; rank 0 keeps the rows of all.

    Args:
        module: the model, on its device.
        val_data: ``(input_ids, labels)``, each ``(V, S)``; or a mapping with those keys; or token ids alone; or a
            function that returns one of these for every batch. Labels are not shifted, -100 = no target.
        loss_reduction: what the loop's loss is over all target tokens of the joined batch: ``"mean"`` or ``"sum"``.
        result_dir: rows go to ``grad_dotprod/`` in it, a Zarr group; None keeps none.
        save_interval: ``should_save_metrics`` asks for a write after so many steps; 0 = at the end only.
        learning_rate: for Shapley values: a number, a function, or the optimizer (each parameter's own rate, as it is
            when ``aggregate_and_log`` is called); None sums no values.
        accumulation: what the loop divides its loss by and leaves in ``.grad``, as the number of micro-batches of a
            step; a number, or a function that is asked after each backward pass.
        loss_scale: what the loop multiplies its loss by and divides out of ``.grad`` later (``scaler.get_scale``).
        labels_shifted: labels are one position ahead already (a loop with a loss of its own).
        resume_step: the last step in the checkpoint that training goes on from; later rows are cut.

    Raises:
        ModelError: a trainable parameter in a layer of an unknown type.
        ConfigError: a setting or ``val_data`` cannot be used.
        StoreError: ``grad_dotprod`` has rows already and ``resume_step`` is not given, or those of another model.
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
                "GradDotProd cannot look into a compiled model: give it the model before torch.compile"
            )
        self.module = module
        self.accumulation, self.loss_scale = accumulation, loss_scale
        self.learning_rate = learning_rate
        self._joiner = JointBatcher(val_data, loss_reduction, labels_shifted)
        self._inner = without_wrappers(module)
        self._layers = find_dot_layers(module)
        named = [(name, p) for name, p in self._inner.named_parameters() if p.requires_grad]
        self.parameter_names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._averager = GradientAverager(module)
        self._world = self._averager.world
        folder = None if result_dir is None else Path(result_dir) / "grad_dotprod"
        self._rows = DotRows(
            folder if self._world.rank == 0 else None,
            self.parameter_names,
            save_interval,
            resume_step,
        )
        self._handles: list[Any] = []
        self._frozen: list[nn.Parameter] = []
        self._held: dict[nn.Parameter, Tensor] = {}
        self._noted: tuple[int, np.ndarray] | None = None
        self._batch: DotBatch | None = None
        self._joined: JointBatch | None = None
        self._in_forward = self._prepared = False

    # --- on and off ---

    @property
    def is_attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> "GradDotProdEngine":
        """Put the hooks on (once; a second call does nothing)."""
        if self._handles:
            return self
        self._handles = [
            self._inner.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._inner.register_forward_hook(self._after_forward, always_call=True),
        ]
        for layer in self._layers:
            self._handles.append(
                layer.module.register_forward_hook(self._hook_of(layer), with_kwargs=True)
            )
        self._averager.suspend_ddp()
        return self

    def detach(self) -> None:
        """Take the hooks off and leave the model as it was found; rows not saved yet are kept."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._averager.resume_ddp()
        self._handles = []
        self.clear_gradients()

    def __enter__(self) -> "GradDotProdEngine":
        return self.attach()

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    def detach_for_evaluation(self) -> None:
        """As ``detach``."""
        self.detach()

    def reattach_after_evaluation(self) -> None:
        """As ``attach``."""
        self.attach()

    def cleanup(self) -> None:
        """Write what is left, and detach; also after an exception."""
        try:
            self.save_metrics()
        finally:
            self.detach()

    # --- a batch ---

    def attach_train_batch(
        self, X_train: Any, Y_train: Any, iter_num: int, batch_idx: Any = None
    ) -> None:
        """Say what is about to be trained on.

        Args:
            X_train: token ids ``(B, S)``.
            Y_train: their labels.
            iter_num: the step; micro-batches of a step share it.
            batch_idx: the samples' ids, B integers; None where they have none (kept as -1, with no Shapley value).
        """
        n = len(X_train)
        ids = (
            np.full(n, -1)
            if batch_idx is None
            else np.asarray(torch.as_tensor(batch_idx).cpu(), np.int64)
        )
        if ids.shape != (n,):
            raise ConfigError(
                f"attach_train_batch: {n} samples and batch_idx of shape {ids.shape}; give one id a sample"
            )
        self._noted = (int(iter_num), ids)

    def prepare_forward_input(
        self, X_train: Tensor, Y_train: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The training rows joined with the validation batch, for the loop's forward pass and loss.

        Args:
            X_train: ``(B, S)`` int64 token ids, on the model's device.
            Y_train: ``(B, S)`` labels, -100 = no target; None: the token ids.

        Returns:
            ``(X, Y)``, ``(B + V, S')``: padded on the right to one length, with labels -100 there.

        Raises:
            ModelError: the engine is not attached, or the batch before was not collected.
            ConfigError: the shapes do not fit, or ``attach_train_batch`` was not called.
        """
        if not self._handles:
            raise ModelError(
                "prepare_forward_input: the engine is not attached; call attach() first"
            )
        if self._batch is not None and self._batch.n_taken:
            raise ModelError(
                "the batch before was not collected: call prepare_gradients() and aggregate_and_log() after each "
                "backward pass, or clear_gradients() to drop it"
            )
        if self._noted is None or len(self._noted[1]) != len(X_train):
            raise ConfigError(
                f"prepare_forward_input: call attach_train_batch with these {len(X_train)} samples first"
            )
        joined = self._joined = self._joiner.join(X_train, Y_train)
        n, length = joined.labels.shape
        self._batch = DotBatch(joined.n_train, (n, length), joined.train_scale, self._deliver)
        return joined.input_ids, joined.labels

    def prepare_gradients(self) -> None:
        """After ``loss.backward()``: ``.grad`` of every parameter gets the training batch's gradient (added to what is
        there), averaged over the ranks, and nothing of the validation batch's.

        Raises:
            ModelError: no batch ran forward and backward since the last call.
        """
        batch = self._batch
        if batch is None or self._prepared or not batch.n_taken:
            raise ModelError(
                "prepare_gradients: no batch of prepare_forward_input ran backward; call loss.backward() first, once"
            )
        batch.finish()
        if self._world.size > 1:
            for parameter, gradient in self._averager.means(self._parameters, self._held):
                _add_to_grad(parameter, gradient)
            self._held = {}
        self._prepared = True
        self._unfreeze()

    def aggregate_and_log(self) -> dict[str, Tensor]:
        """The batch's inner products, which are also kept for ``save_metrics`` and summed into Shapley values.

        Call it before ``scheduler.step()``, while the learning rate is this step's. Under several ranks all call it.

        Returns:
            ``sample_id (B,)`` int64, ``total (B,)``, ``per_parameter (B, n_parameters)`` in the order of
            ``parameter_names``, ``value (B,)`` (``lr * dot``; NaN without a learning rate); float32 on the CPU.

        Raises:
            ModelError: ``prepare_gradients`` was not called.
        """
        batch, joined = self._batch, self._joined
        if batch is None or joined is None or self._noted is None or not self._prepared:
            raise ModelError(
                "aggregate_and_log: call prepare_gradients() first, after loss.backward()"
            )
        factor = joined.train_scale * joined.validation_scale / self._world.size
        factor *= _now(self.accumulation) / _now(self.loss_scale) ** 2
        dots = batch.dots(self._parameters).double().cpu() * factor
        step, ids = self._noted
        rows = {
            "step": np.full(len(ids), step, np.int64),
            "sample_id": ids,
            "total": dots.sum(1).float().numpy(),
            "value": (dots @ learning_rates(self.learning_rate, self._parameters)).float().numpy(),
            "per_parameter": dots.float().numpy(),
        }
        self.clear_gradients()
        self._rows.add(self._world.gather(rows))
        return {name: torch.from_numpy(column) for name, column in rows.items() if name != "step"}

    def clear_gradients(self) -> None:
        """Forget a batch that was not collected. ``.grad`` stays as it is: zeroing it is the loop's."""
        self._batch, self._joined, self._noted, self._held = None, None, None, {}
        self._in_forward = self._prepared = False
        self._unfreeze()

    # --- what comes out ---

    @property
    def shapley_values(self) -> dict[int, float]:
        """Sample id -> first-order in-run data Shapley value so far, nats (``values.py``); of all ranks' samples."""
        return self._rows.values.as_dict()

    def should_save_metrics(self, iter_num: int | None = None) -> bool:
        """Whether ``save_interval`` steps are waiting to be written."""
        return self._rows.is_due()

    def save_metrics(self, iter_num: int | None = None) -> Path | None:
        """Append all rows since the last write; the folder, or None where nothing was written."""
        return self._rows.write()

    # --- hooks ---

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        given = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((x for x in given if isinstance(x, Tensor)), None)
        n, wanted = (
            0 if inputs is None else len(inputs),
            self._batch.n_samples if self._batch else 0,
        )
        if n != wanted:
            raise ModelError(
                f"the model got {n} samples and GradDotProd joined {wanted}: give it what prepare_forward_input "
                "returned; evaluate under torch.no_grad(), or detach_for_evaluation() before"
            )
        self._in_forward = True
        self._averager.suspend_ddp()
        for parameter in self._parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_forward = False

    def _hook_of(self, layer: DotLayer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or self._batch is None:
                return None
            a = args[0] if args else next(iter(kwargs.values()))
            root = torch.zeros((), device=output.device, requires_grad=True)
            return self._batch.tap(layer, a, output, root, again=not self._in_forward)

        return hook

    # --- parts ---

    def _deliver(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        # Several ranks must average this batch's gradient before it meets those of earlier micro-batches.
        if self._world.size > 1:
            self._held[parameter] = gradient
        else:
            _add_to_grad(parameter, gradient)

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def _now(number: Number) -> float:
    return float(number() if callable(number) else number)


def _add_to_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
