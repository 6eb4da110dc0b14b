"""GradDotProd in a training loop: its engine behind the loop's calls."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradproj.engine.loss import LOSS_WEIGHTS, loss_key
from gradproj.errors import ConfigError, ModelError
from gradproj.training.engine_base import EngineContext, TrainingEngine
from gradproj.training.graddotprod.engine import GradDotProdEngine
from gradproj.training.graddotprod.shapley import value_table


class GradDotProdTraining(TrainingEngine):
    """Hands all calls to a ``GradDotProdEngine``.

    Raises:
        ConfigError: no validation data.
    """

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        self._step = 0
        if context.val_data is None:
            raise ConfigError(
                "--method GradDotProd compares with validation samples: give val_data=(input_ids, labels)"
            )
        settings, summed = context.settings, context.loss == "sum"
        self.engine = GradDotProdEngine(
            context.model,
            context.val_data,
            loss_reduction=context.loss,
            result_dir=settings.result_dir or None,
            save_interval=settings.proj_save_interval,
            learning_rate=context.optimizer,
            accumulation=self._divisor if summed else settings.grad_accumulation,
            resume_step=context.resume_step,
        )
        self.engine.attach()

    def _divisor(self) -> float:
        """What the loop divided the summed loss by: asked after backward, when ``per_sample_loss`` knows it."""
        weights = LOSS_WEIGHTS.get(loss_key(self.context.model))
        if weights is None:
            raise ModelError(
                'a manager with loss="sum" takes per_sample_loss(model, ...).sum(), times any number; with '
                'the mean of transformers\' own loss leave loss="sum" out'
            )
        return 1 / float(weights[0])

    def attach_train_batch(
        self, X: Tensor, Y: Tensor | None = None, iter_num: int | None = None, batch_idx: Any = None
    ) -> None:
        self._step = self._step + 1 if iter_num is None else iter_num
        self.engine.attach_train_batch(X, Y, self._step, batch_idx)

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        return self.engine.prepare_forward_input(X, Y)

    def prepare_gradients(self) -> None:
        self.engine.prepare_gradients()

    def aggregate_and_log(self, losses: Tensor | None = None) -> None:
        self.engine.aggregate_and_log()

    def clear_gradients(self) -> None:
        self.engine.clear_gradients()

    def should_save_metrics(self, iter_num: int) -> bool:
        return self.engine.should_save_metrics(iter_num)

    def save_metrics(self, iter_num: int) -> None:
        self.engine.save_metrics(iter_num)

    def detach_for_evaluation(self) -> None:
        self.engine.detach_for_evaluation()

    def reattach_after_evaluation(self) -> None:
        self.engine.reattach_after_evaluation()

    def cleanup(self) -> None:
        # Also where an evaluation failed, for which it was detached.
        self.engine.cleanup()

    def reports(
        self, domain_of: Callable[[int], str], text_of: Callable[[int], str]
    ) -> dict[str, str]:
        values = self.engine.shapley_values
        return {"values.md": value_table(values, domain_of, text_of)} if values else {}

    def state_dict(self) -> dict[str, Any]:
        self.engine.save_metrics(self._step)
        return {}
