"""Fine-tunings of a checkpoint's upper blocks and head, from recorded outputs of the lower ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import make_model, make_tokenizer
from torch.nn import functional as F

from gradproj.errors import ConfigError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import PAD, Experiment
from gradproj.evaluation.finetuning import Finetuning
from gradproj.evaluation.losses import load
from gradproj.training.optimizer import rate_at

LENGTHS = (12, 3, 8, 12, 5, 9)


def experiment_of(model: Path) -> Experiment:
    random = np.random.default_rng(0)
    ids = np.full((len(LENGTHS), 12), PAD)
    for row, length in zip(ids, LENGTHS, strict=True):
        row[:length] = random.integers(3, 101, length)
    unused = Path("unused")
    queries = ids[4:, :9]
    return Experiment(
        ids[:4], queries, np.zeros(0, int), unused, unused, model, model, np.ones(len(queries), int)
    )


def finetuning_of(folder: Path, **changes) -> Finetuning:
    config = LdsConfig(
        shards="unused", output_dir="unused", model=str(folder), device="cpu", batch_size=2,
        epochs=2, learning_rate=1e-2, n_documents=4, n_near_copies=0, leave_out=0,
    )  # fmt: skip
    return Finetuning(replace(config, **changes), experiment_of(folder))


@pytest.fixture(params=["llama_tied", "gpt2"])
def checkpoint(request, tmp_path) -> Path:
    make_model(tmp_path, request.param)
    make_tokenizer(tmp_path)
    return tmp_path


CHOSEN = np.array([True, True, False, True])


def slow_losses(finetuning: Finetuning, folder: Path, upper: int) -> list[float]:
    """Train a model of its own, one document at a time, with torch's loss."""
    experiment, model = experiment_of(folder), load(folder, "cpu")
    if upper:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        trained = [*head.parameters()]
        names = ("layers.1.", "model.norm", "h.1.", "ln_f")
        trained += [p for name, p in model.named_parameters() if any(n in name for n in names)]
    else:
        trained = [*model.parameters()]
    [p.requires_grad_(True) for p in trained]

    def loss(ids: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(ids[ids != PAD])[None]
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")

    order = np.random.default_rng(7)
    rows = np.concatenate([order.permutation(np.flatnonzero(CHOSEN)) for _ in range(2)])
    settings = finetuning._settings(3)
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for step in range(3):
        batch = experiment.documents[rows[2 * step : 2 * step + 2]]
        (sum(loss(ids) for ids in batch) / ((batch != PAD).sum() - 2)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate_at(step, settings)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return [loss(ids).item() / ((ids != PAD).sum() - 1) for ids in experiment.queries]


@pytest.mark.parametrize("upper", [1, 0])
def test_losses_are_those_of_plain_training_and_do_not_depend_on_earlier_ones(checkpoint, upper):
    finetuning = finetuning_of(checkpoint, train_layers=upper)
    assert bool(finetuning._states) == bool(upper)
    finetuning.losses_after(~CHOSEN, seed=1)
    got = finetuning.losses_after(CHOSEN, seed=7)
    want = slow_losses(finetuning, checkpoint, upper)
    np.testing.assert_allclose(got, want, rtol=2e-5)


def test_blocks_that_read_more_than_the_frozen_output_are_not_replayed(tmp_path, monkeypatch):
    make_model(tmp_path, "llama")
    make_tokenizer(tmp_path)
    monkeypatch.setattr("gradproj.evaluation.finetuning.AGREEMENT", -1.0)
    whole = finetuning_of(tmp_path, train_layers=1)
    monkeypatch.undo()
    replayed = finetuning_of(tmp_path, train_layers=1)
    assert not whole._states
    assert replayed._states
    losses = [each.losses_after(CHOSEN, seed=7) for each in (whole, replayed)]
    np.testing.assert_allclose(*losses, rtol=2e-5)


def test_more_layers_than_blocks_are_refused(tmp_path):
    make_model(tmp_path, "llama")
    make_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="--train_layers 3: the model has 2 blocks; 0 trains all"):
        finetuning_of(tmp_path, train_layers=3)
