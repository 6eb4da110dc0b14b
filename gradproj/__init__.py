"""Per-sample projected gradients of a whole corpus, in one shared Zarr array."""

from gradproj.engine import GradProjLoraEngine
from gradproj.loss import per_sample_loss
from gradproj.projection import choose_ki_ko

__all__ = ["GradProjLoraEngine", "choose_ki_ko", "per_sample_loss"]
