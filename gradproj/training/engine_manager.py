"""``GhostEngineManager``: the engine that a training loop selects by name."""

from typing import Any

from torch import nn

from gradproj.training.config import METHODS, EngineConfig
from gradproj.training.data_parallel import world_of
from gradproj.training.engine_base import EngineContext, TrainingEngine
from gradproj.training.graddotprod.engine import GradDotProdEngine
from gradproj.training.gradprojlora import GradProjLoraTraining

# A new engine is one file and one entry here.
METHODS |= {
    "Regular": TrainingEngine,
    "GradDotProd": GradDotProdEngine.from_context,
    "GradProjLora": GradProjLoraTraining,
}


def GhostEngineManager(
    config: Any,
    model: nn.Module,
    optimizer: Any = None,
    ddp_info: Any = None,
    val_data: Any = None,
    *,
    loss: str = "mean",
    resume_step: int | None = None,
) -> TrainingEngine:
    """Return the engine of ``config.method``. Use it as a context manager.

    The name is that of a class in earlier GradProjLora code, with the same arguments and calls.

    Args:
        config: any mapping or object with some of ``EngineConfig``'s names, as the loop's config.
        model: the model, on its device.
        optimizer: the loop's; engines may read it.
        ddp_info: rank and world size: a mapping (``rank`` or ``ddp_rank``, ``world_size`` or
            ``ddp_world_size``), an object with these attributes, or None for those of
            ``torch.distributed`` if it is initialised.
        val_data: ``(input_ids, labels)`` of a validation batch, for methods that compare with one.
        loss: the loop's loss over all target tokens of what ``prepare_forward_input`` returned:
            their ``"mean"``, or ``"sum"``: ``per_sample_loss(...).sum()`` times any number.
        resume_step: the last step of the checkpoint that training continues from; None for a new
            run.

    Raises:
        ConfigError: an unknown method, or a setting that it cannot use.
        StoreError: results of another run are in the way.
    """
    settings, world = EngineConfig.of(config), world_of(ddp_info)
    context = EngineContext(settings, model, optimizer, world, val_data, loss, resume_step)
    return METHODS[settings.method](context)
