"""The callback inside transformers' Trainer."""

import numpy as np
import pytest
import torch
from helpers.models import ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd, relative_error
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.errors import ConfigError, ModelError
from gradproj.training.hf_callback import GradProjCallback

LENGTHS = [5, 9, 7, 12, 4, 6, 8, 10]
SETTINGS = {"proj_rank_total": 16, "proj_rank_min": 2, "proj_dtype": "float32"}


def samples(n=8):
    """Return padded samples with sample ids."""
    ids, labels = ragged_batch(LENGTHS[:n])
    return [
        {"input_ids": x, "labels": y, "sample_id": 100 + i}
        for i, (x, y) in enumerate(zip(ids, labels, strict=True))
    ]


def train(folder, callbacks, resume=None, dataset=None, **changes):
    """Train a small model for a few steps; return it."""
    model = small_model("llama")
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "seed": 0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(folder / "trainer"), **settings | changes)
    dataset = samples() if dataset is None else dataset
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset, eval_dataset=samples(3), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return model


def rows_of(folder):
    with ProjectionStore(folder / "projections") as store:
        n = len(store)
        return store.rows(range(n)), store.array("step").tolist(), store.array("sample_id").tolist()


class Snapshots(TrainerCallback):
    """Records the weights at the beginning of every step."""

    def __init__(self):
        self.weights = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step + 1] = {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_rows_match_each_sample_alone_at_its_step(tmp_path, accumulation):
    snapshots = Snapshots()
    changes = {
        "gradient_accumulation_steps": accumulation,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 3,
    }
    with GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching:
        trained = train(tmp_path, [watching, snapshots], **changes)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trained.modules())
    rows, steps, ids = rows_of(tmp_path)
    assert steps == np.repeat([1, 2, 3], 2 * accumulation).tolist()
    model = small_model("llama")
    slow = GradProjLoraEngine(model, proj_rank_total=16, proj_rank_min=2)
    for row, step, sample_id in zip(rows, steps, ids, strict=True):
        model.load_state_dict(snapshots.weights[step])
        sample = samples()[sample_id - 100]
        tokens = sample["input_ids"][sample["labels"] != -100]
        want = projected_gradient_by_autograd(model, slow, tokens) / (len(tokens) - 1)
        assert relative_error(torch.from_numpy(row), want) < 1e-4


def test_callback_changes_no_weight(tmp_path):
    with GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching:
        a = train(tmp_path, [watching])
    b = train(tmp_path, [])
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_resumed_trainer_has_the_rows_of_an_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    with GradProjCallback(result_dir=tmp_path, rows_per_shard=3, **SETTINGS) as watching:
        train(tmp_path, [watching], max_steps=3, **saving)
    with GradProjCallback(result_dir=tmp_path, rows_per_shard=3, **SETTINGS) as watching:
        train(tmp_path, [watching], resume=str(tmp_path / "trainer" / "checkpoint-2"), **saving)
    with GradProjCallback(result_dir=tmp_path / "whole", **SETTINGS) as watching:
        train(tmp_path / "whole", [watching], **saving)
    for got, want in zip(rows_of(tmp_path), rows_of(tmp_path / "whole"), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_rows_are_on_disk_before_their_checkpoint(tmp_path, strategy):
    class Look(TrainerCallback):
        """Looks at the store after a checkpoint, before other callbacks are called."""

        def on_save(self, args, state, control, **kwargs):
            with ProjectionStore(tmp_path / "projections") as store:
                seen.append((state.global_step, store.array("step").tolist()))

    seen = []
    watching = GradProjCallback(result_dir=str(tmp_path), proj_save_interval=0, **SETTINGS)
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    changes = best if strategy == "best" else {"save_steps": 2}
    train(tmp_path, [Look(), watching], save_strategy=strategy, num_train_epochs=1, **changes)
    assert seen
    for step, steps in seen:
        assert [s for s in steps if s > 0] == np.repeat(range(1, step + 1), 2).tolist()


def test_labels_mask_and_a_column_of_weights_multiplies_the_rows(tmp_path):
    dataset, weights = samples(4), [1.0, -2.5, 0.0, 0.5]
    for sample, weight in zip(dataset, weights, strict=True):
        sample["labels"] = sample["labels"].clone()
        sample["labels"][1:3], sample["weight"] = -100, weight
    with GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching:
        trained = train(tmp_path, [watching], dataset=dataset, max_steps=2, learning_rate=0.0)
    plain = [{k: v for k, v in sample.items() if k != "weight"} for sample in dataset]
    without = train(tmp_path, [], dataset=plain, max_steps=2)
    rows, _, ids = rows_of(tmp_path)
    assert sorted(ids) == [100, 101, 102, 103]
    slow = GradProjLoraEngine(trained, proj_rank_total=16, proj_rank_min=2)
    for row, sample_id in zip(rows, ids, strict=True):
        sample, weight = dataset[sample_id - 100], weights[sample_id - 100]
        n = LENGTHS[sample_id - 100]
        tokens, labels = sample["input_ids"][:n], sample["labels"][:n]
        want = projected_gradient_by_autograd(trained, slow, tokens, labels)
        want = weight * want / (labels[1:] != -100).sum()
        assert relative_error(torch.from_numpy(row), want) < 1e-4 if weight else not row.any()
    with GradProjCallback(result_dir=tmp_path / "same", **SETTINGS) as watching:
        watched = train(tmp_path, [watching], dataset=dataset, max_steps=2)
    pairs = zip(watched.parameters(), without.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weight_that_is_no_number_a_sample_is_rejected(tmp_path):
    dataset = [sample | {"weight": [1.0, 2.0]} for sample in samples(4)]
    with (
        GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching,
        pytest.raises(ConfigError, match=r"weight of a batch of 2 samples has the shape \(2, 2\)"),
    ):
        train(tmp_path, [watching], dataset=dataset)


def test_sample_ids_that_the_trainer_drops_are_said_once(tmp_path, capsys):
    with GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching:
        train(tmp_path, [watching], max_steps=2, remove_unused_columns=True)
    assert rows_of(tmp_path)[2] == [-1] * 4
    assert capsys.readouterr().err.count("remove_unused_columns=False") == 1
    with GradProjCallback(result_dir=tmp_path / "kept", **SETTINGS) as watching:
        train(tmp_path, [watching], max_steps=2)
    assert -1 not in rows_of(tmp_path / "kept")[2]
    assert "remove_unused_columns" not in capsys.readouterr().err


def test_unsupported_trainer_settings_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown proj_rank; it takes .*proj_rank_total"):
        GradProjCallback(result_dir=tmp_path, proj_rank=3)
    with pytest.raises(ConfigError, match="give a result_dir"):
        GradProjCallback()
    with (
        GradProjCallback(result_dir=tmp_path, **SETTINGS) as watching,
        pytest.raises(ModelError, match="needs the model's own loss"),
    ):
        train(tmp_path, [watching], label_smoothing_factor=0.1)
