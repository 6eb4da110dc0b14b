"""K-FAC and EK-FAC influence on whole gradients by kronfluence, an independent reference."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gradproj.evaluation.corpus import PAD
from gradproj.evaluation.losses import load

STRATEGIES = {"kronfluence_kfac": "kfac", "kronfluence_ekfac": "ekfac"}
"""Method -> kronfluence's name of it."""
BATCH = 32


def kronfluence_scores(
    name: str,
    model_folder: Path,
    documents: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    work: Path,
) -> np.ndarray:
    """Return influences of documents ``(N, S)`` on queries ``(Q, S)``, ``(Q, N)`` float32.

    A query's labels ``(Q, S)`` are its ids at its targets, ``PAD`` elsewhere. The Fisher matrix
    uses labels sampled from the model, and the damping is 0.1 of its mean eigenvalue: both as its
    authors recommend (arXiv:2308.03296). ``work`` is a temporary directory of kronfluence, deleted
    at the end.
    """
    # On use: kronfluence is of an optional extra.
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    model = load(model_folder, "cpu")
    task = _task(linear_in_place_of_conv1d(model))
    shutil.rmtree(work, ignore_errors=True)
    torch.manual_seed(0)
    options: Any = {"cpu": True, "disable_tqdm": True, "log_level": 30}
    analyzer = Analyzer("lds", prepare_model(model, task), task, output_dir=str(work), **options)
    data, query_data = (
        TensorDataset(torch.from_numpy(ids), torch.from_numpy(labels))
        for ids, labels in ((documents, documents), (queries, query_labels))
    )
    factor_args = FactorArguments(strategy=STRATEGIES[name])
    analyzer.fit_all_factors("factors", data, BATCH, factor_args=factor_args)
    sides: Any = (query_data, data, BATCH, BATCH)
    score_args = ScoreArguments(damping_factor=None)
    analyzer.compute_pairwise_scores("scores", "factors", *sides, score_args=score_args)
    scores = analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
    shutil.rmtree(work)
    return scores


def linear_in_place_of_conv1d(model: Any) -> list[str]:
    """Replace each ``Conv1D``, which kronfluence does not know, by an equal ``nn.Linear``.

    Returns the names of the model's linear layers without its head.
    """
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    for name in names:
        parent, _, attribute = name.rpartition(".")
        conv: Any = model.get_submodule(name)
        linear = nn.Linear(*conv.weight.shape)
        linear.weight.data = conv.weight.data.T.contiguous()
        linear.bias.data = conv.bias.data.clone()
        setattr(model.get_submodule(parent), attribute, linear)
    head = model.get_output_embeddings()
    modules = model.named_modules()
    return [name for name, m in modules if isinstance(m, nn.Linear) and m is not head]


def _task(layers: list[str]) -> Any:
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            ids, labels = batch
            inputs = ids.clamp(min=0)  # padding, on the right, is PAD
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            targets = labels[:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    sampled = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
                    targets = torch.where(targets == PAD, PAD, sampled)
            return F.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    return LanguageModelling()
