"""GradProjLora inside transformers' ``Trainer``, as a callback."""

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gradproj.engine.targets import IGNORE, LOSS_WEIGHTS, LossWeights, loss_key
from gradproj.errors import ConfigError, ModelError
from gradproj.training.config import EngineConfig
from gradproj.training.engine_base import TrainingEngine
from gradproj.training.engine_manager import GhostEngineManager


class GradProjCallback(TrainerCallback):
    """Writes the rows of every batch of a ``Trainer`` to ``result_dir/projections``::

        with GradProjCallback(result_dir="out", proj_rank_total=256) as watching:
            Trainer(model=model, args=args, train_dataset=dataset, callbacks=[watching]).train()

    Each row is made at the weights of its step. Training is not changed. Accumulation, mixed
    precision, data parallelism and ``resume_from_checkpoint`` work; resuming cuts the rows after
    the checkpoint. Evaluations leave no rows. A dataset column ``sample_id`` becomes the rows' ids
    and a column ``weight`` multiplies the rows, not the Trainer's loss. Both need
    ``remove_unused_columns=False``; the Trainer's default drops them, which a line then reports.
    The loss must be the model's own, from its labels; a label of -100 carries none.

    Args:
        settings: fields of ``EngineConfig`` without ``method``.

    Raises:
        ConfigError: an unknown name, or a value that cannot be used.
    """

    def __init__(self, **settings: Any) -> None:
        fields = set(EngineConfig.__dataclass_fields__) - {"method"}
        unknown = sorted(set(settings) - fields)
        if unknown:
            raise ConfigError(
                f"GradProjCallback: unknown {', '.join(unknown)}; it takes "
                f"{', '.join(sorted(fields))}"
            )
        self._settings = EngineConfig.of({**settings, "method": "GradProjLora"})
        if not self._settings.result_dir:
            raise ConfigError("GradProjCallback: give a result_dir, in which projections/ is made")
        self._engine: TrainingEngine | None = None
        self._handles: list[Any] = []
        self._step = 0
        self._has_batch = False
        self._says_ids_are_missing = False

    # --- the Trainer's events ---

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the engine; if training is resumed, cut the rows of later steps."""
        model = kwargs["model"]
        sizes = {
            "batch_size": args.per_device_train_batch_size,
            "grad_accumulation": args.gradient_accumulation_steps,
            "max_steps": state.max_steps,
        }
        self._says_ids_are_missing = args.remove_unused_columns and state.is_world_process_zero
        step = state.global_step
        self._engine = GhostEngineManager(
            {**vars(self._settings), **sizes},
            model,
            kwargs.get("optimizer"),
            resume_step=step or None,
        )
        if step:
            self._engine.load_state_dict({"step": step})
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward, with_kwargs=True),
        ]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step + 1

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect a batch; ``on_pre_optimizer_step`` does the step's last."""
        if self._engine is not None and self._has_batch:
            self._engine.aggregate_and_log()
            self._engine.clear_gradients()
            self._has_batch = False

    on_pre_optimizer_step = on_substep_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the rows that a checkpoint counts on, in case the process dies after it."""
        # With "best", the Trainer decides after the last callback whether to save.
        if self._engine is not None and (control.should_save or args.save_strategy == "best"):
            self._engine.state_dict()

    on_evaluate = on_epoch_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_epoch_end(args, state, control)
        if self._engine is not None and self._engine.should_save_metrics(self._step):
            self._engine.save_metrics(self._step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.cleanup()

    def cleanup(self) -> None:
        """Write what is left and remove all hooks; leaving the context does this too."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._engine is not None:
            self._engine.cleanup()
        self._engine = None

    def __enter__(self) -> "GradProjCallback":
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    # --- a batch ---

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids, weights = kwargs.pop("sample_id", None), kwargs.pop("weight", None)
        if module.training and self._engine is not None:
            labels = kwargs.get("labels")
            if labels is None:
                raise ModelError(
                    "GradProjCallback needs the model's own loss: give the model labels, and the "
                    "Trainer neither label_smoothing_factor nor compute_loss_func"
                )
            if ids is None and self._says_ids_are_missing:
                self._says_ids_are_missing = False
                print(
                    "GradProjCallback: the batches have no sample_id, so every row's id is -1. The "
                    "Trainer removes a dataset's columns sample_id and weight unless "
                    "TrainingArguments have remove_unused_columns=False",
                    file=sys.stderr,
                    flush=True,
                )
            inputs = kwargs.get("input_ids", labels)
            ids = ids.cpu().numpy() if isinstance(ids, Tensor) else ids
            more = {} if weights is None else {"weights": _weights(weights, labels)}
            self._engine.attach_train_batch(inputs, labels, self._step, ids, **more)
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Give the engine the loss's weights; the Trainer's later factors are in the gradient."""
        loss, labels = getattr(output, "loss", None), kwargs.get("labels")
        if not module.training or loss is None or labels is None or not loss.requires_grad:
            return
        n_items = kwargs.get("num_items_in_batch")
        if n_items is None:
            n_items = (labels[:, 1:] != IGNORE).sum()

        def announce(gradient: Tensor) -> None:
            weights = (gradient / n_items).expand(len(labels))
            LOSS_WEIGHTS[loss_key(module)] = LossWeights(weights)

        loss.register_hook(announce)
        self._has_batch = True


def _weights(values: Any, labels: Tensor) -> Tensor:
    """Return a batch's column ``weight`` as ``(N,)`` float32 on the labels' device."""
    try:
        weights = torch.as_tensor(values, dtype=torch.float32, device=labels.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"GradProjCallback: the column weight holds no numbers: {error}"
        ) from None
    if weights.shape != labels.shape[:1]:
        raise ConfigError(
            f"GradProjCallback: the column weight of a batch of {len(labels)} samples has the "
            f"shape {tuple(weights.shape)}; give one number for each sample"
        )
    return weights
