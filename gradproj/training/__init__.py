"""Training a causal language model on a corpus of tars: a tokenizer, a plain loop."""

from gradproj.training.config import TrainConfig
from gradproj.training.loop import TrainResult, train
from gradproj.training.tokenizer import TokenizerConfig, train_tokenizer

__all__ = ["TokenizerConfig", "TrainConfig", "TrainResult", "train", "train_tokenizer"]
