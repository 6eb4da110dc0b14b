"""The optimizer of a training run, and its learning rate at each step."""

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from gradproj.training.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    groups = parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    return AdamW(groups, lr=config.learning_rate)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two groups: matrices with weight decay, biases and norms without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def rate_at(step: int, config: TrainConfig) -> float:
    """Return the learning rate at a step (from 0) as a fraction of the highest.

    It rises linearly over the warm-up steps and then follows the schedule.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps))
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * done))
    return {"cosine": cosine, "linear": 1.0 - done, "constant": 1.0}[config.schedule]
