"""``GhostEngineManager``: the engine that a training loop asks for by name, behind calls that are the same for all."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gradproj.errors import ConfigError
from gradproj.training.config import EngineConfig
from gradproj.training.data_parallel import world_of
from gradproj.training.engine_base import EngineContext, TrainingEngine
from gradproj.training.graddotprod.method import GradDotProdTraining
from gradproj.training.gradprojlora import GradProjLoraTraining

METHODS: dict[str, Callable[[EngineContext], TrainingEngine]] = {
    "Regular": TrainingEngine,
    "GradDotProd": GradDotProdTraining,
    "GradProjLora": GradProjLoraTraining,
}
"""``--method`` -> what makes its engine. A further engine is a file of its own and one entry here."""


class GhostEngineManager:
    """The engine of ``config.method``, for a loop that does not know which it is. A context manager that cleans up.

    Args:
        config: anything with some of ``EngineConfig``'s names: the loop's own config, a namespace or a mapping.
        model: the model, on its device.
        optimizer: of the loop; at the disposal of engines.
        ddp_info: rank and world size: a mapping (``rank`` or ``ddp_rank``, ``world_size`` or ``ddp_world_size``), an
            object with these names, or None for those of ``torch.distributed``, if it was initialised.
        val_data: ``(input_ids, labels)`` of a validation batch, for methods that compare with one.
        loss: what the loop's loss is over all target tokens of what ``prepare_forward_input`` returned: their
            ``"mean"``, or ``"sum"``: ``per_sample_loss(...).sum()``, multiplied by any number.
        resume_step: the last step of the checkpoint that training goes on from; None where it begins.

    Raises:
        ConfigError: an unknown method, or a setting that it cannot work with.
        StoreError: results of another run are in the way.
    """

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        optimizer: Any = None,
        ddp_info: Any = None,
        val_data: Any = None,
        *,
        loss: str = "mean",
        resume_step: int | None = None,
    ) -> None:
        settings = EngineConfig.of(config)
        check_method(settings.method)
        self.method = settings.method
        world = world_of(ddp_info)
        context = EngineContext(settings, model, optimizer, world, val_data, loss, resume_step)
        self.engine = METHODS[settings.method](context)

    def attach_train_batch(
        self, X: Tensor, Y: Tensor | None = None, iter_num: int | None = None, batch_idx: Any = None
    ) -> None:
        """Say what is about to be trained on.

        Args:
            X: ``(N, S)`` int64 token ids.
            Y: ``(N, S)`` int64 labels, not shifted, -100 = no target.
            iter_num: the step.
            batch_idx: the samples' ids, ``(N,)``.
        """
        self.engine.attach_train_batch(X, Y, iter_num, batch_idx)

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """What is to run forward: the batch's rows first, then those that the engine wants beside them."""
        return self.engine.prepare_forward_input(X, Y)

    def prepare_gradients(self) -> None:
        """After backward, before clipping and the optimizer: ``.grad`` is the training batch's."""
        self.engine.prepare_gradients()

    def aggregate_and_log(self, losses: Tensor | None = None) -> None:
        """After every backward: the engine takes what it wants; ``losses`` are the samples' own ``(N,)``, if known."""
        self.engine.aggregate_and_log(losses)

    def clear_gradients(self) -> None:
        """After ``aggregate_and_log``: nothing of the batch is kept."""
        self.engine.clear_gradients()

    def should_save_metrics(self, iter_num: int) -> bool:
        """Whether ``save_metrics`` is due."""
        return self.engine.should_save_metrics(iter_num)

    def save_metrics(self, iter_num: int) -> None:
        """Write all that the engine has and has not written yet."""
        self.engine.save_metrics(iter_num)

    def detach_for_evaluation(self) -> None:
        """Before an evaluation, of which the engine is to see nothing."""
        self.engine.detach_for_evaluation()

    def reattach_after_evaluation(self) -> None:
        """After an evaluation."""
        self.engine.reattach_after_evaluation()

    def cleanup(self) -> None:
        """At the end, also after an exception: write what is left, take all hooks off."""
        self.engine.cleanup()

    def reports(
        self, domain_of: Callable[[int], str], text_of: Callable[[int], str]
    ) -> dict[str, str]:
        """At the end: file name -> text for people, about the samples that were trained on."""
        return self.engine.reports(domain_of, text_of)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the engine, which has written all it has by then."""
        return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint: what was written after it is cut off."""
        self.engine.load_state_dict(state)

    def __enter__(self) -> "GhostEngineManager":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()


def check_method(method: str) -> None:
    """Refuse a method that nobody knows.

    Raises:
        ConfigError: it, and those that there are.
    """
    if method not in METHODS:
        raise ConfigError(f"--method is {method!r}; choose one of {', '.join(METHODS)}")
