"""Trains causal language models with an engine inside the loop, this package's or another's."""

from gradproj.training.config import METHODS, EngineConfig, TrainConfig
from gradproj.training.engine_base import EngineContext, TrainingEngine
from gradproj.training.engine_manager import GhostEngineManager
from gradproj.training.hf_callback import GradProjCallback
from gradproj.training.loop import train
from gradproj.training.loss_curve import TrainResult
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

__all__ = [
    "METHODS",
    "EngineConfig",
    "EngineContext",
    "GhostEngineManager",
    "GradProjCallback",
    "TokenizerConfig",
    "TrainConfig",
    "TrainResult",
    "TrainingEngine",
    "train",
    "train_tokenizer",
]
