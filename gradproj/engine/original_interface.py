"""Calls of the earlier GradProjLora code, for training loops that were written for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradproj.engine.loss import refuse_virtual_tokens
from gradproj.engine.targets import IGNORE
from gradproj.errors import ConfigError


class OriginalInterface:
    """The earlier engine's calls, in terms of ``attach``, ``detach`` and ``collect_batch``."""

    attach: Callable[[], Any]
    detach: Callable[[], None]
    collect_batch: Callable[..., Tensor]
    module: nn.Module
    _loss_factor: Tensor | float | None = None
    """Factor on the next batch's summed losses, if the caller gave its reduction."""
    _batch_ids: Any = None

    def attach_train_batch(
        self,
        X_train: Any = None,
        Y_train: Any = None,
        iter_num: int | None = None,
        batch_idx: Any = None,
        *,
        labels: Tensor | None = None,
        loss_reduction: str | None = None,
    ) -> None:
        """Announce the next training batch and how the user's own loss reduces over it.

        Args:
            X_train: the inputs; unused, as in the earlier code.
            Y_train: stands in for ``labels`` if a ``loss_reduction`` is given.
            iter_num: the step; unused.
            batch_idx: the samples' ids, for ``aggregate_and_log``.
            labels: ``(N, S)``, not shifted, -100 = no target. Their count undoes a mean.
            loss_reduction: ``"mean"`` (over all target tokens of the batch, as in transformers) or
                ``"sum"``.
        """
        self._batch_ids = batch_idx
        labels = Y_train if labels is None else labels
        if loss_reduction is None:
            self._loss_factor = None
        elif loss_reduction == "sum":
            self._loss_factor = 1.0
        elif loss_reduction == "mean" and isinstance(labels, Tensor):
            refuse_virtual_tokens(self.module, "attach_train_batch with loss_reduction='mean'")
            self._loss_factor = 1.0 / (labels[:, 1:] != IGNORE).sum().clamp_min(1)
        else:
            raise ConfigError(
                f"attach_train_batch: loss_reduction is {loss_reduction!r} with labels "
                f"{type(labels).__name__}; give 'sum', or 'mean' with the (N, S) labels"
            )

    def attach_with_optimizer(self, optimizer: Any = None) -> None:
        self.attach()

    def prepare_gradients(self) -> None:
        """Do nothing: the hooks did the work in the backward pass. ``param.grad`` is untouched."""

    def aggregate_and_log(self) -> Tensor:
        """Call ``collect_batch`` with the ids given to ``attach_train_batch``."""
        ids, self._batch_ids = self._batch_ids, None
        return self.collect_batch(ids)

    def detach_for_evaluation(self) -> None:
        """Call ``detach``; unsaved rows are kept."""
        self.detach()

    def reattach_after_evaluation(self) -> None:
        self.attach()
