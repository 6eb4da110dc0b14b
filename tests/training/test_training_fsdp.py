"""Engines on a model whose weights are sharded over the ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.models import ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd
from torch.distributed.fsdp import fully_shard

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.errors import ModelError
from gradproj.training import GhostEngineManager
from gradproj.training.graddotprod.engine import GradDotProdEngine

LENGTHS = [7, 12, 5]


@pytest.fixture
def sharded():
    """A model sharded in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = small_model("gpt2")
    for block in model.transformer.h:
        fully_shard(block)
    yield fully_shard(model)
    dist.destroy_process_group()


def test_rows_of_a_sharded_model_match_each_sample_alone(sharded, tmp_path):
    X, Y = ragged_batch(LENGTHS)
    widths = {"proj_rank_total": 16, "proj_rank_min": 2}
    settings = {
        "method": "GradProjLora",
        "result_dir": str(tmp_path),
        "proj_dtype": "float32",
        **widths,
    }
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.01)
    with GhostEngineManager(settings, sharded, optimizer) as manager:
        manager.attach_train_batch(X, Y, 1, [0, 1, 2])
        sharded(input_ids=X, labels=Y).loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        manager.clear_gradients()
        optimizer.step()
    whole = small_model("gpt2").requires_grad_(True)
    projection = GradProjLoraEngine(whole, **widths)
    with ProjectionStore(tmp_path / "projections") as store:
        rows = store.rows([0, 1, 2])
    for row, tokens, length in zip(rows, X, LENGTHS, strict=True):
        want = projected_gradient_by_autograd(whole, projection, tokens[:length]) / (length - 1)
        np.testing.assert_allclose(row, want.numpy(), rtol=1e-4, atol=1e-6)


def test_dot_products_of_a_sharded_model_are_rejected(sharded):
    with pytest.raises(
        ModelError, match="every rank needs the whole model: use DistributedDataParallel"
    ):
        GradDotProdEngine(sharded, ragged_batch([4, 6]))
