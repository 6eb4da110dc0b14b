"""Hooks that lead a model's forward pass through the joint batch of the moment."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.engine.loss import per_sample_loss
from gradproj.engine.row_check import (
    can_try,
    refuse_without_memory,
    short_samples,
    shortened,
    tolerance_of,
    trial_mode,
)
from gradproj.engine.targets import LOSS_WEIGHTS, loss_key
from gradproj.errors import ModelError
from gradproj.training.data_parallel import GradientAverager
from gradproj.training.graddotprod.batch import DotBatch
from gradproj.training.graddotprod.joint_batch import JointBatch
from gradproj.training.graddotprod.layer_rules import DotLayer

log = logging.getLogger(__name__)

LENGTHS = (9, 6, 7)
"""Of the samples of a check: two training samples and a validation sample."""


class ModelHooks:
    """Puts hooks on a model (without wrappers) and its layers.

    They freeze the trainable parameters while a joint batch runs. The averager stands in for
    DistributedDataParallel's reducer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[DotLayer],
        parameters: list[nn.Parameter],
        averager: GradientAverager,
    ) -> None:
        self.batch: DotBatch | None = None
        """The joint batch that the next forward pass is of."""
        self.model, self._layers, self._averager = model, layers, averager
        self._parameters = parameters
        self._frozen: list[nn.Parameter] = []
        self._handles: list[Any] = []
        self._in_forward = False

    @property
    def is_attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on; a second call does nothing."""
        if self._handles:
            return
        self._handles = [
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward, always_call=True),
        ]
        for layer in self._layers:
            hook = self._hook_of(layer)
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))
        self._averager.suspend_ddp()

    def detach(self) -> None:
        """Take the hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._averager.resume_ddp()
        self._handles = []

    def drop_batch(self) -> None:
        """Forget the batch, and let its weights require a gradient again."""
        self.batch, self._in_forward = None, False
        self.unfreeze()

    def unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not torch.is_grad_enabled():
            return
        candidates = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next((x for x in candidates if isinstance(x, Tensor)), None)
        n_samples = 0 if inputs is None else len(inputs)
        n_joined = self.batch.n_samples if self.batch else 0
        if n_samples != n_joined:
            raise ModelError(
                f"the model got {n_samples} samples and GradDotProd joined {n_joined}: give it "
                "what prepare_forward_input returned; evaluate under torch.no_grad(), or after "
                "detach_for_evaluation()"
            )
        self._in_forward = True
        self._averager.suspend_ddp()
        # Otherwise autograd would add the whole joint batch's gradient to .grad.
        for parameter in self._parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)
                self._frozen.append(parameter)

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._in_forward = False

    def _hook_of(self, layer: DotLayer) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled() or self.batch is None:
                return None
            a = args[0] if args else next(iter(kwargs.values()))
            root = torch.zeros((), device=output.device, requires_grad=True)
            # Outside of the forward pass, a checkpointed block runs again for its backward pass.
            return self.batch.tap(layer, a, output, root, again=not self._in_forward)

        return hook


def check_samples(hooks: ModelHooks, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ``ModelError`` unless two samples' inner products exchange places with the samples.

    A model may bring a batch's tokens into another order before a layer sees them, which no shape
    shows. Does nothing for a model that token ids alone do not run.
    """
    model, device = hooks.model, next(iter(parameters.values())).device
    if not can_try(model):
        return

    def dots(order: list[int]) -> Tensor:
        joint = JointBatch(ids[order], labels[order], 2, 1.0, 1.0)
        batch = hooks.batch = DotBatch(joint, lambda parameter, gradient: None)
        given = {"input_ids": joint.input_ids, "labels": joint.labels}
        per_sample_loss(model, given, causal=False).sum().backward()
        batch.finish()
        found = batch.dots(list(parameters.values()))
        hooks.drop_batch()
        return found

    try:
        with trial_mode(model, device):
            ids, labels = short_samples(model, LENGTHS, seed=0)
            forth, back = dots([0, 1, 2]), dots([1, 0, 2]).flip(0)
    except ModelError:
        raise
    except Exception as error:  # the model needs more than token ids
        refuse_without_memory(error, device)
        log.warning("the samples of %s are not checked: %r", type(model).__name__, error)
        return
    finally:
        hooks.drop_batch()
        LOSS_WEIGHTS.pop(loss_key(model), None)
    known = forth.isfinite() | back.isfinite()  # random tokens may overflow in the model itself
    sizes = forth.abs().where(forth.isfinite(), 0)
    limits = tolerance_of(model) * sizes.amax(dim=0).clamp_min(1e-3 * sizes[known].median())
    wrong = (known & ~((forth - back).abs() <= limits)).any(dim=0).tolist()
    names = [name for name, is_wrong in zip(parameters, wrong, strict=True) if is_wrong]
    if names:
        raise ModelError(
            f"GradDotProd: {shortened(names)}: the model brings a batch's tokens into "
            "another order before this layer (an expert, for example), so its samples cannot be "
            "distinguished; freeze it with requires_grad_(False)"
        )
