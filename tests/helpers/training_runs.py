"""Small training runs, and their rows by plain autograd."""

from pathlib import Path

import numpy as np
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.models import make_tokenizer
from helpers.references import projected_gradient_by_autograd

from gradproj import GradProjLoraEngine
from gradproj.corpus.index import build_index
from gradproj.corpus.tar.paths import list_tars
from gradproj.distributed import World
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.training import TrainConfig
from gradproj.training.data import batches_of
from gradproj.training.loop import load_or_make_model
from gradproj.training.optimizer import parameter_groups, rate_at

SHAPE = {
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "max_length": 16,
    "batch_size": 3,
    "max_steps": 6,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "device": "cpu",
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "checkpoint_interval": 0,
}


def make_data(folder: Path) -> Path:
    """Make ``tars``, ``val`` and ``tok`` in a folder."""
    make_corpus(folder / "tars", mixed_documents(70))
    make_corpus(folder / "val", mixed_documents(12, seed=7))
    make_tokenizer(folder / "tok")
    return folder


def settings_of(data: Path, result_dir: Path, **changes) -> dict:
    """Return a run's settings by flag."""
    where = {
        "shards": str(data / "tars"),
        "tokenizer": str(data / "tok"),
        "result_dir": str(result_dir),
    }
    return where | SHAPE | changes


def config_of(data: Path, result_dir: Path, **changes) -> TrainConfig:
    return TrainConfig(**settings_of(data, result_dir, **changes))


def tokenizer_of(data: Path):
    named = ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(data / "tok"))
    return load_tokenizer(fetch(named))


def index_of(data: Path):
    return build_index(list_tars(str(data / "tars")), progress=False)


def rows_by_autograd(
    config: TrainConfig, data: Path, world_size: int = 1
) -> tuple[np.ndarray, list[int], list[int]]:
    """Return ``(rows, steps, sample ids)`` of the run by hand, one sample's gradient at a time."""
    torch.manual_seed(config.seed)
    _, model = load_or_make_model(config)
    model.requires_grad_(True).train()
    projection = GradProjLoraEngine(
        model, proj_rank_total=config.proj_rank_total, proj_rank_min=config.proj_rank_min
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay))
    streams = [
        batches_of(config, index_of(data), tokenizer_of(data), World(rank, world_size))
        for rank in range(world_size)
    ]
    rows, steps, ids = [], [], []
    for step in range(1, config.max_steps + 1):
        chosen = [next(batches) for batches in streams for _ in range(config.grad_accumulation)]
        optimizer.zero_grad()
        total = 0
        for batch in chosen:
            for tokens, labels, sample_id in zip(
                batch.input_ids, batch.labels, batch.sample_ids, strict=True
            ):
                alone = tokens[labels != -100]
                row = projected_gradient_by_autograd(model, projection, alone)
                rows.append((row / (len(alone) - 1)).numpy())
                steps.append(step)
                ids.append(int(sample_id))
                loss = model(input_ids=alone[None], labels=alone[None]).loss * (len(alone) - 1)
                loss.backward()
                total += len(alone) - 1
        for parameter in model.parameters():
            parameter.grad /= total
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_at(step - 1, config)
        optimizer.step()
    return np.stack(rows), steps, ids
