"""Losses of documents and queries under a model, by token ids with padding."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.distributed import choose_device
from gradproj.engine.loss import IGNORE, per_sample_loss
from gradproj.evaluation.corpus import PAD
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model

LOSS_BATCH = 32


def load(folder: Path, device: str) -> Any:
    """Load a causal language model, frozen, in float32 and in eval mode."""
    return load_model(fetch(ModelConfig(model=str(folder))), choose_device(device, 0)[0])


def summed_losses(model: nn.Module, ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return each document's loss summed over its targets, ``(n,)`` nats.

    ``ids`` are ``(n, S)`` int64 on the model's device, ``PAD`` after the end of a document, and so
    are ``labels``, by default the ids, with ``PAD`` at tokens that are no target. A causal model
    does not see what follows, so no attention mask is needed.
    """
    labels = ids if labels is None else labels
    batch = {"input_ids": ids.clamp(min=0), "labels": labels.masked_fill(labels == PAD, IGNORE)}
    # load has measured that the model is causal; while weights change, it would be measured again.
    return per_sample_loss(model, batch, chunked=False, causal=False)


@torch.no_grad()
def query_losses(
    model: nn.Module, queries: np.ndarray, labels: np.ndarray | None = None
) -> np.ndarray:
    """Return the losses of token ids ``(Q, S)``, mean nats per target token, ``(Q,)`` float64.

    ``labels`` are those of ``summed_losses``.
    """
    device = next(model.parameters()).device
    labels = queries if labels is None else labels
    both = (torch.from_numpy(x).to(device).split(LOSS_BATCH) for x in (queries, labels))
    losses = torch.cat([summed_losses(model, *batch) for batch in zip(*both, strict=True)])
    return losses.cpu().numpy().astype(np.float64) / (labels[:, 1:] != PAD).sum(axis=1)


def n_targets(ids: np.ndarray) -> np.ndarray:
    """Return the number of target tokens of each row of ``(n, S)``, ``(n,)`` int64."""
    return (ids != PAD).sum(axis=1) - 1
