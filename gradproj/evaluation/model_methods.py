"""Baselines that look at the model without gradients: its hidden states."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradproj.evaluation.retraining import LOSS_BATCH, load


@torch.no_grad()
def mean_hidden_states(folder: Path, ids: np.ndarray, device: str) -> Tensor:
    """``(n, H)`` float32: the mean over the tokens of what the vocabulary head reads, for token ids ``(n, S)``."""
    model = load(folder, device)
    parts = [
        model.base_model(
            input_ids=torch.from_numpy(ids[i : i + LOSS_BATCH]).to(model.device), use_cache=False
        )[0]
        .mean(dim=1)
        .cpu()
        for i in range(0, len(ids), LOSS_BATCH)
    ]
    return torch.cat(parts)


def hidden_cosine(
    folder: Path, documents: np.ndarray, queries: np.ndarray, device: str
) -> np.ndarray:
    """``(Q, N)`` cosine of mean hidden states, the documents' own mean taken out first (all texts share most of it)."""
    of_documents = mean_hidden_states(folder, documents, device)
    of_queries = mean_hidden_states(folder, queries, device)
    middle = of_documents.mean(dim=0)
    a = torch.nn.functional.normalize(of_queries - middle, dim=1)
    b = torch.nn.functional.normalize(of_documents - middle, dim=1)
    return (a @ b.T).numpy()
