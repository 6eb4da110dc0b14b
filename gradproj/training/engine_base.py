"""Base class for training engines. All calls are no-ops, so the base class trains unmodified."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from gradproj.distributed import World
from gradproj.training.config import EngineConfig


@dataclass(frozen=True)
class EngineContext:
    """Everything that an engine is made from; see ``GhostEngineManager``."""

    settings: EngineConfig
    model: nn.Module
    """On its device; wrapped in DistributedDataParallel or not."""
    optimizer: Any
    world: World
    val_data: Any
    """``(input_ids, labels)`` of a validation batch, or None."""
    loss: str = "mean"
    resume_step: int | None = None


class TrainingEngine:
    """An engine that does nothing. Subclasses override the calls they need.

    For every batch the loop calls ``attach_train_batch``, ``prepare_forward_input``, forward and
    backward, ``prepare_gradients``, ``aggregate_and_log`` and ``clear_gradients``. After an
    optimizer step it calls ``save_metrics`` if ``should_save_metrics`` returns True. Evaluations
    are between ``detach_for_evaluation`` and ``reattach_after_evaluation``. ``cleanup`` comes last,
    also after an exception; leaving the engine's context calls it.
    """

    context: EngineContext
    """Set by the constructor; a ``GradDotProdEngine`` made without a manager has none."""

    def __init__(self, context: EngineContext) -> None:
        self.context = context

    # Names of earlier code: its manager held the engine and passed calls on.
    @property
    def engine(self) -> Self:
        return self

    @property
    def method(self) -> str:
        return self.context.settings.method

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def attach_train_batch(
        self,
        X: Tensor,
        Y: Tensor | None = None,
        iter_num: int | None = None,
        batch_idx: Any = None,
        weights: Tensor | None = None,
    ) -> None:
        """Announce the next batch.

        Args:
            X: ``(N, S)`` int64 token ids.
            Y: ``(N, S)`` int64 labels, not shifted, -100 = no target.
            iter_num: the step.
            batch_idx: the samples' ids, ``(N,)``.
            weights: what the samples' losses are multiplied by, ``(N,)``; not given if all are 1.
        """

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids and labels to run forward; the batch's own rows come first."""
        return X, Y

    def prepare_gradients(self) -> None:
        """Leave the gradient of the batch's own rows in ``.grad``. Called after backward."""

    def aggregate_and_log(self, losses: Tensor | None = None) -> Any:
        """Keep what the engine computes from a batch with summed losses ``(N,)``, nats."""

    def clear_gradients(self) -> None:
        """Drop all that is left of the batch."""

    def should_save_metrics(self, iter_num: int) -> bool:
        """Return whether ``save_metrics`` is due after this step."""
        return False

    def save_metrics(self, iter_num: int) -> Any:
        """Write everything not written yet."""

    def detach_for_evaluation(self) -> None:
        """Ignore forward and backward passes from now on."""

    def reattach_after_evaluation(self) -> None:
        """Take part again."""

    def cleanup(self) -> None:
        """Write what is left and restore the model; a second call does nothing."""

    def reports(
        self, domain_of: Callable[[int], str], text_of: Callable[[int], str]
    ) -> dict[str, str]:
        """Return file name -> text for readers, made at the end of a run."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Write everything, and return what a checkpoint keeps of the engine."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint and cut what was written after it.

        Args:
            state: from ``state_dict``; empty for a start from the beginning; or ``{"step": last
                step}`` from a loop that did not keep a ``state_dict``.
        """
