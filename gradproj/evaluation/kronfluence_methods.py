"""The yardstick: K-FAC and EK-FAC influence of the same layers by kronfluence, on whole gradients."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradproj.evaluation.retraining import load

STRATEGIES = {"kronfluence_kfac": "kfac", "kronfluence_ekfac": "ekfac"}
BATCH = 32


def kronfluence_scores(
    name: str, model_folder: Path, documents: np.ndarray, queries: np.ndarray, work: Path
) -> np.ndarray:
    """``(Q, N)`` float32; the Fisher matrix is of labels drawn from the model, the damping 0.1 of its mean eigenvalue.

    Both are what its authors recommend (arXiv:2308.03296).
    """
    # On use: an extra.
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    model = load(model_folder, "cpu")
    layers = linear_in_place_of_conv1d(model)
    task = _task(layers)
    shutil.rmtree(work, ignore_errors=True)
    torch.manual_seed(0)
    analyzer = Analyzer(
        "lds",
        prepare_model(model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=str(work),
        log_level=30,
    )
    data, asked = _dataset(documents), _dataset(queries)
    analyzer.fit_all_factors(
        "factors", data, BATCH, factor_args=FactorArguments(strategy=STRATEGIES[name])
    )
    analyzer.compute_pairwise_scores(
        "scores",
        "factors",
        asked,
        data,
        BATCH,
        BATCH,
        score_args=ScoreArguments(damping_factor=None),
    )
    found = analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy()
    shutil.rmtree(work)
    return found


def linear_in_place_of_conv1d(model: nn.Module) -> list[str]:
    """Put an equal ``nn.Linear`` in the place of every ``Conv1D``, which kronfluence does not know; their names."""
    names = [name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"]
    for name in names:
        parent, _, own = name.rpartition(".")
        conv: Any = model.get_submodule(name)
        linear = nn.Linear(*conv.weight.shape)
        linear.weight.data, linear.bias.data = (
            conv.weight.data.T.contiguous(),
            conv.bias.data.clone(),
        )
        setattr(model.get_submodule(parent), own, linear)
    return names


def _dataset(ids: np.ndarray) -> Any:
    return torch.utils.data.TensorDataset(torch.from_numpy(ids))


def _task(layers: list[str]) -> Any:
    """What kronfluence calls a task: the loss of both sides and the layers."""
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, targets = _logits_and_targets(batch[0], model)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(dim=-1), 1).flatten()
            return F.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            logits, targets = _logits_and_targets(batch[0], model)
            return F.cross_entropy(logits, targets, reduction="sum")

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    return LanguageModelling()


def _logits_and_targets(ids: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.flatten(0, 1), ids[:, 1:].flatten()
