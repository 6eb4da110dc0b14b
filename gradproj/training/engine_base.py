"""What the training loop asks of an engine; to this one each thing means nothing, so training is as without."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradproj.distributed import World
from gradproj.training.config import EngineConfig


@dataclass(frozen=True)
class EngineContext:
    """What an engine is made from."""

    settings: EngineConfig
    model: nn.Module
    """On its device; not yet inside of DistributedDataParallel, or inside of it."""
    optimizer: Any
    world: World
    val_data: Any
    """``(input_ids, labels)`` of a validation batch, or None."""
    loss: str = "mean"
    """Over the target tokens that ran forward, ``per_sample_loss``'s times any number (``"sum"``) or the mean."""
    resume_step: int | None = None
    """The last step of the checkpoint that training goes on from; None where it begins."""


class TrainingEngine:
    """An engine that does nothing; the base of those that do something, which override what they need.

    The loop calls, for every batch: ``attach_train_batch``, ``prepare_forward_input``, forward and backward,
    ``prepare_gradients``, ``aggregate_and_log``, ``clear_gradients``; after the optimizer's step ``save_metrics`` where
    ``should_save_metrics`` says so; around evaluations ``detach_for_evaluation`` and ``reattach_after_evaluation``; at
    the end, whatever happened, ``cleanup``.
    """

    def __init__(self, context: EngineContext) -> None:
        self.context = context

    def attach_train_batch(
        self, X: Tensor, Y: Tensor | None = None, iter_num: int | None = None, batch_idx: Any = None
    ) -> None:
        """A batch is about to run: ``(N, S)`` inputs, ``(N, S)`` labels (not shifted, -100 = no target), step, ids."""

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """What is to run forward; the batch's own rows come first."""
        return X, Y

    def prepare_gradients(self) -> None:
        """After backward: leave in ``.grad`` the gradient of the batch's own rows."""

    def aggregate_and_log(self, losses: Tensor | None = None) -> None:
        """Take from the batch what is wanted; ``losses`` are its samples' summed losses ``(N,)``, where known."""

    def clear_gradients(self) -> None:
        """Forget what is left of the batch."""

    def should_save_metrics(self, iter_num: int) -> bool:
        """Whether this is a step after which ``save_metrics`` is due."""
        return False

    def save_metrics(self, iter_num: int) -> None:
        """Write all that was not written yet."""

    def detach_for_evaluation(self) -> None:
        """Take no part in what runs from here on."""

    def reattach_after_evaluation(self) -> None:
        """Take part again."""

    def cleanup(self) -> None:
        """Write what is left and leave the model as it was found; a second call does nothing."""

    def reports(
        self, domain_of: Callable[[int], str], text_of: Callable[[int], str]
    ) -> dict[str, str]:
        """At the end: what people may want to read, by file name; of sample ids the domain and the text are known."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; all before it is written."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; what was written after it is cut off. An empty state: from the beginning.

        A loop that did not keep a ``state_dict`` can give ``{"step": last step done}``.
        """
