"""``GhostEngineManager``: the engine that a training loop selects by name."""

from typing import Any

from torch import Tensor, nn

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


class GhostEngineManager:
    """The engine of ``config.method`` behind the same calls for every method.

    Use it as a context manager: leaving it calls ``cleanup``. Each call goes to the engine;
    ``TrainingEngine`` documents them and their order.

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
        self.method = settings.method
        world = world_of(ddp_info)
        context = EngineContext(settings, model, optimizer, world, val_data, loss, resume_step)
        self.engine: TrainingEngine = METHODS[settings.method](context)

    def attach_train_batch(
        self, X: Tensor, Y: Tensor | None = None, iter_num: int | None = None, batch_idx: Any = None
    ) -> None:
        self.engine.attach_train_batch(X, Y, iter_num, batch_idx)

    def prepare_forward_input(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        return self.engine.prepare_forward_input(X, Y)

    def __getattr__(self, name: str) -> Any:
        # Only calls of a training loop: an engine's own attributes are reached by ``engine``.
        if not hasattr(TrainingEngine, name):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.engine, name)

    def __enter__(self) -> "GhostEngineManager":
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.cleanup()
